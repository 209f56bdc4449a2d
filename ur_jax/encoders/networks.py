"""A network is a backbone and a head; it returns each of its representations by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from ur_jax.encoders.layers import Dense
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


class MocoV2Head(nn.Module):
    """MoCo v2's two-layer MLP (Chen et al. 2020, arXiv:2003.04297).

    "projection" is the whole head. "skip_hidden" applies its last layer straight to the features:
    what the paper's code evaluates (departure 5).
    """

    hidden: int = 2048
    output: int = 128

    @nn.compact
    def __call__(self, features: Array, train: bool = False) -> dict[str, Array]:
        last = Dense(self.output, name="fc2")
        representations = {"projection": last(jax.nn.relu(Dense(self.hidden, name="fc0")(features)))}
        if features.shape[-1] == self.hidden:
            representations["skip_hidden"] = last(features)
        return representations


class LinearHead(nn.Module):
    """One linear layer, e.g. a supervised network's classifier; "projection" is its logits."""

    output: int = 1000

    @nn.compact
    def __call__(self, features: Array, train: bool = False) -> dict[str, Array]:
        return {"projection": Dense(self.output, name="fc")(features)}


@dataclasses.dataclass(frozen=True)
class NetworkFn:
    """(params, normalised images) -> one representation of a network, in inference mode.

    Equal networks give equal functions, so that loading a second checkpoint compiles nothing anew.
    What only the other representations need is removed by the compiler.
    """

    network: nn.Module
    representation: str

    def __call__(self, variables: PyTree, images: Array) -> Array:
        representations: Mapping[str, Any] = self.network.apply(variables, images)
        if self.representation not in representations:
            raise unknown_name("representation", self.representation, representations)
        return representations[self.representation]
