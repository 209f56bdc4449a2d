"""Self-supervised losses, one value per image."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from ur_jax.types import Array


def normalize(x: Array) -> Array:
    """Divides the rows of `x` (B,D) by their l2 norm, at least 1e-12 as PyTorch has it."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def moco_logits(queries: Array, keys: Array, queue: Array, *, temperature: float) -> Array:
    """Logits of MoCo's dictionary look-up; the positive is column 0.

      logits[n] = [q_n . k_n, q_n . u_1, ..., q_n . u_K] / temperature

    Args:
      queries: (B,D) float32, rows of unit norm.
      keys: (B,D) float32, rows of unit norm; key n is the positive of query n.
      queue: (K,D) float32, rows of unit norm: the negatives.
      temperature: > 0.

    Returns:
      (B, 1+K) float32.

    Reference:
      He et al. 2020, "Momentum Contrast", equation 1.
    """
    positive = jnp.sum(queries * keys, axis=-1, keepdims=True)
    return jnp.concatenate([positive, queries @ queue.T], axis=1) / temperature


def info_nce(logits: Array, labels: Array) -> Array:
    """Cross-entropy (B,) of `logits` (B,C) with the positives' columns `labels` (B,) int32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def in_batch_info_nce(queries: Array, keys: Array, rows: Array, *, temperature: float) -> Array:
    """MoCo v3's contrastive loss, with the other keys of the batch as negatives.

      2 temperature * cross_entropy(q k^T / temperature, n)   for the query of row n

    Args:
      queries: (b,D) float32, any norm.
      keys: (B,D) float32, any norm.
      rows: (b,) int32 in [0,B), the key that is each query's positive.
      temperature: > 0.

    Returns:
      (b,) float32.

    Reference:
      Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers",
      algorithm 1.
    """
    logits = normalize(queries) @ normalize(keys).T / temperature
    return 2.0 * temperature * info_nce(logits, rows)
