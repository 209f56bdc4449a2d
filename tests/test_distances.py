"""Distances against float64 NumPy, at the points where float32 or a gradient could go wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax import distances as dist


def distance_twin(a, b, divergence):
    """The definition in float64; broadcasts."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if divergence == "cosine":
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return 1.0 - np.sum(a * b, axis=-1) / norms
    return np.linalg.norm(a - b, ord={"l1": 1, "l2": 2, "linf": np.inf}[divergence], axis=-1)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("divergence", dist.DIVERGENCES)
def test_distance_is_the_definition(divergence):
    a, b = normal(0, 5, 7, 40), normal(1, 5, 7, 40)
    expected = distance_twin(a, b, divergence)
    result = dist.distance(a, b, divergence=divergence)
    np.testing.assert_allclose(result, expected, rtol=2e-6)
    looped = jax.vmap(lambda a, b: dist.distance(a, b, divergence=divergence))(a, b)
    np.testing.assert_allclose(looped, expected, rtol=2e-6)
    np.testing.assert_allclose(dist.distance(b, a, divergence=divergence), result, rtol=1e-6)


def test_all_distances_are_the_four_of_an_attack_history():
    a, b = normal(0, 6, 20), normal(1, 6, 20)
    result = dist.all_distances(a, b)
    for name in ("l1", "l2", "linf"):
        np.testing.assert_allclose(getattr(result, name), distance_twin(a, b, name), rtol=2e-6)
    similarity = 1.0 - distance_twin(a, b, "cosine")
    np.testing.assert_allclose(result.cosine_similarity, similarity, atol=1e-6)


@pytest.mark.parametrize("divergence", dist.DIVERGENCES)
def test_equal_rows_are_at_zero_with_a_finite_subgradient(divergence):
    a = normal(0, 4, 50) * 100
    assert np.all(dist.distance(a, a, divergence=divergence) <= (divergence == "cosine") * 1e-13)
    gradient = jax.grad(lambda x: jnp.sum(dist.distance(x, a, divergence=divergence)))(a)
    dual_norm = {"l1": np.inf, "linf": 1, "l2": 2, "cosine": 2}[divergence]
    largest = {"l1": 1.0, "linf": 1.0 + 1e-6, "l2": 0.0, "cosine": 1e-9}[divergence]
    assert np.all(np.linalg.norm(gradient, ord=dual_norm, axis=-1) <= largest)


@pytest.mark.parametrize("divergence", dist.DIVERGENCES)
def test_gradient_by_finite_differences(divergence):
    a, b = normal(0, 9), normal(1, 9)
    gradient = jax.grad(lambda x: dist.distance(x, b, divergence=divergence))(a)
    step = 1e-6 * np.eye(9)
    rise = distance_twin(a + step, b, divergence) - distance_twin(a - step, b, divergence)
    np.testing.assert_allclose(gradient, rise / 2e-6, atol=1e-5)


def test_small_cosine_distances_do_not_cancel():
    a = normal(0, 3, 64)
    b = a + 1e-4 * normal(1, 3, 64)
    result = dist.distance(a, b, divergence="cosine")
    np.testing.assert_allclose(result, distance_twin(a, b, "cosine"), rtol=2e-3)
    assert np.all(result < 1e-7)  # below the spacing of float32 at 1


def test_a_zero_vector_is_orthogonal_to_others_and_equal_to_itself():
    rows = np.stack([np.zeros(8, np.float32), np.ones(8, np.float32), -np.ones(8, np.float32)])
    pairs = dist.pairwise_distances(rows, rows, divergence="cosine")
    np.testing.assert_allclose(pairs, [[0, 1, 1], [1, 0, 2], [1, 2, 0]], atol=1e-6)
    one_by_one = dist.distance(rows[[0, 0, 1]], rows[[0, 1, 2]], divergence="cosine")
    np.testing.assert_allclose(one_by_one, [0, 1, 2], atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(dist.distance(x, rows, divergence="cosine")))(rows)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("divergence", dist.DIVERGENCES)
def test_nan_stays_nan(divergence):
    a, b = normal(0, 20, 40), normal(1, 20, 40)
    a[1, 2] = np.nan
    expected = np.arange(20) == 1
    np.testing.assert_array_equal(np.isnan(dist.distance(a, b, divergence=divergence)), expected)
    pairs = dist.pairwise_distances(a, b, divergence=divergence)
    np.testing.assert_array_equal(np.isnan(pairs), np.tile(expected[:, None], 20))


@pytest.mark.parametrize("divergence", dist.DIVERGENCES)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_pairwise_is_the_definition(divergence, offset):
    """Also with a common offset a hundred times the spread, close pairs and equal rows."""
    a, b = normal(0, 20, 40) + np.float32(offset), normal(1, 20, 40) + np.float32(offset)
    b[3], b[4] = a[0], a[1] + np.float32(1e-3)
    expected = distance_twin(a[:, None], b[None], divergence)
    result = dist.pairwise_distances(a, b, divergence=divergence)
    if divergence == "cosine" and offset:  # unit vectors are known to 6e-8, distances are 1e-5
        np.testing.assert_allclose(result, expected, rtol=1e-2, atol=1e-9)
    else:
        np.testing.assert_allclose(result, expected, rtol=2e-4, atol=1e-9)
    assert result[0, 3] <= (divergence == "cosine") * 1e-13
    np.testing.assert_allclose(
        dist.pairwise_distances(b, a, divergence=divergence), result.T, rtol=1e-2, atol=1e-9
    )
    within = dist.pairwise_distances(a, divergence=divergence)
    assert not np.any(np.diag(within))
    np.testing.assert_allclose(
        within, dist.pairwise_distances(a, a, divergence=divergence), rtol=1e-2, atol=1e-9
    )


def test_pairwise_of_one_row_and_of_equal_rows():
    row = normal(0, 1, 40)
    np.testing.assert_array_equal(dist.pairwise_distances(row), [[0.0]])
    equal = np.repeat(row, 20, 0)
    np.testing.assert_array_equal(dist.pairwise_distances(equal), np.zeros((20, 20)))


@pytest.mark.parametrize("kind", ["normal", "relu", "offset", "heavy"])
@pytest.mark.parametrize("dimension", [3, 100, 2048])
def test_product_stays_within_its_error_estimate(kind, dimension):
    a, b = normal(0, 60, dimension), normal(1, 70, dimension)
    transform = {
        "normal": lambda x: x,
        "relu": lambda x: np.maximum(x, 0),
        "offset": lambda x: x + np.float32(10),
        "heavy": lambda x: x**5,
    }[kind]
    a, b = transform(a), transform(b)
    squared, bound = jax.jit(dist.squared_l2_by_product)(a, b)
    error = np.abs(squared - distance_twin(a[:, None], b[None], "l2") ** 2)
    assert np.all(error <= bound)


def test_errors_that_all_go_one_way_exceed_the_estimate():
    """So it is no bound: rows of one value each, at D = 2048."""
    a, b = (np.repeat(normal(seed, 60, 1), 2048, axis=1) for seed in (0, 1))
    squared, estimate = jax.jit(dist.squared_l2_by_product)(a, b)
    error = np.abs(squared - distance_twin(a[:, None], b[None], "l2") ** 2)
    assert np.max(error / estimate) < 41
    for name in ("squared_l2_by_product", "relative_rounding"):
        assert "no bound" in " ".join(getattr(dist, name).__doc__.split())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e19, 1e30])
def test_cosine_does_not_depend_on_the_scale(scale):
    a, b = normal(0, 9, 40), normal(1, 9, 40)
    b[3] = 0.0
    expected = dist.distance(a, b, divergence="cosine")
    scaled = dist.distance(a * np.float32(scale), b * np.float32(scale), divergence="cosine")
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)
    similarity = dist.all_distances(a * np.float32(scale), b * np.float32(scale)).cosine_similarity
    assert np.all(np.asarray(similarity) < 0.9)


def test_error_estimate_stays_small_under_a_common_offset():
    a, b = normal(0, 20, 40) + np.float32(300), normal(1, 20, 40) + np.float32(300)
    squared, bound = dist.squared_l2_by_product(a, b)
    assert np.all(bound < 1e-3 * squared)


@pytest.mark.parametrize("divergence", ["l1", "l2"])
def test_pairwise_needs_no_memory_of_pairs_times_dimension(divergence):
    shape = jax.ShapeDtypeStruct((128, 2048), jnp.float32)
    compiled = dist._pairwise_distances.lower(shape, shape, divergence=divergence).compile()
    pairs_times_dimension = 128 * 128 * 2048 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < pairs_times_dimension / 10


def test_for_flagged_columns_visits_each_flagged_column_once():
    flags = np.zeros((3, 7), bool)
    flags[[0, 2, 1], [1, 1, 6]] = True
    visit = lambda column, count: count.at[column].add(1)
    result = jax.jit(lambda f: dist.for_flagged_columns(f, visit, jnp.zeros(7, jnp.int32)))(flags)
    np.testing.assert_array_equal(result, flags.any(axis=0))


def test_bad_input_is_named():
    a = normal(0, 2, 3)
    with pytest.raises(ValueError, match="divergence 'cosin'; did you mean 'cosine'"):
        dist.distance(a, a, divergence="cosin")
    with pytest.raises(ValueError, match="b to be a float32 array, got float64"):
        dist.distance(a, a.astype(np.float64))
    with pytest.raises(ValueError, match="a to be a float32 array, got list"):
        dist.pairwise_distances([[0.0]])
    with pytest.raises(ValueError, match="equal shape"):
        dist.distance(a, a[:1])
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 2\)"):
        dist.pairwise_distances(a, a[:, :2])
    with pytest.raises(ValueError, match="none empty"):
        dist.pairwise_distances(a[:0])
