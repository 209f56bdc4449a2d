"""Corruptions of 8-bit images that the probes train and are tested on: low-pass, Gaussian noise.

In float64 on the host, so that the bytes are those of the reference pipeline. The noise of a
certificate is another: floating point, at the encoder's input size, see
`ur_jax.certify.sampling.noisy_samples`.
"""

from __future__ import annotations

import numpy as np


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
    noisy = image + 255.0 * sigma * rng.standard_normal(image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)
