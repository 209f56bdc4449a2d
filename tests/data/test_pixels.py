"""Pixels: the bytes of the reference pipeline, and what each kind of file becomes."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from given_images import crc, synthetic
from PIL import Image
from skimage.util import img_as_ubyte

from ur_jax import data
from ur_jax.data.pixels import decode


def golden_source(name: str, position: int) -> tuple[np.ndarray, Image.Image]:
    """The array and the unconverted image of one row of preprocess.npz."""
    kind, _, size = name.partition("_")
    height, width = map(int, size.split("x"))
    if kind == "rgb":
        array = synthetic(position, height, width)
        return array, Image.fromarray(array)
    if kind == "grey":
        array = synthetic(7, height, width)[..., 0]
        return array, Image.fromarray(array)
    if kind == "rgba":
        alpha = synthetic(9, height, width)[..., :1]
        array = np.concatenate([synthetic(8, height, width), alpha], -1)
        return array, Image.frombytes("RGBA", (width, height), array.tobytes())
    if kind == "palette":
        array = synthetic(10, height, width)[..., 0]
        image = Image.frombytes("P", (width, height), array.tobytes())
        palette = np.random.default_rng([0, 16]).integers(0, 256, (256, 3)).astype(np.uint8)
        image.putpalette(palette.tobytes())
        return array, image
    black = synthetic(12, height, width)[..., :1]
    array = np.concatenate([synthetic(11, height, width), black], -1)
    return array, Image.frombytes("CMYK", (width, height), array.tobytes())


OPERATIONS = {
    "convert": lambda image: image,
    "resize_224x244": lambda image: data.resize(image, (224, 244)),
    "resize_224x224": lambda image: data.resize(image, (224, 224)),
    "resize_256": lambda image: data.resize_shorter(image, 256),
    "resize_256_crop_224": lambda image: data.resize_crop(image, (224, 224)),
    "probe_224x244": lambda image: data.resize(data.resize_crop(image, (224, 224)), (224, 244)),
    "probe_simclrv2": lambda image: data.resize_crop(
        data.resize_crop(image, (224, 224)), (224, 224)
    ),
}


def test_all_77_reference_results_are_equal_byte_for_byte(golden):
    reference = golden("preprocess.npz")
    assert list(reference["operations"]) == list(OPERATIONS)
    wrong = []
    for i, name in enumerate(reference["names"]):
        array, image = golden_source(str(name), i)
        assert crc(array) == reference["source_crc32"][i]
        file = io.BytesIO()
        image.save(file, "TIFF")
        converted = decode(file)
        for j, (operation, function) in enumerate(OPERATIONS.items()):
            result = np.asarray(function(converted))
            assert result.shape[:2] == tuple(reference["shape"][i, j])
            if crc(result) != reference["crc32"][i, j]:
                wrong.append(f"{name} {operation}")
    assert reference["crc32"].size == 77
    assert wrong == []


def test_small_reference_images_in_full(golden):
    reference = golden("preprocess.npz")
    image = Image.fromarray(synthetic(6, 40, 50))
    results = {
        "resize_28x30": data.resize(image, (28, 30)),
        "resize_64x80": data.resize(image, (64, 80)),
        "resize_33_crop_28": data.central_crop(data.resize_shorter(image, 33), (28, 28)),
    }
    for name, result in results.items():
        np.testing.assert_array_equal(np.asarray(result), reference[f"rgb_40x50_{name}"])


def test_prepare_follows_the_encoders_preparation():
    image = Image.fromarray(synthetic(0, 60, 90))
    for preparation, function in (("resize", data.resize), ("resize_crop", data.resize_crop)):
        pixels = data.prepare(image, input_size=(32, 40), preparation=preparation)
        assert pixels.shape == (32, 40, 3) and pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, np.asarray(function(image, (32, 40))))
    with pytest.raises(ValueError, match="'resize_crp'; did you mean 'resize_crop'"):
        data.prepare(image, input_size=(32, 40), preparation="resize_crp")


def test_an_extremely_elongated_image_is_refused_before_it_fills_the_memory():
    with pytest.raises(ValueError, match="20000x1"):
        data.resize_crop(Image.new("RGB", (20000, 1)), (224, 224))


# --- what each kind of file becomes ---------------------------------------------------------------


def decoded(image: Image.Image, kind: str, **options) -> np.ndarray:
    """The pixels of an image once it was written to a file of some kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return np.asarray(decode(file))


def test_16_bit_grey_is_scikit_images_8_bit_picture():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**16, (16, 16)).astype(np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        pixels = decoded(Image.fromarray(values), kind)
        np.testing.assert_array_equal(pixels, img_as_ubyte(values)[..., None].repeat(3, 2))
        assert len(np.unique(pixels)) > 100  # Pillow's own conversion leaves two
    dark = (values % 256).astype(np.uint16)  # an 8-bit picture that was stored in 16 bits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-image says that it does not scale
        expected = img_as_ubyte(dark)
    np.testing.assert_array_equal(decoded(Image.fromarray(dark), "PNG")[..., 0], expected)
    # A big-endian TIFF, by hand: Pillow writes none.
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, 1, 122), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 4)]  # fmt: skip
    entries = b"".join(
        struct.pack(">HHI", tag, kind, count)
        + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, count, value in tags
    )
    file = b"MM\0\x2a" + struct.pack(">IH", 8, len(tags)) + entries + struct.pack(">I", 0)
    file += struct.pack(">HH", 0x1234, 0xFEDC)
    assert np.asarray(decode(io.BytesIO(file)))[..., 0].tolist() == [[0x12, 0xFE]]


@pytest.mark.parametrize("dtype, kind", [(np.float32, "TIFF"), (np.int32, "TIFF")])
def test_pixels_without_a_known_white_are_refused(dtype, kind):
    image = Image.fromarray(np.linspace(0, 1, 16).reshape(4, 4).astype(dtype))
    with pytest.raises(ValueError, match="which value is white is not known; convert"):
        decoded(image, kind)


def test_other_modes_are_what_torchvision_makes_of_them():
    rgb = synthetic(0, 8, 8)
    grey, alpha = rgb[..., 0], np.zeros((8, 8, 1), np.uint8)
    as_rgb = grey[..., None].repeat(3, 2)
    np.testing.assert_array_equal(decoded(Image.fromarray(grey), "PNG"), as_rgb)
    with_alpha = np.concatenate([rgb, alpha], -1)  # dropped, though all is transparent
    np.testing.assert_array_equal(decoded(Image.fromarray(with_alpha), "PNG"), rgb)
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha[..., 0])])
    np.testing.assert_array_equal(decoded(grey_alpha, "PNG"), as_rgb)
    bits = Image.fromarray(grey > 128)
    np.testing.assert_array_equal(decoded(bits, "PNG"), 255 * (grey > 128)[..., None].repeat(3, 2))
    palette = Image.fromarray(grey).convert("P")
    np.testing.assert_array_equal(decoded(palette, "PNG", transparency=3), as_rgb)
    cmyk = Image.fromarray(rgb).convert("CMYK")
    expected = 255 - np.minimum(np.asarray(cmyk)[..., :3].astype(int), 255)  # its black is 0
    np.testing.assert_array_equal(decoded(cmyk, "TIFF"), expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    np.testing.assert_array_equal(decoded(Image.fromarray(rgb), "PNG", exif=exif), rgb)
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    first = decoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(first, rgb)


def test_16_bit_colour_keeps_its_upper_8_bits():
    values = np.arange(12, dtype=np.uint16).reshape(2, 2, 3) * 5003
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    pixels = np.asarray(decode(io.BytesIO(file + chunk(b"IEND", b""))))
    np.testing.assert_array_equal(pixels, values >> 8)
