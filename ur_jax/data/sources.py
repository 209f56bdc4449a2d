"""Where images come from: the source interface, folders, and the demo photographs."""

from __future__ import annotations

import abc
import functools
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import skimage
from PIL import Image

from ur_jax.data.pixels import decode
from ur_jax.errors import UserError

# The files that torchvision's ImageFolder lists, so that the paper's subsets are ours.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_DEMO_PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
_DEMO_CROPS = 64  # of each photograph


class Example(NamedTuple):
    """One decoded image: RGB `pixels` of any size, `label` (-1 for none) and its unique `name`."""

    pixels: Image.Image
    label: int
    name: str


class ImageSource(abc.ABC):
    """A listing of images with random access; one's own subclass works everywhere a spec does.

    A subclass must pickle (workers get a copy) and may raise anything from `__getitem__`: such an
    image counts as unreadable.

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
    def listing_hash(self) -> str:
        """16 hex digits of the SHA-256 of all names in order: equal for an equal listing."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.name(index).encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()[:16]

    @property
    def content_hash(self) -> str:
        """What identifies the images in a record."""
        return self.listing_hash


class FolderSource(ImageSource):
    """Every image file under a folder, at any depth; first-level sub-folders are the classes.

    Sorted by class, then folder, then file name. An image outside any sub-folder has label -1.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.spec = f"folder:{path}"
        self._root = Path(path).expanduser()
        if not self._root.is_dir():
            raise UserError(
                f"{self.spec!r}: expected an existing folder, found "
                f"{'a file' if self._root.exists() else 'nothing'} at {self._root.absolute()}; "
                "give the folder that holds the images or their class folders."
            )
        names = []
        for folder, _, files in os.walk(self._root, followlinks=True):
            relative = Path(folder).relative_to(self._root).as_posix()
            prefix = "" if relative == "." else f"{relative}/"
            names += [prefix + file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
        if not names:
            raise UserError(
                f"{self.spec!r}: expected image files ({', '.join(IMAGE_SUFFIXES)}) under "
                f"{self._root.absolute()}, found none; check the path."
            )
        self._names = sorted(names, key=lambda n: (_first_level(n), *n.rpartition("/")[::2]))
        self.class_names = tuple(sorted({_first_level(n) for n in names} - {""}))
        self._labels = {name: label for label, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def __getitem__(self, index: int) -> Example:
        name = self._names[index]
        with open(self._root / name, "rb") as file:
            return Example(decode(file), self.label(index), name)

    def label(self, index: int) -> int:
        return self._labels.get(_first_level(self._names[index]), -1)


class DemoSource(ImageSource):
    """512 crops of eight photographs that scikit-image carries inside its own package.

    The eight are all its colour photographs of distinct scenes: a portrait, a cat, a cup, a
    motorcycle (of the stereo pair only the left), a rocket, a star field, an eye's retina and a
    stained tissue. Grey pictures, drawings, scanned text and test patterns are left out. Each gives
    64 square crops of 1/4 to 3/4 of its shorter side, so crops differ, though crops of one
    photograph may overlap; its label is the photograph. Boxes follow a low-discrepancy sequence.

    Reference: M. Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences" (2018), R3.
    """

    spec = "demo"
    class_names = tuple(_DEMO_PHOTOGRAPHS)

    def __len__(self) -> int:
        return _DEMO_CROPS * len(_DEMO_PHOTOGRAPHS)

    def name(self, index: int) -> str:
        return f"{self.class_names[index // _DEMO_CROPS]}/{index % _DEMO_CROPS:02d}"

    def label(self, index: int) -> int:
        return index // _DEMO_CROPS

    def __getitem__(self, index: int) -> Example:
        label, crop = divmod(index, _DEMO_CROPS)
        photograph = _photograph(self.class_names[label])
        # Additive recurrence: the reciprocal powers of the root of x^4 = x + 1, modulo 1.
        u, v, w = (
            (0.5 + (crop + 1) * step) % 1.0
            for step in (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)
        )
        side = int(min(photograph.size) * (0.25 + 0.5 * u))
        left = int((photograph.width - side + 1) * v)
        top = int((photograph.height - side + 1) * w)
        box = (left, top, left + side, top + side)
        return Example(photograph.crop(box), label, self.name(index))


def _first_level(name: str) -> str:
    """Returns the first folder of a relative path, or "" for a file outside any."""
    return name.partition("/")[0] if "/" in name else ""


@functools.cache
def _photograph(name: str) -> Image.Image:
    """Returns a demo photograph, decoded once per process (17 MB for all)."""
    path = Path(skimage.__file__).parent / "data" / _DEMO_PHOTOGRAPHS[name]
    with open(path, "rb") as file:
        return decode(file)
