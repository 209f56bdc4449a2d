"""A network is a backbone and a head; it returns each of its representations by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn

from ur_jax.errors import unknown_name
from ur_jax.types import Array, PyTree


class Network(nn.Module):
    """A backbone and, where one was published, its head.

    Attributes:
      backbone: maps images (B,H,W,3) to features (B,F).
      head: maps features to a dict of named representations.
    """

    backbone: nn.Module
    head: nn.Module | None = None

    def __call__(self, x: Array, train: bool = False) -> dict[str, Array]:
        """Returns {"backbone": features} and the head's representations, each (B,D)."""
        features = self.backbone(x, train)
        head = {} if self.head is None else self.head(features, train)
        return {"backbone": features, **head}


@dataclasses.dataclass(frozen=True)
class NetworkFn:
    """(params, normalised images) -> one representation of a network, in inference mode.

    Equal networks give equal functions, so that loading a second checkpoint compiles nothing anew.
    What only the other representations need is removed by the compiler.
    """

    network: nn.Module
    representation: str

    def __call__(self, variables: PyTree, images: Array) -> Array:
        representations: Any = self.network.apply(variables, images)
        if self.representation not in representations:
            raise unknown_name("representation", self.representation, representations)
        return representations[self.representation]
