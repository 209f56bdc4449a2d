"""Certificates of smoothed encoders from one stream of noise: geometric median, mean, cosine,
nearest direction. Each is a file of its own: settings, certificate, derivation and guarantee."""

from ur_jax.certify.joint import table as _table  # registers them  # noqa: F401
from ur_jax.certify.joint.attacked import MOVING, attacked_image, movement
from ur_jax.certify.joint.center import StreamCenter, StreamCenterConfig
from ur_jax.certify.joint.config import StreamConfig
from ur_jax.certify.joint.cosine import Cosine, CosineCertificate, CosineConfig, cosine_of
from ur_jax.certify.joint.geometric_median import (
    GeometricMedian,
    GeometricMedianCertificate,
    GeometricMedianConfig,
)
from ur_jax.certify.joint.mean import Mean, MeanCertificate, MeanConfig
from ur_jax.certify.joint.neighbour import (
    Directions,
    Neighbour,
    NeighbourCertificate,
    NeighbourConfig,
    directions_of,
)
from ur_jax.certify.joint.smoothed import STREAMS, clip_ball, part_of, smoothed
from ur_jax.certify.joint.stream import Part, certify_stream

__all__ = [
    "MOVING",
    "STREAMS",
    "attacked_image",
    "movement",
    "Cosine",
    "CosineCertificate",
    "CosineConfig",
    "Directions",
    "GeometricMedian",
    "GeometricMedianCertificate",
    "GeometricMedianConfig",
    "Mean",
    "MeanCertificate",
    "MeanConfig",
    "Neighbour",
    "NeighbourCertificate",
    "NeighbourConfig",
    "Part",
    "StreamCenter",
    "StreamCenterConfig",
    "StreamConfig",
    "certify_stream",
    "clip_ball",
    "cosine_of",
    "directions_of",
    "part_of",
    "smoothed",
]
