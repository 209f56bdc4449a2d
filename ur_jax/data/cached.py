"""Decoded images kept on disk: each is decoded once for one preparation, by whoever comes first.

    source = CachedImages(open_images("folder:photos"), "cache")     # --image-cache cache

A folder of the cache holds the uint8 pixels of one content and one preparation, so that encoders of
the same preparation, and hosts that see the same disk, share it; another content, size, filter or
version of what decodes is another folder. It fills as images are asked for: whoever decodes some of
a batch writes one file of them, whole or not at all, which is memory-mapped from then on. Every
image is checked by a CRC-32 as it is read; a file that is not as it was written is removed, with a
warning, and its images are decoded anew. The cache may be deleted between runs.

    DIR/CONTENT-HxW-PREPARATION-DECODER/HASH.images     mark, SHA-256 of the table, table, pixels
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, features

from ur_jax.checks import check_type
from ur_jax.data.pixels import prepare
from ur_jax.data.reading import NOT_THE_IMAGE, StorageError, retried
from ur_jax.data.sources import Example, ImageSource, read
from ur_jax.encoders.preparation import parse_preparation
from ur_jax.errors import UserError, remedy_of, shown
from ur_jax.runs.files import as_folder, atomic_path, is_in_bucket

_MARK = b"ur_jax decoded images 1\n"  # counts up when `pixels` makes others of the same files
_SUFFIX = ".images"
_LENGTH = 8  # bytes that tell the table's
_OPEN = 128  # files mapped at a time: each holds a descriptor

_WRITING = threading.Lock()  # a temporary file is named by its process


class Prepared(NamedTuple):
    """An image at an encoder's size.

    Attributes:
      pixels: (H, W, 3) uint8; None where it cannot be read.
      label: -1 for none, and where it cannot be read.
      reason: why it cannot be read.
    """

    pixels: np.ndarray | None
    label: int
    reason: str


def prepare_all(
    source: ImageSource, indices: Sequence[int], *, input_size: tuple[int, int], preparation: str
) -> list[Prepared]:
    """Reads and prepares images, from the cache where the source has one.

    Args:
      source: from `open_images`, or `CachedImages` of it.
      indices: positions in its listing.
      input_size, preparation: see `pixels.prepare`.

    Raises:
      StorageError: for storage that does not answer, or a cache that cannot be written.
    """
    if isinstance(source, CachedImages):
        return source.prepared(indices, input_size, preparation)
    return [_prepare_one(source, index, input_size, preparation) for index in indices]


class CachedImages(ImageSource):
    """A source whose prepared images are kept on disk; in all else, its identity too, the source.

    What is not prepared for an encoder, such as a probe's random crops, is read from the source.
    """

    def __init__(self, source: ImageSource, folder: str | os.PathLike[str]):
        """Names the cache; nothing is written yet.

        Args:
          source: from `open_images`.
          folder: of the cache, on a file system.

        Raises:
          UserError: for a bucket, or a file where the folder is to be.
        """
        check_type("source", source, ImageSource)
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise UserError(f"Expected the path of a folder as image_cache, got {shown(folder)}.")
        folder = as_folder(folder)
        if is_in_bucket(folder):
            raise UserError(
                f"Expected a folder of a file system as --image-cache, got {os.fspath(folder)!r}: "
                "its files are mapped into memory; name a local or a mounted folder."
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(
                f"Expected a folder as --image-cache, got the file {os.fspath(folder)!r}."
            )
        self.source = source.source if isinstance(source, CachedImages) else source
        self.spec, self.class_names = source.spec, source.class_names
        self._folder = Path(os.fspath(folder))
        self._stores: dict[tuple[tuple[int, int], str], _Store] = {}

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def __getitem__(self, index: int) -> Example:
        return self.source[index]

    def label(self, index: int) -> int:
        return self.source.label(index)

    @functools.cached_property
    def content_hash(self) -> str:
        """The source's."""
        return self.source.content_hash

    def fingerprints(self, indices: np.ndarray) -> list[bytes]:
        """The source's."""
        return self.source.fingerprints(indices)

    def __getstate__(self):
        return {**self.__dict__, "_stores": {}}  # a worker lists the files itself

    def prepared(
        self, indices: Sequence[int], input_size: tuple[int, int], preparation: str
    ) -> list[Prepared]:
        """What `prepare_all` gives; what the cache is without is added to it, as one file."""
        key = input_size, parse_preparation(preparation).name
        store = self._stores.get(key)
        if store is None:
            height, width = input_size
            name = f"{self.content_hash}-{height}x{width}-{key[1]}-{_decoder()}"
            store = self._stores.setdefault(key, _Store(self._folder / name, input_size))
        found = store.get(indices)
        if missing := [index for index in indices if index not in found]:
            store.look()
            found |= store.get(missing)
        made = {
            index: _prepare_one(self.source, index, input_size, preparation)
            for index in indices
            if index not in found
        }
        if made:
            store.put(made)
        found |= made
        return [found[index] for index in indices]


def _prepare_one(
    source: ImageSource, index: int, input_size: tuple[int, int], preparation: str
) -> Prepared:
    """Reads and prepares one image."""
    try:
        example = read(source, index)
        pixels = prepare(example.pixels, input_size=input_size, preparation=preparation)
    except NOT_THE_IMAGE:
        raise
    except Exception as error:  # Pillow alone raises a dozen kinds for damaged files
        return Prepared(None, -1, f"{type(error).__name__}: {error}")
    return Prepared(pixels, example.label, "")


@functools.cache
def _decoder() -> str:
    """8 hex digits of what decides over pixels beside the files: libraries, and Pillow's limits."""
    names = ("pil", "libjpeg_turbo", "jpg", "webp", "libtiff")
    known = [features.version(name) for name in names]
    limits = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    return hashlib.sha256(repr((_MARK, known, limits)).encode()).hexdigest()[:8]


class _Row(NamedTuple):
    """Where an image is: its file, its place in it (-1 unreadable), CRC-32, label and reason."""

    file: str
    place: int
    check: int
    label: int
    reason: str


class _Damaged(ValueError):
    """A file of the cache that is not as it was written."""


class _Store:
    """The files of one content and preparation; threads may share it."""

    def __init__(self, folder: Path, size: tuple[int, int]):
        self._folder, self._shape = folder, (*size, 3)
        self._rows: dict[int, _Row] = {}
        self._starts: dict[str, int] = {}
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, indices: Sequence[int]) -> dict[int, Prepared]:
        """Those of some images that are there."""
        found = ((index, self._get(index)) for index in indices)
        return {index: image for index, image in found if image is not None}

    def _get(self, index: int) -> Prepared | None:
        """An image; None if it is not there."""
        with self._lock:
            row = self._rows.get(index)
            if row is None:
                return None
            if row.place < 0:
                return Prepared(None, row.label, row.reason)
            try:
                pixels = self._mapped(row.file)[row.place]
            except FileNotFoundError:  # someone removed it
                self._forget(row.file)
                return None
            except ValueError as error:  # NumPy's, of a file that has become shorter
                self._remove(row.file, str(error))
                return None
        if zlib.crc32(pixels.data) != row.check:
            self._remove(row.file, f"image {index} does not have its recorded CRC-32")
            return None
        return Prepared(pixels, row.label, "")

    def look(self) -> None:
        """Takes up the files that others have written."""
        with self._lock:
            names = retried(self._names, f"the image cache {self._folder}")
            for name in sorted(names - self._starts.keys()):
                try:
                    rows, start = self._read(name)
                except FileNotFoundError:
                    continue
                except _Damaged as error:
                    self._remove(name, str(error))
                else:
                    self._starts[name] = start
                    self._rows |= rows

    def put(self, images: Mapping[int, Prepared]) -> None:
        """Writes images as one file.

        Raises:
          StorageError: if it cannot be written.
        """
        rows, readable = [], []
        for index, (pixels, label, reason) in images.items():
            if pixels is None:
                rows.append((index, -1, 0, label, reason))
            else:
                pixels = np.ascontiguousarray(pixels)
                rows.append((index, len(readable), zlib.crc32(pixels.data), label, ""))
                readable.append(pixels)
        table = json.dumps(rows).encode()
        digest = hashlib.sha256(table).digest()
        path = self._folder / f"{digest.hex()[:24]}{_SUFFIX}"
        try:
            with _WRITING, atomic_path(path) as temporary, open(temporary, "wb") as file:
                file.write(_MARK + digest + len(table).to_bytes(_LENGTH, "little") + table)
                file.writelines(pixels.data for pixels in readable)
        except OSError as error:
            raise StorageError(
                f"Cannot write the image cache {self._folder}: {error.strerror or error}; "
                f"{remedy_of(error) or 'look at the disk'}, or go without --image-cache."
            ) from error
        self.look()

    def _names(self) -> set[str]:
        """The files."""
        with contextlib.suppress(FileNotFoundError):
            return {name for name in os.listdir(self._folder) if name.endswith(_SUFFIX)}
        return set()

    def _read(self, name: str) -> tuple[dict[int, _Row], int]:
        """The rows of a file, once it is known to be whole, and where its pixels begin."""
        path = os.path.join(self._folder, name)
        with open(path, "rb") as file:
            head = file.read(len(_MARK) + 32 + _LENGTH)
            length = int.from_bytes(head[-_LENGTH:], "little")
            size = os.fstat(file.fileno()).st_size
            if not head.startswith(_MARK) or length > size:
                raise _Damaged("it does not begin as it should")
            table = file.read(length)
        if hashlib.sha256(table).digest() != head[len(_MARK) : -_LENGTH]:
            raise _Damaged("its table does not have its recorded SHA-256")
        rows = {index: _Row(name, *rest) for index, *rest in json.loads(table)}
        start, number = len(head) + length, sum(row.place >= 0 for row in rows.values())
        if size != start + number * int(np.prod(self._shape)):
            raise _Damaged(f"it has {size} bytes")
        return rows, start

    def _mapped(self, name: str) -> np.ndarray:
        """The pixels of a file, mapped; the latest ones stay so."""
        if name in self._maps:
            self._maps.move_to_end(name)
            return self._maps[name]
        path = os.path.join(self._folder, name)
        kept = np.memmap(path, np.uint8, "r", self._starts[name])
        self._maps[name] = np.asarray(kept).reshape(-1, *self._shape)
        if len(self._maps) > _OPEN:
            self._maps.popitem(last=False)
        return self._maps[name]

    def _forget(self, name: str) -> None:
        """Takes the images of a file for not there."""
        self._rows = {index: row for index, row in self._rows.items() if row.file != name}
        self._starts.pop(name, None)
        self._maps.pop(name, None)

    def _remove(self, name: str, why: str) -> None:
        """Removes a damaged file."""
        with self._lock:
            self._forget(name)
            path = os.path.join(self._folder, name)
            warnings.warn(
                f"{path} of the image cache is damaged: {why}. It is removed, and its images are "
                "decoded anew.",
                stacklevel=2,
            )
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise StorageError(
                    f"Cannot remove the damaged {path}: {error.strerror or error}; name another "
                    "--image-cache."
                ) from error
