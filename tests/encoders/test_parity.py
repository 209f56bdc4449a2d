"""Every published encoder gives the reference implementation's numbers, from its file's layout."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_rules
from published_files import LAYOUTS, VARIANTS

from ur_jax.encoders import loading, mapping
from ur_jax.encoders.networks.network import NetworkFn
from ur_jax.encoders.zoo import ENCODERS

_VISION_TRANSFORMERS = ("mae", "mocov3")


def _published(layout: dict) -> tuple[dict, dict]:
    """The contents of a synthetic file in a published layout, and its tensors."""
    groups = {name: reference_rules.state_dict(layout, name) for name in layout["tensors"]}

    def fill(node):
        if isinstance(node, dict) and "$tensors" in node:
            return groups[node["$tensors"]]
        return {k: fill(v) for k, v in node.items()} if isinstance(node, dict) else node

    return fill(layout["container"]), {k: v for group in groups.values() for k, v in group.items()}


@pytest.fixture(scope="module")
def published(golden_dir):
    """Reads a layout: published("mocov2") -> (spec, contents, tensors)."""

    def read(name):
        layout = json.loads((golden_dir / f"{name}.layout.json").read_text())
        return ENCODERS[VARIANTS.get(name, name)], *_published(layout)

    return read


@dataclasses.dataclass(frozen=True)
class _Both:
    """The representation of a network and its features side by side, of one forward pass."""

    apply_fn: NetworkFn
    features: str

    def __call__(self, variables, images):
        found = self.apply_fn.network.apply(variables, images)
        return jnp.concatenate([found[self.apply_fn.representation], found[self.features]], 1)


@functools.partial(jax.jit, static_argnames="features")
def _outputs(encoder, images, *, features):
    """Representation, features and input gradient of sum((f(x) - 1)^2), in one compilation."""
    both = encoder.replace(apply_fn=_Both(encoder.apply_fn, features))
    parts = lambda images: jnp.split(both(images), [encoder.dimension], 1)
    representation, pulled_back, features = jax.vjp(parts, images, has_aux=True)
    return representation, features, *pulled_back(2 * (representation - 1))


def _error(actual, expected):
    """Largest over the images of max|a - b| / max|b|."""
    return float((abs(actual - expected).max(1) / abs(expected).max(1)).max())


def _parity_errors(spec, mapped, reference, fold):
    """{what: error relative to the reference}, as the suggested tolerances measure it."""
    encoder = loading.make_encoder(spec, mapped.variables, mapped.config, fold=fold)
    images = reference_rules.images(*spec.input_size)
    outputs = _outputs(encoder, images, features=spec.features)
    representation, features, gradient = map(np.asarray, outputs)
    if spec.name == "mae":  # its probe has a BatchNorm, here at its initial statistics
        features = features / np.sqrt(1 + 1e-6)
    gradient = gradient.transpose(0, 3, 1, 2)
    norms = np.linalg.norm(gradient.reshape(len(images), -1), axis=1)
    sample = gradient.ravel()[reference["input_gradient_index"]]
    expected = reference["input_gradient_sample"]
    return {
        "representation": _error(representation, reference["representation"]),
        "features": _error(features, reference["features"]),
        "gradient L2": float(abs(norms / reference["input_gradient_l2"] - 1).max()),
        "gradient sample": float(abs(sample - expected).max() / abs(expected).max()),
    }


def _check(errors, layout):
    gradient = (2e-5, 2e-5) if layout in _VISION_TRANSFORMERS else (1e-3, 2e-2)
    tolerances = dict(zip(errors, (2e-5, 2e-5, *gradient), strict=True))
    print(layout, {what: f"{error:.1e} of {tolerances[what]:g}" for what, error in errors.items()})
    assert all(error <= tolerances[what] for what, error in errors.items()), errors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_parity(layout, published, golden):
    spec, contents, tensors = published(layout)
    mapped = mapping.map_tensors(tensors, spec, contents)
    _check(_parity_errors(spec, mapped, golden(f"{layout}.npz"), fold=True), layout)


def test_parts_that_training_goes_on_from(published):
    """MoCo v3's file holds its predictor and momentum encoder; MoCo v2's holds neither."""
    spec, _, tensors = published("mocov3")
    parts = mapping.map_tensors(tensors, spec).parts
    assert set(parts) == {"momentum", "predictor"}
    for ours, theirs in (
        (parts["predictor"]["params"]["layer1"]["dense"]["kernel"].T, "predictor.0.weight"),
        (parts["predictor"]["batch_stats"]["layer2"]["norm"]["var"], "predictor.4.running_var"),
        (parts["momentum"]["params"]["backbone"]["patch_bias"],
         "momentum_encoder.patch_embed.proj.bias"),
    ):  # fmt: skip
        np.testing.assert_array_equal(ours, tensors[f"module.{theirs}"])
    spec, _, tensors = published("mocov2")
    assert mapping.map_tensors(tensors, spec).parts == {}


def test_golden_parity_with_batch_norm_apart(published, golden):
    """BatchNorm unfolded meets the same tolerances, so that both forms agree."""
    spec, contents, tensors = published("mocov2")
    mapped = mapping.map_tensors(tensors, spec, contents)
    _check(_parity_errors(spec, mapped, golden("mocov2.npz"), fold=False), "mocov2")
