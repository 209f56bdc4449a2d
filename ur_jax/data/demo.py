"""The images that ship: crops of photographs inside scikit-image's package."""

from __future__ import annotations

import functools
from pathlib import Path

import skimage
from PIL import Image

from ur_jax.data.identity import hash_files
from ur_jax.data.pixels import decode
from ur_jax.data.sources import SOURCES, Example, ImageSource
from ur_jax.errors import UserError, shown

_PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
_CROPS = 64  # of each photograph


@SOURCES.register("demo")
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
    class_names = tuple(_PHOTOGRAPHS)

    def __init__(self, place: str = ""):
        if not isinstance(place, str) or place:
            raise UserError(
                f"Malformed image spec: expected demo alone, got behind it {shown(place)}."
            )

    def __len__(self) -> int:
        return _CROPS * len(_PHOTOGRAPHS)

    def name(self, index: int) -> str:
        return f"{self.class_names[index // _CROPS]}/{index % _CROPS:02d}"

    def label(self, index: int) -> int:
        return index // _CROPS

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"Expected an index in [0, {len(self)}), got {index}.")
        label, crop = divmod(index, _CROPS)
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

    @functools.cached_property
    def content_hash(self) -> str:
        """16 hex digits over the photographs' files, of which the crops follow."""
        return hash_files(_folder(), list(_PHOTOGRAPHS.values()), key="demo")


def _folder() -> Path:
    """Where the photographs are."""
    return Path(skimage.__file__).parent / "data"


@functools.cache
def _photograph(name: str) -> Image.Image:
    """Returns a demo photograph, decoded once per process (17 MB for all)."""
    with open(_folder() / _PHOTOGRAPHS[name], "rb") as file:
        return decode(file)
