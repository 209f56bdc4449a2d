"""Certificates by noise: center smoothing for encoders, randomized smoothing for classifiers.

    certificate = certify(encoder, image, key, config=CenterConfig(bound="union"))
    certificate.eps_out

Samples are drawn and counted on the devices (`sampling`, `sequential`); bounds are
float64 on the host (`ur_jax.stats`). `center_smoothing` and `randomized_smoothing` take many images
at once. `CERTIFICATES` has every kind by name; a further one is a file of its own, see `registry`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from ur_jax.certify.center import (
    CenterCertificate,
    CenterConfig,
    center_smoothing,
    eps_out_from_counts,
)
from ur_jax.certify.denoised import denoised
from ur_jax.certify.inputs import check_classifier, check_image
from ur_jax.certify.joint import (
    CosineCertificate,
    CosineConfig,
    Directions,
    GeometricMedianCertificate,
    GeometricMedianConfig,
    MeanCertificate,
    MeanConfig,
    NeighbourCertificate,
    NeighbourConfig,
    certify_stream,
    clip_ball,
    directions_of,
    part_of,
    smoothed,
)
from ur_jax.certify.randomized import (
    Prediction,
    RadiusCertificate,
    RandomizedConfig,
    average_certified_radius,
    certified_accuracy,
    certified_radius,
    lower_bound,
    randomized_smoothing,
    smoothed_predictions,
)
from ur_jax.certify.registry import CERTIFICATES, CertificateKind, kind_of
from ur_jax.checks import check_type
from ur_jax.encoders.base import Encoder
from ur_jax.probes.classifier import Classifier, check_labels, nearest_image_classifier, num_classes
from ur_jax.types import Array, Image, Key

__all__ = [
    "smoothed",
    "part_of",
    "directions_of",
    "denoised",
    "clip_ball",
    "certify_stream",
    "NeighbourConfig",
    "NeighbourCertificate",
    "MeanConfig",
    "MeanCertificate",
    "GeometricMedianConfig",
    "GeometricMedianCertificate",
    "Directions",
    "CosineConfig",
    "CosineCertificate",
    "CERTIFICATES",
    "CertificateKind",
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
    "kind_of",
    "lower_bound",
    "nearest_image_classifier",
    "num_classes",
    "randomized_smoothing",
    "smoothed_predictions",
]


def certify(
    model: Encoder | Callable[[Array], Array],
    image: Image,
    key: Key,
    *,
    config: Any,
    index: int = 0,
) -> Any:
    """Certifies one image; the kind of settings says how.

    **Guarantee.** That of the certificate, of this one image over its own noise. The noise is a
    function of key, index and sample alone: images that are to fail independently of each other
    need an index each (or a key each). Center and randomized smoothing draw the same noise of one
    image under one key, and the certificates of a stream (geometric median, mean, cosine,
    neighbour) draw theirs, which is another: to fail independently, two of either group need a key
    each, or an index each.

    Args:
      model: an encoder for a `CenterConfig`, a classifier for a `RandomizedConfig`; for the
        settings of another entry of `CERTIFICATES`, what that smooths.
      image: [H,W,3] float32 in [0,1].
      key: typed key of the run.
      config: the settings of an entry of `CERTIFICATES`.
      index: index of the image, which keys its noise.

    Returns:
      The certificate: a `CenterCertificate`, a `RadiusCertificate`, or what that entry makes.

    Raises:
      UserError: for a model that cannot be certified so, settings of no certificate, a key of the
        old kind, or an image that is none: of another size, not in [0,1], or with NaN.
    """
    kind = CERTIFICATES[kind_of(config)]
    if kind.smooths == "encoder":
        check_type("the model of these settings", model, Encoder)
    elif kind.smooths == "directions":
        check_type("the model of these settings", model, Directions)
    else:
        check_classifier(model)
    encoder = model if isinstance(model, Encoder) else getattr(model, "encoder", None)
    check_image(image, encoder if kind.smooths != "classifier" else None)
    [(_, certificate)] = kind.certify(model, image[None], key, config=config, indices=[index])
    return certificate


class _Callable(types.ModuleType):
    """This room; called, it certifies many images by a job: `ur_jax.certify(encoder, images)`."""

    def __call__(self, *args: Any, **settings: Any):
        """See `ur_jax.calls.certify`."""
        from ur_jax import calls

        return calls.certify(*args, **settings)


sys.modules[__name__].__class__ = _Callable
