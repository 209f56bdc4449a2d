"""Where images come from: the interface of a source, and the table of what a spec can begin with.

A source of one's own is a subclass of `ImageSource`, given to a job as it is; or, for the command
line, one file that registers what opens it:

    @SOURCES.register("squares")                      # --plugin squares.py --images squares:100
    def open_squares(place: str) -> ImageSource: ...  # gets the text behind the colon
"""

from __future__ import annotations

import abc
import functools
import hashlib
import inspect
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from ur_jax.data.reading import NOT_THE_IMAGE, retried
from ur_jax.errors import UserError, shown, unknown_name
from ur_jax.registry import Registry


class Example(NamedTuple):
    """One decoded image: RGB `pixels` of any size, `label` (-1 for none) and its unique `name`."""

    pixels: Image.Image
    label: int
    name: str


class ImageSource(abc.ABC):
    """A listing of images with random access; one's own subclass works everywhere a spec does.

    A subclass must pickle (workers get a copy). `__getitem__` may raise anything: the image counts
    as unreadable. An `OSError` with an `errno` alone, which speaks of the storage and not of the
    image, is tried again and then stops the run.

    Attributes:
      spec: the spec string that opens it.
      class_names: the names of labels 0, 1, ...; empty when there are none.
    """

    spec: str
    class_names: tuple[str, ...] = ()

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of images listed."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns the unique name of an image without reading it."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Reads and decodes one image."""

    def label(self, index: int) -> int:
        """Returns the label of an image, -1 for none; here by reading the image."""
        return self[index].label

    @functools.cached_property
    def content_hash(self) -> str:
        """What identifies the images in a record: 16 hex digits, equal for equal images anywhere.

        Here over the name, label, size and pixels of every image, which decodes all of them: a
        subclass of many images overrides this by what is known of them more cheaply.
        """
        digest = hashlib.sha256(repr(self.class_names).encode())
        for index in range(len(self)):
            digest.update(self.name(index).encode("utf-8", "surrogateescape") + b"\0")
            try:
                pixels, label, _ = read(self, index)
            except NOT_THE_IMAGE:
                raise
            except Exception as error:  # unreadable, as it is in batches
                digest.update(type(error).__name__.encode() + b"\0")
            else:
                digest.update(f"{label} {pixels.size}".encode() + np.asarray(pixels).tobytes())
        return digest.hexdigest()[:16]

    def fingerprints(self, indices: np.ndarray) -> list[bytes]:
        """What tells some images by their content, whatever they are called: 16 bytes each.

        Here of the pixels, which decodes them; of files of their bytes, so that a picture that was
        encoded anew is another one. An image that cannot be decoded is like none.
        """
        found = []
        for index in map(int, indices):
            try:
                pixels = read(self, index).pixels
            except NOT_THE_IMAGE:
                raise
            except Exception:  # unreadable, as it is in batches
                content = self.name(index).encode("utf-8", "surrogateescape")
            else:
                content = f"{pixels.size}".encode() + np.asarray(pixels).tobytes()
            found.append(hashlib.sha256(content).digest()[:16])
        return found


SOURCES: Registry[Callable[..., ImageSource]] = Registry("kind of images", "ur_jax.sources")
"""What opens images, by what stands before the colon of a spec; it gets what stands behind."""


def open_images(spec: str, *, data_dir: str | os.PathLike[str] | None = None) -> ImageSource:
    """Opens the images that a spec string names.

    Args:
      spec: `tfds:NAME/SPLIT` (NAME may carry a config and version, SPLIT a slice such as
        `train[:10%]`), `folder:PATH`, `demo`, or KIND:PLACE of another kind in `SOURCES`.
      data_dir: for `tfds:` only, where data sets are prepared, or one prepared directory itself;
        by default the environment variable TFDS_DATA_DIR, then tensorflow-datasets' own place.

    Returns:
      The source; those that ship never touch the network.

    Raises:
      UserError: for a malformed spec, an unknown data set or split, a data set that is not
        prepared, a missing folder or one without images.
    """
    if not isinstance(spec, str):
        raise UserError(f"Expected an image spec such as 'folder:./photos', got {shown(spec)}.")
    kind, _, place = spec.partition(":")
    if kind not in SOURCES:
        folder = os.path.expanduser(spec)
        hint = f"write folder:{spec}" if spec and os.path.isdir(folder) else "as in folder:./photos"
        raise UserError(f"{unknown_name(SOURCES.kind, kind, SOURCES)} In {spec!r}: {hint}.")
    opened = SOURCES[kind]
    takes_folder = data_dir is not None and "data_dir" in inspect.signature(opened).parameters
    return opened(place, data_dir=data_dir) if takes_folder else opened(place)


def read(source: ImageSource, index: int) -> Example:
    """Reads one image, again if its storage reports a fault.

    Raises:
      StorageError: if that does not pass.
      Exception: whatever else the source raises, of an image that does not decode.
    """
    return retried(lambda: source[index], f"{source.name(index)} of {source.spec!r}")
