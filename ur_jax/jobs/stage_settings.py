"""Settings of the benchmark's stages that are groups of flags of their own."""

from __future__ import annotations

import dataclasses

from ur_jax.certify import CenterConfig, RandomizedConfig
from ur_jax.certify.joint import STREAMS
from ur_jax.checks import check_whole
from ur_jax.errors import unknown_name
from ur_jax.probes.linear import ProbeConfig
from ur_jax.typed import check_types


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """How the probes are trained."""

    num_images: int | None = None
    """Evenly spaced subset of the training images; all by default."""
    num_test_images: int | None = None
    """Evenly spaced subset of the test images; all by default."""
    cached: bool = False
    """Encode the training images once and train on the features."""
    num_draws: int = 1
    """Of --probe.cached: draws of crops and noise of each image."""
    augment: bool = True
    """Train on random crops and flips."""
    training: ProbeConfig = ProbeConfig()

    def __post_init__(self):
        check_types(self)
        check_whole(self, "num_images", "num_test_images", optional=True)
        check_whole(self, "num_draws")


@dataclasses.dataclass(frozen=True)
class CertificateSettings:
    """How certificates are computed."""

    num_images: int = 200
    """Evenly spaced subset of the test images."""
    num_center_images: int | None = None
    """The same of center smoothing; --certificates.num-images by default."""
    center: CenterConfig = CenterConfig(bound="hoeffding")
    randomized: RandomizedConfig = RandomizedConfig()
    streams: tuple[str, ...] = ()
    """Other smoothed encoders to certify: geometric_median, mean, cosine, neighbour."""

    def __post_init__(self):
        check_types(self)
        check_whole(self, "num_images")
        check_whole(self, "num_center_images", optional=True)
        for name in self.streams:
            if name not in STREAMS:
                raise unknown_name("certificate of a stream", name, STREAMS)
