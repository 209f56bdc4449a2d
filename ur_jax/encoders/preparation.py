"""How an image file becomes an encoder's input, by name.

| name | what it does |
| --- | --- |
| `resize` | to the input size, whatever the aspect ratio |
| `resize_crop` | the shorter side to 256/224 of the input, then the centre cropped |
| `resize-FILTER` | as `resize`, by another of Pillow's filters |
| `shorter-N-FILTER` | the shorter side to N pixels, then the centre of the input size cropped |
| `shorter-N-FILTER-floor` | the same; an odd margin is one pixel less at the top and left |

FILTER is bilinear (what is used without one), bicubic, lanczos or nearest, each antialiased as
Pillow does. torchvision and timm round an odd margin half to even, transformers down.
"""

from __future__ import annotations

import dataclasses
import re

from ur_jax.checks import check_type
from ur_jax.errors import unknown_name

NAMED = ("resize", "resize_crop")
FILTERS = ("bilinear", "bicubic", "lanczos", "nearest")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What a name stands for.

    Attributes:
      shorter: pixels of the shorter side before the crop; None to bring the image to the input size
        itself; 0 for 256/224 of the input.
      filter: one of `FILTERS`.
      floor: whether an odd margin of the crop is rounded down, not half to even.
    """

    shorter: int | None = None
    filter: str = "bilinear"
    floor: bool = False

    @property
    def name(self) -> str:
        """Its name."""
        if self.shorter is None:
            return "resize" if self.filter == "bilinear" else f"resize-{self.filter}"
        if self.shorter == 0:
            return "resize_crop"
        return f"shorter-{self.shorter}-{self.filter}{'-floor' * self.floor}"


def parse_preparation(name: str) -> Preparation:
    """What the name of a preparation stands for.

    Raises:
      UserError: for a name that is none.
    """
    check_type("preparation", name, str)
    if name == "resize_crop":
        return Preparation(0)
    if found := re.fullmatch(rf"resize(?:-({'|'.join(FILTERS)}))?", name):
        return Preparation(None, found[1] or "bilinear")
    if found := re.fullmatch(rf"shorter-(\d{{1,5}})-({'|'.join(FILTERS)})(-floor)?", name):
        if shorter := int(found[1]):
            return Preparation(shorter, found[2], found[3] is not None)
    valid = (*NAMED, *(f"resize-{f}" for f in FILTERS[1:]), "shorter-256-bicubic")
    raise unknown_name("preparation", name, valid)
