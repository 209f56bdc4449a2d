"""Names for the types that signatures share.

Shapes are those of `jaxtyping`: within a signature, one name is one number. The tests check them at
every call of a public function.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jaxtyping
import numpy as np
from jaxtyping import Float, Float32

Array = jax.Array
AnyArray = jax.Array | np.ndarray
Key = jax.Array
"""A typed PRNG key, `jax.random.key(seed)`."""
Keys = jaxtyping.Key[Array, ""] | jaxtyping.Key[Array, " batch"]
"""One typed key, or one for each image."""
PyTree = Any

Images = Float[AnyArray, "batch height width 3"]
OnDevice = Float32[Array, "batch height width 3"]
"""Images as a function gives them."""
Image = Float[AnyArray, "height width 3"]
PerImage = Float32[Array, " batch"]
Representations = Float32[AnyArray, "batch dim"]
Rows = Float32[AnyArray, "*rows dim"]
PerRow = Float32[Array, " *rows"]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve of one encoder in a figure of the report.

    Attributes:
      figure: name of the figure (and of its files); curves of one figure share the fields below.
      panel: heading of the panel within the figure.
      x_label, y_label: of the axes, with units.
      caption: what the figure shows and which direction is robust, a sentence or two.
      x, value: (N,) points.
      low, high: (N,) ends of the 95 % interval, if there is one.
      kind: "line", "step" (a share as a step function), "mark" (single points with their intervals,
        in a panel with lines) or "points" (a panel per encoder, with the share of them below 0).
      series: of a further curve of the encoder in a panel, what it is; "" of the main one.
    """

    figure: str
    panel: str
    x_label: str
    y_label: str
    caption: str
    x: np.ndarray
    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    kind: str = "line"
    series: str = ""


@dataclasses.dataclass(frozen=True)
class Values:
    """What a reported number sums up: one value per image (or pair) that it is over.

    Attributes:
      metric, divergence, eps, step, radius, images: of the number's `runs.Row`.
      index: (N,) index of each image, or (N,2) of each pair; encoders are compared where it agrees.
      value: (N,) the values; NaN where an image has none.
    """

    metric: str
    index: np.ndarray
    value: np.ndarray
    divergence: str | None = None
    eps: float | None = None
    step: int | None = None
    radius: float | None = None
    images: str | None = None
