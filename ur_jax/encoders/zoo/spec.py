"""What there is to know about a published encoder: its network, its file, its tensors."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np

from ur_jax.encoders.networks.network import Network
from ur_jax.registry import Registry

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Rule(NamedTuple):
    r"""Where one kind of source tensor goes.

    Attributes:
      source: regular expression that the whole key, without the prefix, must match.
      destination: "/"-separated path below the network's variables, "params/..." or
        "batch_stats/...", with \1, \2, ... for the groups of `source`.
      layout: what happens to the tensor on its way: "same", "dense" ((out,in) -> (in,out)),
        "conv" (OIHW -> HWIO), or a function of the array.
    """

    source: str
    destination: str
    layout: str | Callable[[np.ndarray], np.ndarray] = "same"


class TrainingPart(NamedTuple):
    """A module that training keeps beside the encoder, such as a momentum encoder.

    Attributes:
      name: "momentum" or "predictor".
      prefix: what its keys in a published file start with.
      module: makes it unfolded, with the items of the encoder's `config`.
      rules: where each source tensor goes.
      input_size: shape of its input without the batch; None for images.
    """

    name: str
    prefix: str
    module: Callable[..., nn.Module]
    rules: tuple[Rule, ...]
    input_size: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class EncoderSpec:
    """One of the benchmarked encoders.

    Attributes:
      name: its name in the paper's code and in ours.
      title: the network in words, for tables.
      reference: the paper that published it.
      url: where its authors publish the file.
      file_name: the expected file name.
      licence: of the weights, where known.
      network: makes the flax module, called with `folded=` and the items of `config`.
      rules: where each source tensor goes.
      groups: the entries of the file that hold tensors, e.g. ("state_dict",); () for a bare file.
      prefix: what every used key starts with.
      ignored: regular expressions of whole keys (prefix included) that are known and not used.
      paper: the name of the output that the paper evaluates.
      features: the name of the output that the paper's linear probe reads.
      input_size: height and width.
      preparation: "resize" or "resize_crop".
      mean: per-channel mean.
      std: per-channel standard deviation.
      frozen: regular expressions of paths below the network's params that training leaves alone.
      parts: what a file may hold beside the encoder, for training to go on from.
      has_head: whether its head is there too, see `without_head`.
      config_fn: (file contents, {key: shape}) -> keyword arguments of `network` that the file
        itself decides, such as AMDIM's depth or SimCLR's width.
    """

    name: str
    title: str
    reference: str
    url: str
    file_name: str
    licence: str
    network: Callable[..., nn.Module]
    rules: tuple[Rule, ...]
    paper: str
    features: str = "backbone"
    groups: tuple[str, ...] = ("state_dict",)
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    input_size: tuple[int, int] = (224, 244)
    preparation: Literal["resize", "resize_crop"] = "resize"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    frozen: tuple[str, ...] = ()
    parts: tuple[TrainingPart, ...] = ()
    has_head: bool = True
    config_fn: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], dict[str, Any]] = (
        lambda contents, shapes: {}
    )

    def __repr__(self) -> str:
        head = "" if self.has_head else ", without its head"
        return f"EncoderSpec({self.name!r}: {self.title}, {self.reference}{head})"

    def without_head(self) -> EncoderSpec:
        """The same encoder where only its backbone is there; a head's tensors are let pass."""
        heads = tuple(rule for rule in self.rules if "/head/" in rule.destination)
        passed = tuple(re.escape(self.prefix) + rule.source for rule in heads)
        return dataclasses.replace(
            self,
            network=functools.partial(_backbone, self.network),
            rules=tuple(rule for rule in self.rules if rule not in heads),
            ignored=(*self.ignored, *passed),
            parts=(),
            has_head=False,
        )


def _backbone(network: Callable[..., nn.Module], **config: Any) -> Network:
    """The backbone of a network."""
    return Network(network(**config).backbone)


ENCODERS: Registry[EncoderSpec] = Registry("encoder", "ur_jax.encoders")
"""Every published encoder, by name; import it from `ur_jax.encoders.zoo`, which fills it."""


def register(spec: EncoderSpec) -> EncoderSpec:
    """Adds a published encoder to `ENCODERS`, under its own name; returns it."""
    return ENCODERS.register(spec.name, spec)
