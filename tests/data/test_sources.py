"""The sources that ship, and specs that open none."""

from __future__ import annotations

import io
import pickle
import shutil
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from given_images import crc, flat
from PIL import Image

from ur_jax import data


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


@pytest.mark.parametrize("index", [-1, 512])
def test_demo_has_no_other_images(index):
    with pytest.raises(IndexError, match=f"in .0, 512., got {index}"):
        data.open_images("demo")[index]


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
    assert direct.content_hash == by_name.content_hash
    other = data.open_images("tfds:cifar10/train")
    assert direct.content_hash != other.content_hash
    with pytest.raises(ValueError, match="holds the data set 'cifar10'"):
        data.open_images("tfds:mnist/train", data_dir=tiny_cifar / "cifar10" / "3.0.2")


def test_tfds_elsewhere_is_the_same_and_with_other_bytes_is_not(tiny_cifar, tmp_path):
    copy = shutil.copytree(tiny_cifar / "cifar10", tmp_path / "cifar10")
    source = lambda folder: data.open_images("tfds:cifar10/train", data_dir=folder)
    assert source(tmp_path).content_hash == source(tiny_cifar).content_hash
    (stored,) = copy.glob("3.0.2/*train*record*")
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    assert source(tmp_path).content_hash != source(tiny_cifar).content_hash


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
