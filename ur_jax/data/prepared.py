"""Images from prepared tensorflow-datasets data sets, without TensorFlow."""

from __future__ import annotations

import difflib
import errno
import functools
import hashlib
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ur_jax.data.identity import content_digest, hash_files
from ur_jax.data.pixels import decode
from ur_jax.data.sources import SOURCES, Example, ImageSource
from ur_jax.errors import UserError, unknown_name


@SOURCES.register("tfds")
def open_prepared(place: str, *, data_dir: str | os.PathLike[str] | None = None) -> TfdsSource:
    """Opens NAME/SPLIT, see `open_images`."""
    match = re.fullmatch(r"(\w+(?:/[\w.+-]+)?(?::[\d.*]+)?)/([^/]+)", place)
    if not match:
        raise UserError(
            f"Malformed image spec 'tfds:{place}': expected tfds:NAME/SPLIT, as in "
            "tfds:cifar10/test."
        )
    return TfdsSource(match[1], match[2], data_dir=data_dir)


class TfdsSource(ImageSource):
    """A split of a prepared tensorflow-datasets data set, read without TensorFlow.

    The stored bytes are decoded by Pillow: tensorflow-datasets itself would use cv2 where that is
    installed, and the pixels would depend on the machine.
    """

    def __init__(self, name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None):
        import tensorflow_datasets as tfds  # takes half as long as JAX, and is seldom needed

        self.spec = f"tfds:{name}/{split}"
        builder = _prepared_builder(self.spec, name, data_dir)
        features: dict[str, Any] = dict(builder.info.features or {})  # type: ignore[arg-type]
        images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
        image = _only(images, "image")
        self._label = _only(labels, "label")
        if image is None:
            raise UserError(
                f"{self.spec!r}: expected a data set with an image feature 'image', found features "
                f"{', '.join(features)}; choose an image classification data set."
            )
        self._image = image
        for part in split.split("+"):
            base = part.partition("[")[0].strip()
            if base not in (*builder.info.splits, "all"):
                raise unknown_name(f"split of tfds:{name}", base, builder.info.splits)
        try:
            subset = builder.info.splits[split]
        except ValueError as error:
            raise UserError(
                f"{self.spec!r}: {error} Expected a split such as test, train[:10%] or train+test."
            ) from error
        missing = [path.name for path in subset.filepaths if not path.exists()]
        if missing or not subset.num_examples:
            raise UserError(
                f"{self.spec!r}: expected a split with images, all its files in "
                f"{builder.data_dir}; it has {subset.num_examples} images and misses "
                f"{missing[:3] or 'no file'}; choose a larger slice or prepare the data set again."
            )
        try:
            skip = {key: tfds.decode.SkipDecoding() for key in images}
            self._records = builder.as_data_source(split, decoders=skip)  # type: ignore[call-arg]
        except NotImplementedError as error:
            raise UserError(
                f"{self.spec!r}: expected the random-access format array_record in "
                f"{builder.data_dir}; convert it with `tfds convert_format "
                f"--dataset_version_dir={builder.data_dir} --out_file_format=array_record`."
            ) from error
        self._prefix = f"{builder.info.full_name}/{split}"
        self.class_names = tuple(features[self._label].names or ()) if self._label else ()
        self._folder = os.fspath(builder.data_dir)
        self._files = sorted(path.name for path in subset.filepaths)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return f"{self._prefix}/{index:07d}"

    def __getitem__(self, index: int) -> Example:
        record = self._record(index)
        pixels = decode(io.BytesIO(record[self._image]))
        return Example(pixels, self._label_of(record), self.name(index))

    def label(self, index: int) -> int:
        return self._label_of(self._record(index))

    @functools.cached_property
    def content_hash(self) -> str:
        """16 hex digits over data set, version, split, classes and the bytes of its files."""
        files = hash_files(self._folder, self._files, key=self._prefix)
        described = repr((self._prefix, self.class_names, self._image, self._label, files))
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def fingerprints(self, indices: np.ndarray) -> list[bytes]:
        """Of the stored bytes, those of a file of a folder."""
        return [content_digest(self._record(int(i))[self._image]) for i in indices]

    def _record(self, index: int) -> Mapping[str, Any]:
        """One record; its file that cannot be read is a fault of the storage, not of an image."""
        try:
            return self._records[index]
        except OSError:
            raise
        except Exception as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error

    def _label_of(self, record: Mapping[str, Any]) -> int:
        """The label in a record, -1 for none."""
        return -1 if self._label is None else int(record[self._label])


def _prepared_builder(spec: str, name: str, data_dir: str | os.PathLike[str] | None):
    """Returns the builder of a data set on disk, or raises with what to do about it."""
    import tensorflow_datasets as tfds

    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    if data_dir is not None and (Path(data_dir) / "dataset_info.json").is_file():
        builder = tfds.builder_from_directory(data_dir)
        if builder.name != re.split("[/:]", name)[0]:
            raise UserError(
                f"{spec!r}: {data_dir} holds the data set {builder.name!r}; write tfds:"
                f"{builder.name}/SPLIT or give another data_dir."
            )
        return builder
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)  # too many to list them all
        near = difflib.get_close_matches(re.split("[/:]", name)[0], known)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise UserError(
            f"Unknown tfds data set {name!r}{hint} Expected one that tfds.list_builders() lists, "
            "or one prepared under data_dir (or TFDS_DATA_DIR)."
        ) from None
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"{spec!r}: expected a known config and version in NAME[/CONFIG][:VERSION]; "
            f"tensorflow-datasets says: {error}"
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"{spec!r}: expected the prepared data set at {builder.data_dir}, found none, and "
            "nothing is downloaded here. Prepare it once where TensorFlow and a network are, "
            f"`pip install tensorflow && tfds build {name} --file_format=array_record "
            "--data_dir=DIR`, then give DIR as data_dir or TFDS_DATA_DIR."
        )
    return builder


def _only(keys: list[str], usual: str) -> str | None:
    """Returns the usual feature key if it is there, else the only one of its type, else None."""
    if usual in keys:
        return usual
    return keys[0] if len(keys) == 1 else None
