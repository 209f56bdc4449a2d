"""Image input: the reference's bytes, every kind of source, batches, and clear errors."""

from __future__ import annotations

import io
import pickle
import shutil
import time
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from reference_rules import image as rule_image

from ur_jax import data
from ur_jax.data.pixels import decode

SMALL = {"input_size": (8, 12), "preparation": "resize"}


def synthetic(index: int, height: int, width: int) -> np.ndarray:
    """A uint8 image by the reference's rule for preprocessing."""
    return np.rint(255 * rule_image(index, height, width, stream=15)).astype(np.uint8)


def flat(value: int, size: tuple[int, int] = (10, 20)) -> Image.Image:
    """An image of one colour, which every resizing keeps."""
    return Image.new("RGB", size, (value, value, value))


def crc(image) -> int:
    return zlib.crc32(np.ascontiguousarray(image).tobytes())


# --- pixels ---------------------------------------------------------------------------------------


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


# --- evenly spaced --------------------------------------------------------------------------------


@pytest.mark.parametrize("total, n", [(1_440_191, 1000), (1_440_191, 2000), (512, 64), (7, 7)])
def test_evenly_spaced_is_the_integer_formula(total, n):
    indices = data.evenly_spaced(total, n)
    assert indices.tolist() == [i * (total - 1) // (n - 1) for i in range(n)]
    assert len(set(indices.tolist())) == n


def test_evenly_spaced_edges_and_errors():
    assert data.evenly_spaced(5, 1).tolist() == [0]
    with pytest.raises(ValueError, match="101 samples.* 100 images"):
        data.evenly_spaced(100, 101)
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        data.evenly_spaced(100, 0)


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes, one nested deeper, every image mode, and five files that cannot be read."""
    for sub in ("b/deep/er", "a", "a-x", "empty"):
        (tmp_path / sub).mkdir(parents=True)
    flat(10).save(tmp_path / "root.png")
    flat(20).save(tmp_path / "a" / "1.PNG")
    Image.new("L", (9, 9), 30).save(tmp_path / "a" / "grey.png")
    Image.new("CMYK", (9, 9), (0, 0, 0, 255)).save(tmp_path / "a-x" / "cmyk.tif")
    flat(50).quantize(4).save(tmp_path / "b" / "palette.png")
    flat(60).save(tmp_path / "b" / "deep" / "er" / "0.bmp")
    (tmp_path / "a" / "notes.txt").write_text("not listed")
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "a" / "text.jpg").write_text("not an image")
    encoded = io.BytesIO()
    Image.fromarray(synthetic(0, 64, 64)).save(encoded, "JPEG")
    (tmp_path / "b" / "truncated.jpg").write_bytes(encoded.getvalue()[:-200])
    encoded = io.BytesIO()
    Image.fromarray(synthetic(0, 64, 64)).save(encoded, "PNG")
    (tmp_path / "b" / "broken.png").write_bytes(encoded.getvalue()[:500] + b"?" * 500)
    (tmp_path / "b" / "page.png").write_text("<html>not found</html>")
    return tmp_path


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


def test_folder_listing_labels_and_modes(folder):
    source = data.open_images(f"folder:{folder}")
    assert [source.name(i) for i in range(len(source))] == LISTING
    assert source.class_names == ("a", "a-x", "b")
    values = {"root.png": 10, "a/1.PNG": 20, "a/grey.png": 30, "a-x/cmyk.tif": 0,
              "b/palette.png": 50, "b/deep/er/0.bmp": 60}  # fmt: skip
    for i, name in enumerate(LISTING):
        if name not in UNREADABLE:
            pixels, label, own_name = source[i]
            assert own_name == name and pixels.mode == "RGB"
            assert set(np.unique(np.asarray(pixels))) == {values[name]}
            assert label == {"root.png": -1, "a": 0, "a-x": 1, "b": 2}[name.split("/")[0]]


def test_listing_hash_tells_listings_apart(folder):
    first = data.open_images(f"folder:{folder}").listing_hash
    assert len(first) == 16 and first == data.open_images(f"folder:{folder}").listing_hash
    flat(1).save(folder / "a" / "2.png")
    assert first != data.open_images(f"folder:{folder}").listing_hash


def test_unreadable_images_are_masked_named_and_never_fatal(folder):
    source = data.open_images(f"folder:{folder}")
    with pytest.warns(UserWarning) as caught:
        batches = list(data.image_batches(source, range(11), batch_size=4, **SMALL))
    warned = [str(w.message) for w in caught if "unreadable" in str(w.message)]
    listed = [unreadable.name for batch in batches for unreadable in batch.unreadable]
    assert set(listed) == UNREADABLE and len(listed) == len(warned) == 5
    for name in UNREADABLE:
        assert sum(name in message for message in warned) == 1
    for batch in batches:
        for name, readable, pixels in zip(batch.names, batch.mask, batch.images):
            assert not (readable and name in UNREADABLE)
            assert readable or name in UNREADABLE or name == batch.names[-1]
            assert np.ptp(pixels) == 0 and 0 <= pixels.min() and pixels.max() <= 1
    assert sum(batch.mask.sum() for batch in batches) == 6
    # The reasons go into results, which must not change when a run is repeated.
    with pytest.warns(UserWarning):
        again = list(data.image_batches(source, range(11), batch_size=4, **SMALL))
    assert [b.unreadable for b in again] == [b.unreadable for b in batches]


def test_load_uint8_leaves_out_the_unreadable(folder):
    source = data.open_images(f"folder:{folder}")
    with pytest.warns(UserWarning, match="unreadable"):
        loaded = data.load_uint8(source, [10, 2, 1, 0], **SMALL)
    assert loaded.images.shape == (3, 8, 12, 3) and loaded.images.dtype == np.uint8
    assert loaded.images[:, 0, 0, 0].tolist() == [60, 20, 10]
    assert loaded.labels.tolist() == [2, 0, -1] and loaded.labels.dtype == np.int32
    assert loaded.indices.tolist() == [10, 1, 0]
    assert [name for name, _ in loaded.unreadable] == ["a/empty.jpg"]


@pytest.mark.parametrize("make, message", [
    (lambda p: p / "absent", "found nothing at"),
    (lambda p: p / "file.png", "found a file at"),
    (lambda p: p / "empty", "expected image files .* found none"),
])  # fmt: skip
def test_a_folder_that_holds_no_images(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    flat(1).save(tmp_path / "file.png")
    with pytest.raises(ValueError, match=message):
        data.open_images(f"folder:{make(tmp_path)}")


# --- demo -----------------------------------------------------------------------------------------


def test_demo_is_512_varied_crops():
    source = data.open_images("demo")
    assert len(source) == 512 and len({source.name(i) for i in range(512)}) == 512
    examples = [source[i] for i in range(512)]
    assert np.bincount([label for _, label, _ in examples]).tolist() == [64] * 8
    assert len({crc(pixels) for pixels, _, _ in examples}) == 512
    for i in range(0, 512, 64):
        sides = [pixels.width for pixels, _, _ in examples[i : i + 64]]
        assert max(sides) > 2.5 * min(sides) and min(sides) >= 75
    # No crop is blank: that would make representations coincide.
    assert min(np.asarray(pixels).std() for pixels, _, _ in examples) > 3


# The bytes of our own crops, equal under Pillow 9.2, 10.4, 12.3 and 13.0: a change of them changes
# every number measured on `demo`.
@pytest.mark.parametrize("size, preparation, expected", [
    ((32, 32), "resize", 1711588265),
    ((32, 32), "resize_crop", 159974556),
    ((224, 244), "resize", 2000034889),
])  # fmt: skip
def test_demo_bytes_never_change(size, preparation, expected):
    loaded = data.load_uint8(
        data.open_images("demo"), range(512), input_size=size, preparation=preparation
    )
    assert loaded.images.shape == (512, *size, 3) and loaded.unreadable == []
    assert crc(loaded.images) == expected


# --- tensorflow-datasets --------------------------------------------------------------------------


class TinyCifar(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Ten images with the real data set's name, version and features."""

    name = "cifar10"
    VERSION = tfds.core.Version("3.0.2")
    code_path = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(32, 32, 3)),
                    "label": tfds.features.ClassLabel(names=[f"class {i}" for i in range(10)]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 6), "test": self._generate_examples(6, 10)}

    def _generate_examples(self, first, last):
        for i in range(first, last):
            encoded = io.BytesIO()
            if i == 7:
                Image.new("L", (32, 32), 70).save(encoded, "PNG")  # grey: decoded as it is stored
            else:
                flat(10 * i, (32, 32)).save(encoded, "PNG")
            yield i, {"id": str(i), "image": encoded.getvalue(), "label": i}


@pytest.fixture(scope="module")
def tiny_cifar(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    TinyCifar(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.mark.parametrize("split, labels", [
    ("train", range(6)), ("test", range(6, 10)), ("train+test", range(10)), ("all", range(10)),
])  # fmt: skip
def test_tfds_splits(tiny_cifar, split, labels):
    source = data.open_images(f"tfds:cifar10/{split}", data_dir=tiny_cifar)
    assert source.spec == f"tfds:cifar10/{split}"
    assert source.class_names[3] == "class 3"
    examples = [source[i] for i in range(len(source))]
    assert sorted(label for _, label, _ in examples) == list(labels)
    for pixels, label, _ in examples:
        assert pixels.mode == "RGB" and pixels.size == (32, 32)
        assert set(np.unique(np.asarray(pixels))) == {10 * label}
    assert len({name for _, _, name in examples}) == len(examples)
    assert pickle.loads(pickle.dumps(source))[0].name == examples[0].name


def test_tfds_directory_may_be_the_prepared_one_or_come_from_the_environment(
    tiny_cifar, monkeypatch
):
    direct = data.open_images("tfds:cifar10/train[:50%]", data_dir=tiny_cifar / "cifar10" / "3.0.2")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_cifar))
    by_name = data.open_images("tfds:cifar10:3.0.2/train[:50%]")
    assert len(direct) == len(by_name) == 3
    assert direct.listing_hash == by_name.listing_hash
    with pytest.raises(ValueError, match="holds the data set 'cifar10'"):
        data.open_images("tfds:mnist/train", data_dir=tiny_cifar / "cifar10" / "3.0.2")


def test_tfds_with_a_missing_file(tiny_cifar, tmp_path):
    copy = shutil.copytree(tiny_cifar / "cifar10", tmp_path / "cifar10")
    next(copy.glob("3.0.2/*train*")).unlink()
    with pytest.raises(ValueError, match="misses .'cifar10-train.array_record"):
        data.open_images("tfds:cifar10/train", data_dir=tmp_path)
    assert len(data.open_images("tfds:cifar10/test", data_dir=tmp_path)) == 4


def test_tfds_in_a_format_without_random_access(tiny_cifar, tmp_path):
    copy = shutil.copytree(tiny_cifar / "cifar10" / "3.0.2", tmp_path / "cifar10" / "3.0.2")
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for path in copy.glob("*array_record*"):
        path.rename(copy / path.name.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="array_record.*tfds convert_format"):
        data.open_images("tfds:cifar10/train", data_dir=tmp_path)


@pytest.mark.parametrize("spec, message", [
    ("tfds:cifar10/tset", "Unknown split.*'tset'; did you mean 'test'"),
    ("tfds:cifar10/train[:x]", "Expected a split such as"),
    ("tfds:cifar10/train[:0%]", "has 0 images"),
    ("tfds:cifra10/test", "Unknown tfds data set 'cifra10'; did you mean 'cifar10'"),
    ("tfds:nothing_like_it/test", "'nothing_like_it'. Expected one that tfds.list_builders"),
    ("tfds:cifar10:9.9.9/test", "known config and version.*3.0.2"),
    ("tfds:mnist/test", "tfds:mnist/test.*tfds build mnist .*array_record.*TFDS_DATA_DIR"),
    ("tfds:imagenet2012/validation", "expected the prepared data set"),
    ("tfds:cifar10", "Malformed .*'tfds:cifar10'.*tfds:NAME/SPLIT"),
    ("tfds:huggingface:mnist/test", "Malformed"),
    ("folder:", "Malformed"),
    ("demo:cats", "Malformed"),
    ("foldr:photos", "'foldr'; did you mean 'folder'.*demo, folder, tfds.*'foldr:photos'"),
    ("./photos", "Unknown kind of images './photos'.*as in folder:./photos"),
    ("~", "Unknown kind of images '~'.*write folder:~"),
    ("", "Unknown kind of images ''"),
])  # fmt: skip
def test_bad_specs_fail_at_once_and_say_what_to_do(tiny_cifar, spec, message):
    began = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        data.open_images(spec, data_dir=tiny_cifar)
    assert time.perf_counter() - began < 2


# --- batches --------------------------------------------------------------------------------------


def test_every_batch_has_the_same_shape_and_the_last_is_padded():
    source = data.open_images("demo")
    indices = data.evenly_spaced(512, 10)[::-1]
    arguments = dict(input_size=(16, 20), preparation="resize_crop", batch_size=4)
    batches = list(data.image_batches(source, indices, **arguments))
    assert len(batches) == 3
    for batch in batches:
        assert batch.images.shape == (4, 16, 20, 3) and batch.images.dtype == np.float32
        assert batch.labels.dtype == np.int32 and batch.indices.dtype == np.int64
        assert batch.names == [source.name(i) for i in batch.indices] and not batch.unreadable
    assert batches[-1].mask.tolist() == [True, True, False, False]
    assert batches[-1].indices.tolist() == [indices[8], *[indices[9]] * 3]
    np.testing.assert_array_equal(batches[-1].images[2], batches[-1].images[1])
    kept = np.concatenate([batch.indices[batch.mask] for batch in batches])
    np.testing.assert_array_equal(kept, indices)
    for row, index in enumerate(indices[:4]):
        pixels = data.prepare(source[index].pixels, input_size=(16, 20), preparation="resize_crop")
        np.testing.assert_array_equal(
            batches[0].images[row], pixels.astype(np.float32) / np.float32(255)
        )
        assert batches[0].labels[row] == index // 64
    resumed = list(data.image_batches(source, indices, start=2, **arguments))
    assert len(resumed) == 1
    np.testing.assert_array_equal(resumed[0].images, batches[2].images)
    assert list(data.image_batches(source, indices, start=3, **arguments)) == []
    assert list(data.image_batches(source, [], **arguments)) == []


def test_workers_give_what_threads_give(folder):
    source = data.open_images(f"folder:{folder}")
    with pytest.warns(UserWarning, match="unreadable"):
        here = list(data.image_batches(source, range(11), batch_size=2, **SMALL))
        there = list(data.image_batches(source, range(11), batch_size=2, num_workers=2, **SMALL))
    assert len(here) == len(there) == 6
    for one, other in zip(here, there):
        assert one.names == other.names and one.unreadable == other.unreadable
        for field in ("images", "labels", "indices", "mask"):
            assert type(getattr(other, field)) is np.ndarray  # not a worker's shared memory
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("change, message", [
    ({"indices": [0, 512]}, r"indices in \[0, 512\).*'demo'.* 0 to 512"),
    ({"indices": [-1]}, "-1 to -1"),
    ({"indices": [[0]]}, "flat list"),
    ({"batch_size": 0}, "batch_size >= 1"),
    ({"num_workers": -1}, "num_workers >= 0"),
    ({"input_size": (0, 8)}, "positive .height, width."),
    ({"preparation": "crop"}, "Unknown preparation 'crop'"),
    ({"start": 3}, r"start in \[0, 2\]"),
])  # fmt: skip
def test_bad_arguments_fail_at_the_call(change, message):
    arguments = dict(indices=range(8), batch_size=4, **SMALL) | change
    with pytest.raises(ValueError, match=message):
        data.image_batches(data.open_images("demo"), arguments.pop("indices"), **arguments)


def test_a_source_of_ones_own():
    class Squares(data.ImageSource):
        spec = "squares"

        def __len__(self):
            return 3

        def name(self, index):
            return f"square {index}"

        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("lost")
            return data.Example(flat(index), -1, self.name(index))

    with pytest.warns(UserWarning, match="square 1: RuntimeError: lost"):
        (batch,) = data.image_batches(Squares(), range(3), batch_size=3, **SMALL)
    assert batch.mask.tolist() == [True, False, True]
