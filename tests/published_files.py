"""Published files of a tiny encoder, and the layouts of the real ones."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import numpy as np

from ur_jax.encoders.networks.heads import LinearHead
from ur_jax.encoders.networks.layers import ConvNorm, global_average
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.encoders.zoo.rules import conv_norm_rules, dense_rules
from ur_jax.encoders.zoo.spec import TrainingPart

# SimCLR v2's selective kernels are another layout of the same encoder.
VARIANTS = {"simclrv2_sk1": "simclrv2"}
_PUBLISHED = [name for name, spec in ENCODERS.items() if spec.rules]
LAYOUTS = _PUBLISHED + [layout for layout, name in VARIANTS.items() if name in ENCODERS]


class _Backbone(nn.Module):
    folded: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        return global_average(ConvNorm(4, 3, folded=self.folded, name="stem")(x, train))


def _network(folded=False):
    return Network(_Backbone(folded), LinearHead(5))


_RULES = (*conv_norm_rules("conv1", "bn1", "backbone/stem"), *dense_rules("fc", "head/fc"))
TINY = dataclasses.replace(
    ENCODERS["mocov2"],
    name="tiny",
    network=_network,
    rules=_RULES,
    parts=(TrainingPart("momentum", "module.encoder_k.", _network, _RULES),),
    paper="projection",
    input_size=(8, 8),
)
_SHAPES = {
    "conv1.weight": (4, 3, 3, 3),
    "bn1.weight": (4,),
    "bn1.bias": (4,),
    "bn1.running_mean": (4,),
    "bn1.running_var": (4,),
    "fc.weight": (5, 4),
    "fc.bias": (5,),
}


def tensors(prefix="module.encoder_q."):
    """A published file of the tiny encoder, with what its authors left in it."""
    rng = np.random.default_rng(0)
    arrays = {k: rng.uniform(0.5, 1.5, s).astype(np.float32) for k, s in _SHAPES.items()}
    arrays["bn1.num_batches_tracked"] = np.int64(7)
    return {prefix + k: np.asarray(v) for k, v in arrays.items()}


def save_torch(path, arrays, legacy=False, **entries):
    """Writes arrays as torch.save of {"state_dict": ..., **entries}."""
    import torch

    group = {k: torch.from_numpy(v.copy()) for k, v in arrays.items()}
    contents = {"state_dict": group, "epoch": 3, **entries}
    torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    return path
