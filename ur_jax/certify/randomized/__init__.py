"""Randomized smoothing: settings, certificate, sampling."""

from ur_jax.certify.randomized.certificate import (
    RadiusCertificate,
    average_certified_radius,
    certified_accuracy,
    certified_radius,
    lower_bound,
)
from ur_jax.certify.randomized.config import RandomizedConfig
from ur_jax.certify.randomized.smoothing import (
    Prediction,
    randomized_smoothing,
    smoothed_predictions,
)
from ur_jax.certify.randomized.table import KIND

__all__ = [
    "KIND",
    "Prediction",
    "RadiusCertificate",
    "RandomizedConfig",
    "average_certified_radius",
    "certified_accuracy",
    "certified_radius",
    "lower_bound",
    "randomized_smoothing",
    "smoothed_predictions",
]
