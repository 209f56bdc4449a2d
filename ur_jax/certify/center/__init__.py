"""Center smoothing: settings, certificate, sampling with a fixed or an adaptive number."""

from ur_jax.certify.center.certificate import CenterCertificate, eps_out_from_counts
from ur_jax.certify.center.config import CenterConfig
from ur_jax.certify.center.smoothing import center_smoothing
from ur_jax.certify.center.table import KIND

__all__ = ["CenterCertificate", "CenterConfig", "KIND", "center_smoothing", "eps_out_from_counts"]
