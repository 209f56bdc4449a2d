"""Images in memory and in a folder, and an encoder that takes their mean colour."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image
from reference_rules import image as rule_image

from ur_jax.data import Example, ImageSource
from ur_jax.encoders import from_fn


def mean_colour(params, images):
    return images.mean((1, 2)) * params


def make_encoder(input_size, preparation="resize"):
    return from_fn(mean_colour, jnp.ones(3), input_size=input_size, preparation=preparation)


class Given(ImageSource):
    """Images in memory."""

    spec, class_names = "given", ("a", "b")

    def __init__(self, *images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"image {index}"

    def __getitem__(self, index):
        return Example(Image.fromarray(self.images[index]), 0, self.name(index))


def synthetic(index: int, height: int, width: int) -> np.ndarray:
    """A uint8 image by the reference's rule for preprocessing."""
    return np.rint(255 * rule_image(index, height, width, stream=15)).astype(np.uint8)


def flat(value: int, size: tuple[int, int] = (10, 20)) -> Image.Image:
    """An image of one colour, which every resizing keeps."""
    return Image.new("RGB", size, (value, value, value))


def crc(image) -> int:
    return zlib.crc32(np.ascontiguousarray(image).tobytes())


def write_images(folder: Path) -> None:
    """Two classes, one nested deeper, every image mode, and five files that cannot be read."""
    for sub in ("b/deep/er", "a", "a-x", "empty"):
        (folder / sub).mkdir(parents=True)
    flat(10).save(folder / "root.png")
    flat(20).save(folder / "a" / "1.PNG")
    Image.new("L", (9, 9), 30).save(folder / "a" / "grey.png")
    Image.new("CMYK", (9, 9), (0, 0, 0, 255)).save(folder / "a-x" / "cmyk.tif")
    flat(50).quantize(4).save(folder / "b" / "palette.png")
    flat(60).save(folder / "b" / "deep" / "er" / "0.bmp")
    (folder / "a" / "notes.txt").write_text("not listed")
    (folder / "a" / "empty.jpg").write_bytes(b"")
    (folder / "a" / "text.jpg").write_text("not an image")
    encoded = io.BytesIO()
    Image.fromarray(synthetic(0, 64, 64)).save(encoded, "JPEG")
    (folder / "b" / "truncated.jpg").write_bytes(encoded.getvalue()[:-200])
    encoded = io.BytesIO()
    Image.fromarray(synthetic(0, 64, 64)).save(encoded, "PNG")
    (folder / "b" / "broken.png").write_bytes(encoded.getvalue()[:500] + b"?" * 500)
    (folder / "b" / "page.png").write_text("<html>not found</html>")


LISTING = [
    "root.png",
    "a/1.PNG",
    "a/empty.jpg",
    "a/grey.png",
    "a/text.jpg",
    "a-x/cmyk.tif",
    "b/broken.png",
    "b/page.png",
    "b/palette.png",
    "b/truncated.jpg",
    "b/deep/er/0.bmp",
]
UNREADABLE = {
    "a/empty.jpg",
    "a/text.jpg",
    "b/broken.png",
    "b/page.png",
    "b/truncated.jpg",
}
