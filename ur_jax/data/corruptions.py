"""Corruptions of 8-bit images that the probes train and are tested on: low-pass, Gaussian noise.

One of one's own is one file, `--plugin inverted.py --kind inverted`:

    @corruption("inverted")
    def inverted(view, rng, config):
        return 255 - view

In float64 on the host, so that the bytes are those of the reference pipeline. The noise of a
certificate is another: floating point, at the encoder's input size, see
`ur_jax.certify.sampling.noisy_samples`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from ur_jax.checks import check_flag, check_number, check_type
from ur_jax.data.reading import CorruptionError
from ur_jax.errors import UserError, unknown_name
from ur_jax.registry import Registry

_PAPER_SIZE = 224


@dataclasses.dataclass(frozen=True)
class ViewConfig:
    """The images of a probe; the defaults are the paper's.

    Attributes:
      kind: "standard", "noisy" (Gaussian noise), "low_pass" (a disc of frequencies), or another of
        `CORRUPTIONS`.
      sigma: of the noise, on the scale [0,1], > 0.
      radius: of the disc at 224 pixels, > 0; it scales with the height of other sizes.
      augment: train on random crops and flips rather than on the images as a test sees them.

    Raises:
      UserError: for an unknown kind or a value out of range.
    """

    kind: str = "standard"
    sigma: float = 0.25
    radius: float = 50.0
    augment: bool = True

    def __post_init__(self):
        check_type("kind", self.kind, str)
        if self.kind not in CORRUPTIONS:
            raise unknown_name(CORRUPTIONS.kind, self.kind, CORRUPTIONS)
        check_number(self, "sigma", "radius", above=0.0)
        check_flag(self, "augment")

    @property
    def is_random(self) -> bool:
        """Whether a training image is another one each time it is drawn."""
        return self.augment or CORRUPTIONS[self.kind].is_random


@dataclasses.dataclass(frozen=True)
class Corruption:
    """What befalls the images of a probe.

    Attributes:
      apply: a view (H,W,3) uint8, the generator of all that is random about it, and the settings ->
        (H,W,3) uint8.
      is_random: whether it draws from the generator.
    """

    apply: Callable[[np.ndarray, np.random.Generator, ViewConfig], np.ndarray]
    is_random: bool = False

    def __call__(
        self, view: np.ndarray, rng: np.random.Generator, config: ViewConfig
    ) -> np.ndarray:
        """The corrupted view.

        Raises:
          CorruptionError: if `apply` fails, or gives something else than such an image.
        """
        try:
            corrupted = self.apply(view, rng, config)
        except Exception as error:  # not the image's fault, whatever it is
            raise CorruptionError(f"The corruption {config.kind!r} failed: {error!r}") from error
        if getattr(corrupted, "dtype", None) != np.uint8 or corrupted.shape != view.shape:
            got = getattr(corrupted, "dtype", type(corrupted).__name__)
            raise CorruptionError(
                f"Expected of the corruption {config.kind!r} an array {view.shape} of uint8, got "
                f"{np.shape(corrupted)} of {got}."
            )
        return corrupted


CORRUPTIONS: Registry[Corruption] = Registry("kind of probe", "ur_jax.corruptions")
"""Every kind of images that a probe can be trained and tested on."""


def corruption(name: str, *, is_random: bool = False):
    """Decorates what a `Corruption` applies, and adds it to `CORRUPTIONS`."""

    def add(apply):
        CORRUPTIONS.register(name, Corruption(apply, is_random))
        return apply

    return add


@corruption("standard")
def _standard(view: np.ndarray, rng: np.random.Generator, config: ViewConfig) -> np.ndarray:
    """The view as it is."""
    return view


@corruption("noisy", is_random=True)
def _noisy(view: np.ndarray, rng: np.random.Generator, config: ViewConfig) -> np.ndarray:
    """The view with Gaussian noise of `sigma`."""
    return add_noise(view, rng, sigma=config.sigma)


@corruption("low_pass")
def _low_pass(view: np.ndarray, rng: np.random.Generator, config: ViewConfig) -> np.ndarray:
    """The view without frequencies beyond `radius`, which is in proportion to its height."""
    return low_pass(view, radius=config.radius * view.shape[0] / _PAPER_SIZE)


def low_pass(image: np.ndarray, *, radius: float) -> np.ndarray:
    """Keeps the frequencies inside a disc: ky^2 + kx^2 < radius^2, strictly.

    Per channel: Fourier transform, disc, inverse transform, absolute value, clipped to [0,255],
    truncated. The absolute value folds undershoots back; truncation may lower a constant image
    by 1. Both are the reference's.

    Args:
      image: (H,W,3) uint8.
      radius: in cycles per image, > 0; the paper's is 50 at 224x224 pixels.

    Returns:
      (H,W,3) uint8.
    """
    _check_view(image)
    check_number(SimpleNamespace(radius=radius), "radius", above=0.0)
    height, width, _ = image.shape
    rows = np.fft.fftfreq(height, 1 / height)[:, None, None]
    columns = np.fft.rfftfreq(width, 1 / width)[:, None]
    spectrum = np.fft.rfft2(image.astype(np.float64), axes=(0, 1))
    spectrum[(rows**2 + columns**2 >= radius**2)[..., 0]] = 0.0
    filtered = np.abs(np.fft.irfft2(spectrum, s=(height, width), axes=(0, 1)))
    return np.clip(filtered, 0, 255).astype(np.uint8)


def add_noise(image: np.ndarray, rng: np.random.Generator, *, sigma: float) -> np.ndarray:
    """Adds Gaussian noise, independent by pixel and channel: clip(x + 255 sigma n, 0, 255).

    Truncated to whole values, which lowers the mean by half a value away from the limits.

    Args:
      image: (H,W,3) uint8.
      rng: draws n ~ N(0,1).
      sigma: standard deviation on the scale [0,1]; the paper's is 0.25.

    Returns:
      (H,W,3) uint8.
    """
    _check_view(image)
    check_type("rng", rng, np.random.Generator)
    check_number(SimpleNamespace(sigma=sigma), "sigma", least=0.0)
    noisy = image + 255.0 * sigma * rng.standard_normal(image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _check_view(image: np.ndarray) -> None:
    """Raises UserError unless an image is (H,W,3) uint8."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
        got = f"{np.shape(image)} of {getattr(image, 'dtype', type(image).__name__)}"
        raise UserError(f"Expected an image (H,W,3) of uint8, got {got}.")
