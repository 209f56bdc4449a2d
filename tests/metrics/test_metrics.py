"""Every label-free metric against a NumPy float64 twin, on a user's own function.

The function is a random projection of the pixels; for the targeted and untargeted attacks on it
any images inside the ball will do, since the metrics only see representations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax import distances as dist
from ur_jax import metrics
from ur_jax.devices import data_mesh
from ur_jax.metrics import neighbours
from ur_jax.metrics import ranks as ranks_module

DIMENSION = 24
BLOCK = 64  # the tests share shapes, so that most of them share compiled programs


def project(images):
    """The user's own encoder: pixels [B, H, W, 3] -> [B, 24]."""
    pixels = np.prod(images.shape[1:])
    matrix = np.random.default_rng(7).standard_normal((pixels, DIMENSION)) / np.sqrt(pixels)
    return jnp.asarray(images.reshape(len(images), -1), jnp.float32) @ jnp.asarray(
        matrix, jnp.float32
    )


def scenario(num_images=203, num_attacked=30, eps=0.45):
    """Representations of clean images, and of attacked ones with their places among the clean."""
    rng = np.random.default_rng(0)
    images = rng.random((num_images, 6, 6, 3))
    own_index = np.sort(rng.choice(num_images, num_attacked, replace=False))
    attacked = np.clip(images[own_index] + rng.choice([-eps, eps], (num_attacked, 6, 6, 3)), 0, 1)
    bank = np.asarray(project(images))
    return np.asarray(project(attacked)), bank[own_index], bank, own_index


def distances_twin(a, b, divergence):
    """All pairs in float64 by the definition."""
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    if divergence == "cosine":
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return 1.0 - np.sum(a * b, axis=-1) / norms
    return np.linalg.norm(a - b, ord={"l1": 1, "l2": 2, "linf": np.inf}[divergence], axis=-1)


def ranks_twin(adversarial, clean, bank, own_index, divergence):
    """How many other images are strictly nearer, in float64."""
    nearer = distances_twin(adversarial, bank, divergence) < np.diag(
        distances_twin(adversarial, clean, divergence)
    ).reshape(-1, 1)
    nearer[np.arange(len(own_index))[own_index >= 0], own_index[own_index >= 0]] = False
    return nearer.sum(axis=1)


# The distance distribution and what is measured against it.


@pytest.mark.parametrize("divergence", dist.DIVERGENCES)
def test_distribution_of_one_batch_is_all_pairs(divergence):
    _, _, bank, _ = scenario()
    distribution = metrics.distance_distribution(bank, jax.random.key(0), divergence=divergence)
    first, second = np.triu_indices(len(bank), 1)
    pairs = np.sort(distances_twin(bank, bank, divergence)[first, second])
    np.testing.assert_allclose(distribution.distances, pairs, rtol=1e-4)
    np.testing.assert_allclose(distribution.median, np.median(pairs), rtol=1e-5)
    assert distribution.divergence == divergence


@pytest.mark.parametrize(("num_images", "sizes"), [(11, (4, 4, 3)), (9, (4, 4, 1))])
def test_pairs_are_those_within_shuffled_batches(num_images, sizes):
    """Image i at 2^i on a line, so that each distance names its pair."""
    line = jnp.asarray(2.0 ** np.arange(num_images), jnp.float32)[:, None]
    distribution = metrics.distance_distribution(line, jax.random.key(3), batch_size=4)
    pairs = {2.0**j - 2.0**i: (i, j) for j in range(num_images) for i in range(j)}
    neighbours = {i: {i} for i in range(num_images)}
    for i, j in (pairs[float(d)] for d in distribution.distances):
        neighbours[i].add(j)
        neighbours[j].add(i)
    batches = {frozenset(members) for members in neighbours.values()}
    assert sorted(map(len, batches), reverse=True) == list(sizes)
    assert sum(map(len, batches)) == num_images  # disjoint
    assert distribution.distances.shape == (sum(n * (n - 1) // 2 for n in sizes),)
    assert np.all(np.diff(distribution.distances) >= 0)


def test_shuffle_follows_the_key():
    line = jnp.asarray(2.0 ** np.arange(11), jnp.float32)[:, None]
    same, again, other = (
        metrics.distance_distribution(line, jax.random.key(seed), batch_size=4).distances
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(same, again)
    traced = jax.jit(lambda x, key: metrics.distance_distribution(x, key, batch_size=4).distances)
    np.testing.assert_array_equal(traced(line, jax.random.key(0)), same)
    assert not np.array_equal(same, other)


def test_universal_quantile_is_the_share_of_pairs_at_most_as_far():
    values = np.array([1.0, 2.0, 2.0, 5.0], np.float32)
    distribution = metrics.DistanceDistribution(jnp.asarray(values), "l2")
    d = np.array([[0.5, 1.0, 1.5], [2.0, 4.9, 9.0], [np.nan, np.inf, 0.0]], np.float32)
    expected = [[0, 0.25, 0.25], [0.75, 0.75, 1], [np.nan, 1, 0]]
    np.testing.assert_array_equal(metrics.universal_quantile(distribution, d), expected)
    assert distribution.median == 2.0


def test_nearest_level_is_the_reference_look_up():
    """The published look-up: float64 quantiles at 1,099 levels, then the nearest value."""
    rng = np.random.default_rng(0)
    values = np.sort(rng.gamma(9.0, size=30_000).astype(np.float32))
    distribution = metrics.DistanceDistribution(jnp.asarray(values), "l2")
    d = np.concatenate([rng.gamma(9.0, size=200), [0.0, 99.0]]).astype(np.float32)
    levels = np.append(np.logspace(-9, -3, 100, endpoint=False), np.linspace(0.001, 0.999, 999))
    stored = np.quantile(values.astype(np.float64), levels)
    expected = levels[np.argmin(np.abs(d[:, None] - stored), axis=1)]
    result = metrics.universal_quantile(distribution, d, nearest_level=True)
    # Where d lies within rounding of half way between two stored values either level is right.
    gaps = np.sort(np.abs(d[:, None] - stored), axis=1)[:, :2]
    clear = (gaps[:, 1] - gaps[:, 0] > 1e-5) | (d == 0) | (d == 99)
    assert clear.mean() > 0.9
    np.testing.assert_allclose(result[clear], expected[clear], rtol=1e-6)
    exact = metrics.universal_quantile(distribution, d)
    np.testing.assert_allclose(result, np.clip(exact, 0, 0.999), atol=1.1e-3)


def test_ratios():
    distribution = metrics.DistanceDistribution(jnp.asarray([1.0, 2.0, 4.0, 9.0]), "l2")
    d = jnp.asarray([3.0, 6.0])
    np.testing.assert_array_equal(metrics.normalised_distance(distribution, d), [1.0, 2.0])
    np.testing.assert_array_equal(metrics.relative_quantile(d, jnp.asarray([6.0, 4.0])), [0.5, 1.5])
    assert np.isnan(metrics.relative_quantile(jnp.zeros(1), jnp.zeros(1)))[0]


@pytest.mark.parametrize("divergence", dist.DIVERGENCES)
def test_margin_and_overlap(divergence):
    rng = np.random.default_rng(1)
    x, y, x_to_y, y_to_x = rng.standard_normal((4, 40, DIMENSION)).astype(np.float32)
    row = lambda a, b: np.diag(distances_twin(a, b, divergence))
    expected = (row(x, y_to_x) - row(x, x_to_y)) / row(x, y)
    margins = metrics.adversarial_margin(x, y, x_to_y, y_to_x, divergence=divergence)
    np.testing.assert_allclose(margins, expected, rtol=1e-4, atol=2e-6)
    overlap = metrics.overlap_risk(margins)
    np.testing.assert_array_equal(overlap, expected < 0)
    assert metrics.summarise("overlap_risk", overlap).value == np.mean(expected < 0)
    identical = metrics.adversarial_margin(x, x, x_to_y, y_to_x, divergence=divergence)
    with pytest.raises(ValueError, match="40 NaN of 40"):
        metrics.summarise("adversarial_margin", np.where(np.isfinite(identical), np.nan, identical))


# Ranks.


@pytest.mark.parametrize("divergence", dist.DIVERGENCES)
def test_ranks_on_one_and_eight_devices(divergence):
    """203 rows: uneven over the blocks and over the devices; some images outside the bank."""
    adversarial, clean, bank, own_index = scenario()
    own_index = np.where(np.arange(30) % 10 == 3, -1, own_index)
    expected = ranks_twin(adversarial, clean, bank, own_index, divergence)
    assert 0 < np.median(expected) < len(bank) / 2
    for mesh in (None, data_mesh()):
        result = metrics.neighbour_ranks(
            adversarial,
            clean,
            bank,
            own_index=own_index,
            divergence=divergence,
            block_size=BLOCK,
            mesh=mesh,
        )
        # Outside the bank the own image is a row like any other, but never nearer than itself.
        np.testing.assert_array_equal(result.rank, expected)
        np.testing.assert_array_equal(result.compared, 202 + (own_index < 0))


@pytest.mark.parametrize("block_size", [1, 100_000])
def test_ranks_with_any_block_size(block_size):
    adversarial, clean, bank, own_index = scenario()
    result = metrics.neighbour_ranks(
        adversarial, clean, bank, own_index=own_index, block_size=block_size
    )
    expected = ranks_twin(adversarial, clean, bank, own_index, "l2")
    np.testing.assert_array_equal(result.rank, expected)


def near_ties(divergence):
    """400 bank rows and the own ones, all equally far from their query but for rounding."""
    rng = np.random.default_rng(2)
    centre = rng.standard_normal(DIMENSION) + 3.0
    around = rng.standard_normal((400, DIMENSION))
    if divergence == "cosine":  # a cone around the centre
        around -= np.outer(around @ centre, centre) / (centre @ centre)
        around *= np.linalg.norm(centre) / np.linalg.norm(around, axis=1, keepdims=True)
    else:
        around /= np.linalg.norm(around, ord={"l1": 1, "l2": 2}[divergence], axis=1, keepdims=True)
    bank = (centre + around).astype(np.float32)
    own_index = np.arange(0, 390, 13)
    return np.tile(centre.astype(np.float32), (30, 1)), bank[own_index], bank, own_index


@pytest.mark.parametrize("divergence", ["l1", "l2", "cosine"])
def test_near_ties_do_not_depend_on_blocks_or_devices(divergence):
    adversarial, clean, bank, own_index = near_ties(divergence)
    first, *others = (
        metrics.neighbour_ranks(
            adversarial,
            clean,
            bank,
            own_index=own_index,
            divergence=divergence,
            block_size=block_size,
            mesh=mesh,
        ).rank
        for block_size, mesh in ((400, None), (BLOCK, None), (BLOCK, data_mesh()))
    )
    assert np.ptp(first) > 100  # rounding does decide
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("divergence", dist.DIVERGENCES)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_copies_of_the_own_image_are_not_nearer(divergence, offset):
    """Half the bank are copies; also with an offset at which a plain product loses everything."""
    adversarial, clean, bank, own_index = scenario()
    adversarial, bank = adversarial + np.float32(offset), bank + np.float32(offset)
    clean, copies = bank[own_index], np.repeat(bank[own_index[:7]], 29, axis=0)
    result = metrics.neighbour_ranks(
        adversarial,
        clean,
        np.concatenate([bank, copies]),
        own_index=own_index,
        divergence=divergence,
        block_size=BLOCK,
    )
    outside = np.full(30, -1)
    copied = ranks_twin(adversarial, clean, bank[own_index[:7]], outside, divergence)
    expected = ranks_twin(adversarial, clean, bank, own_index, divergence) + 29 * copied
    if divergence == "cosine" and offset:
        # Directions 1e-3 apart are known to 1e-7 each: single rows may change sides, copies not.
        assert np.all(np.abs(result.rank - expected) < 29)
    else:
        np.testing.assert_array_equal(result.rank, expected)


@pytest.mark.parametrize("divergence", dist.DIVERGENCES)
def test_an_attack_that_changed_nothing_has_rank_zero(divergence):
    _, _, bank, own_index = scenario()
    bank = np.concatenate([bank, bank, bank * np.float32(1 + 1e-6)]) + np.float32(50.0)
    clean = bank[own_index]
    for mesh in (None, data_mesh()):
        ranks = metrics.neighbour_ranks(
            clean,
            clean,
            bank,
            own_index=own_index,
            divergence=divergence,
            block_size=BLOCK,
            mesh=mesh,
        )
        assert not np.any(ranks.rank)


def test_a_collapsed_encoder_ties_everywhere():
    same = np.full((203, DIMENSION), 0.3, np.float32)
    ranks = metrics.neighbour_ranks(
        same[:30] + 1, same[:30], same, own_index=np.arange(30), block_size=BLOCK
    )
    assert not np.any(ranks.rank)


def test_breakaway_over_two_batches_and_the_published_departure():
    adversarial, clean, bank, own_index = scenario()
    ranks = metrics.neighbour_ranks(adversarial, clean, bank, own_index=own_index, block_size=BLOCK)
    counts = ranks_twin(adversarial, clean, bank, own_index, "l2")
    risk = metrics.breakaway_risk(ranks)
    np.testing.assert_allclose(risk, counts / 202, rtol=1e-6)
    np.testing.assert_allclose(metrics.summarise("breakaway_risk", risk).value, counts.mean() / 202)
    # Thirty images in batches of 16: the published code sums the last 14 only.
    departure = metrics.breakaway_risk(ranks, reference_batch_size=16)
    np.testing.assert_allclose(departure.mean(), counts[16:].sum() / (203 * 30), rtol=1e-6)
    assert departure.mean() < 0.7 * risk.mean()
    departure = metrics.breakaway_risk(ranks, reference_batch_size=15)
    np.testing.assert_allclose(departure.mean(), counts[15:].sum() / (203 * 30), rtol=1e-6)


def test_top_k_accuracy_is_membership_among_the_k_nearest():
    adversarial, clean, bank, own_index = scenario(eps=0.3)
    ranks = metrics.neighbour_ranks(adversarial, clean, bank, own_index=own_index, block_size=BLOCK)
    order = np.argsort(distances_twin(adversarial, bank, "l2"), axis=1)
    for k in (1, 5):
        hits = metrics.nearest_neighbour_hits(ranks, k=k)
        expected = np.any(order[:, :k] == own_index[:, None], axis=1)
        assert 0 < expected.mean() < 1
        np.testing.assert_array_equal(hits, expected)
        estimate = metrics.summarise(f"top_{k}_accuracy", hits)
        assert estimate.value == expected.mean() and estimate.n == 30


def test_blocks_in_any_order_and_what_the_compiled_program_leaves_out():
    adversarial, clean, bank, own_index = scenario()
    mesh = data_mesh()
    expected = ranks_twin(adversarial, clean, bank, own_index, "l2")
    state = metrics.init_ranks(adversarial, clean, own_index, mesh=mesh)
    for start in (128, 0, 192, 64):
        index = np.arange(start, start + BLOCK, dtype=np.int32)
        mask = index < 203
        state = metrics.update_ranks(state, bank[np.minimum(index, 202)], index, mask)
    result = metrics.finish_ranks(state)
    np.testing.assert_array_equal(result.rank, expected)
    np.testing.assert_array_equal(result.compared, np.full(30, 202))
    block = (bank[:BLOCK], np.arange(BLOCK, dtype=np.int32), np.ones(BLOCK, bool))
    compiled = ranks_module._count_block.lower(
        state.counts, state.queries, *block, divergence="l2", mesh=mesh
    ).compile()
    for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "callback"):
        assert word not in compiled.as_text()


def test_one_compilation_over_an_uneven_last_block():
    adversarial, clean, bank, own_index = scenario(203, 11)
    jitted = ranks_module._count_block, neighbours._nearest_in_block
    before = [fn._cache_size() for fn in jitted]
    metrics.neighbour_ranks(adversarial, clean, bank, own_index=own_index, block_size=48)
    metrics.nearest_neighbours(adversarial, bank, k=3, block_size=48)
    assert [fn._cache_size() for fn in jitted] == [size + 1 for size in before]


def test_memory_is_one_block_and_queries_by_rows():
    """The paper's size: 1,000 queries, D = 2048; the length of the bank enters nowhere."""
    queries, rows, dimension = 1000, 4096, 2048
    spec = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    f32, i32 = jnp.float32, jnp.int32
    counts = ranks_module._Counts(spec(i32, 1, queries), spec(i32, 1, queries), spec(i32, 1))
    attacked = spec(f32, queries, dimension)
    compiled = ranks_module._count_block.lower(
        counts,
        ranks_module._Queries(attacked, attacked, spec(i32, queries)),
        spec(f32, rows, dimension),
        spec(i32, rows),
        spec(jnp.bool_, rows),
        divergence="l2",
        mesh=None,
    ).compile()
    working = compiled.memory_analysis().temp_size_in_bytes
    assert working < 4 * (5 * queries * rows + 2 * queries * dimension)


class WatchedBank:
    """A bank that exists only in slices, and notes what is on the devices when one is read."""

    dtype, ndim = np.dtype(np.float32), 2

    def __init__(self, num_rows):
        self.shape = (num_rows, 64)
        self.live = []

    def __getitem__(self, rows):
        self.live.append(sum(x.nbytes for x in jax.live_arrays()))
        start, stop, _ = rows.indices(self.shape[0])
        return np.random.default_rng(start).standard_normal((stop - start, 64)).astype(np.float32)


def test_at_most_one_block_is_alive_on_the_devices():
    bank = WatchedBank(5000)
    query = bank[0:8]
    metrics.neighbour_ranks(query, query, bank, own_index=np.arange(8), block_size=256)
    assert len(bank.live) == 21
    block = 256 * 64 * 4
    assert max(bank.live) - bank.live[0] < 1.5 * block


# Nearest neighbours and classification.


@pytest.mark.parametrize(
    ("divergence", "devices"), [("l1", 1), ("l2", 1), ("linf", 1), ("cosine", 1), ("l2", 8)]
)
def test_nearest_neighbours_on_one_and_eight_devices(divergence, devices):
    queries, _, bank, _ = scenario()
    pairs = distances_twin(queries, bank, divergence)
    order = np.argsort(pairs, axis=1)[:, :7]
    mesh = data_mesh() if devices == 8 else None
    result = metrics.nearest_neighbours(
        queries, bank, k=7, divergence=divergence, block_size=BLOCK, mesh=mesh
    )
    np.testing.assert_array_equal(result.indices, order)
    expected = np.take_along_axis(pairs, order, axis=1)
    np.testing.assert_allclose(result.distances, expected, rtol=1e-4)


def test_equally_near_rows_come_in_the_order_of_the_bank():
    """Three copies of each row, far apart or side by side."""
    _, _, bank, _ = scenario()
    copies = {
        "apart": (np.concatenate([bank] * 3), np.arange(30)[:, None] + [[0, 203, 406]]),
        "together": (np.repeat(bank, 3, axis=0), 3 * np.arange(30)[:, None] + [[0, 1, 2]]),
    }
    for bank, expected in copies.values():
        step = expected[0, 1] - expected[0, 0]
        for mesh in (None, data_mesh()):
            result = metrics.nearest_neighbours(
                bank[expected[:, 0]], bank, k=7, block_size=BLOCK, mesh=mesh
            )
            np.testing.assert_array_equal(result.indices[:, :3], expected)
            np.testing.assert_array_equal(result.distances[:, :3], np.zeros((30, 3)))
            second = np.diff(result.indices[:, 3:6], axis=1)
            np.testing.assert_array_equal(second, np.full((30, 2), step))
            last = result.indices[:, 6]  # the first of three, of which only one has a place
            assert np.all(last < 203 if step == 203 else last % 3 == 0)


def test_all_rows_in_order_when_k_is_the_bank():
    queries, _, bank, _ = scenario(21, 5)
    result = metrics.nearest_neighbours(queries, bank, k=21, block_size=8, mesh=data_mesh())
    order = np.argsort(distances_twin(queries, bank, "l2"), axis=1)
    np.testing.assert_array_equal(result.indices, order)


def test_knn_vote():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 4, 150)
    means = rng.standard_normal((4, 10))
    train = (means[labels] + 1.5 * rng.standard_normal((150, 10))).astype(np.float32)
    test_labels = rng.integers(0, 4, 60)
    test = (means[test_labels] + 1.5 * rng.standard_normal((60, 10))).astype(np.float32)
    similarity = 1.0 - distances_twin(test, train, "cosine")
    nearest = np.argsort(-similarity, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / 0.1)
    votes = np.stack([np.sum(weights * (labels[nearest] == c), axis=1) for c in range(4)], axis=1)
    predicted = metrics.knn_classify(train, labels, test, k=20, temperature=0.1)
    np.testing.assert_array_equal(predicted, votes.argmax(axis=1))
    estimate = metrics.knn_accuracy(train, labels, test, test_labels, k=20, temperature=0.1)
    assert estimate.value == np.mean(votes.argmax(axis=1) == test_labels) > 0.4
    assert estimate.low < estimate.value < estimate.high and estimate.n == 60


# Reporting and bad input.


def test_the_whole_table_for_a_users_function():
    """Each metric of the table has a value inside its interval, n, and a direction."""
    adversarial, clean, bank, own_index = scenario()
    distribution = metrics.distance_distribution(bank, jax.random.key(0))
    moved = dist.all_distances(adversarial, clean)
    ranks = metrics.neighbour_ranks(adversarial, clean, bank, own_index=own_index, block_size=BLOCK)
    margins = metrics.adversarial_margin(clean, np.roll(clean, 1, 0), adversarial, adversarial + 1)
    values = {
        "universal_quantile": metrics.universal_quantile(distribution, moved.l2),
        "universal_quantile_targeted": metrics.universal_quantile(distribution, 2 * moved.l2),
        "relative_quantile": metrics.relative_quantile(moved.l2, 2 * moved.l2),
        "normalised_distance": metrics.normalised_distance(distribution, moved.l2),
        "cosine_similarity": moved.cosine_similarity,
        "breakaway_risk": metrics.breakaway_risk(ranks),
        "top_1_accuracy": metrics.nearest_neighbour_hits(ranks, k=1),
        "top_5_accuracy": metrics.nearest_neighbour_hits(ranks, k=5),
        "adversarial_margin": margins,
        "overlap_risk": metrics.overlap_risk(margins),
    }
    assert set(values) <= set(metrics.METRICS)
    for name, per_image in values.items():
        estimate = metrics.summarise(name, per_image)
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.n == 30
        middle = np.median if metrics.METRICS[name].statistic == "median" else np.mean
        np.testing.assert_allclose(estimate.value, middle(np.asarray(per_image, np.float64)))
        assert metrics.METRICS[name].robust in ("low", "high")


def test_bad_input_is_named():
    adversarial, clean, bank, own_index = scenario()
    broken = bank.copy()
    broken[[3, 9], 1] = np.nan, np.inf
    good = {"adversarial": adversarial, "clean": clean, "bank": bank, "own_index": own_index}
    ranks = lambda **changes: metrics.neighbour_ranks(**good | {"block_size": BLOCK} | changes)
    cases = [
        (lambda: ranks(bank=broken), "finite bank, got 2 rows"),
        (lambda: ranks(clean=broken[:30]), "finite clean, got 2 rows"),
        (lambda: ranks(bank=bank.astype(np.float64)), "bank to be a float32 array, got float64"),
        (lambda: ranks(bank=bank[:, :5]), r"shape \[N, 24\].*\(203, 5\)"),
        (lambda: ranks(clean=clean[:3]), "equal shape"),
        (lambda: ranks(own_index=own_index + 203), r"own_index in \[-1, 203\)"),
        (lambda: ranks(own_index=own_index * 0.5), "own_index of integers"),
        (lambda: ranks(block_size=0), "block_size >= 1, got 0"),
        (lambda: ranks(divergence="l3"), "Unknown divergence 'l3'"),
        (lambda: metrics.nearest_neighbours(clean, bank, k=204), r"k in \[1, 203\].*204"),
        (lambda: metrics.nearest_neighbours(clean, broken, k=7), "finite bank, got 2 rows"),
        (lambda: metrics.nearest_neighbour_hits(ranks(), k=0), "k >= 1, got 0"),
        (lambda: metrics.distance_distribution(broken, jax.random.key(0)), "got 2 rows"),
        (lambda: metrics.distance_distribution(bank[:1], jax.random.key(0)), "at least 2 images"),
        (lambda: metrics.distance_distribution(bank[0], jax.random.key(0)), r"\[rows, D\]"),
        (lambda: metrics.knn_classify(bank, [0, 1], clean), "one label >= 0 for each of 203"),
        (lambda: metrics.knn_classify(bank, [0] * 203, clean, temperature=0), "temperature > 0"),
        (lambda: metrics.summarise("breakaway", [0.0]), "did you mean 'breakaway_risk'"),
        (lambda: metrics.summarise("overlap_risk", [0, 0.5, np.nan]), "2 others of 3"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
