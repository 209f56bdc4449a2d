"""Certificates by noise: center smoothing for encoders, randomized smoothing for classifiers.

    certificate = certify(encoder, image, key, config=CenterConfig(bound="union"))
    certificate.eps_out

Samples are drawn and counted on the devices (`sampling`); bounds are float64 on the host
(`bounds`, `adaptive`). `center_smoothing` and `randomized_smoothing` take many images at once.
"""

from __future__ import annotations

from collections.abc import Callable

from ur_jax.certify.center import CenterCertificate, center_smoothing, eps_out_from_counts
from ur_jax.certify.configs import CenterConfig, RandomizedConfig
from ur_jax.certify.randomized import (
    Prediction,
    RadiusCertificate,
    average_certified_radius,
    certified_accuracy,
    certified_radius,
    lower_bound,
    randomized_smoothing,
    smoothed_predictions,
)
from ur_jax.encoders.base import Encoder
from ur_jax.probes.classifier import Classifier, check_labels, nearest_image_classifier, num_classes
from ur_jax.types import Array, Key

__all__ = [
    "CenterCertificate",
    "CenterConfig",
    "Classifier",
    "Prediction",
    "RadiusCertificate",
    "RandomizedConfig",
    "average_certified_radius",
    "center_smoothing",
    "certified_accuracy",
    "certified_radius",
    "certify",
    "check_labels",
    "eps_out_from_counts",
    "lower_bound",
    "nearest_image_classifier",
    "num_classes",
    "randomized_smoothing",
    "smoothed_predictions",
]


def certify(
    model: Encoder | Callable[[Array], Array],
    image: Array,
    key: Key,
    *,
    config: CenterConfig | RandomizedConfig,
    index: int = 0,
) -> CenterCertificate | RadiusCertificate:
    """Certifies one image; the kind of configuration says how.

    Args:
      model: an encoder for a `CenterConfig`, a classifier for a `RandomizedConfig`.
      image: [H,W,3] float32 in [0,1].
      key: typed key of the run.
      config: the settings, which also document the guarantee.
      index: index of the image, which keys its noise.

    Returns:
      The certificate.
    """
    run = center_smoothing if isinstance(config, CenterConfig) else randomized_smoothing
    [(_, certificate)] = run(model, image[None], key, config=config, indices=[index])
    return certificate
