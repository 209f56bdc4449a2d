"""The strong attacks: NumPy twins step for step, closed forms, best-so-far, the ball, programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax import attacks, devices
from ur_jax.attacks import square
from ur_jax.encoders import from_fn

SIZE = (6, 5)
PIXELS = 90
EPS = {"linf": 0.07, "l2": 0.8, "l1": 6.0}
KEY = jax.random.key(0)
RULES = {"linf": ("fixed", "apgd", "momentum", "square"), "l2": ("fixed", "apgd", "momentum"),
         "l1": ("fixed", "apgd", "momentum")}  # fmt: skip
CASES = [(norm, rule) for norm, rules in RULES.items() for rule in rules]


def curved(weight, images):
    """Neither linear nor monotone, so that steps fall as well as rise."""
    return jnp.sin(images.reshape(len(images), -1) @ weight)


def _weight(dimension=6, seed=0):
    return np.random.default_rng(seed).normal(size=(PIXELS, dimension)) / 3.0


ENCODER = from_fn(curved, jnp.asarray(_weight(), jnp.float32), input_size=SIZE)
IMAGES = jnp.asarray(np.random.default_rng(1).random((5, *SIZE, 3)), jnp.float32)


def _project(x, images, eps, norm):
    if norm == "linf":
        return np.clip(x, np.maximum(images - eps, 0), np.minimum(images + eps, 1))
    delta = x - images
    if norm == "l2":
        length = np.sqrt((delta**2).sum((1, 2, 3), keepdims=True))
        return np.clip(images + delta * np.minimum(1, eps / np.maximum(length, 1e-300)), 0, 1)
    room = np.where(delta > 0, 1 - images, images)
    moved = np.empty_like(delta)
    for i, each in enumerate(np.abs(delta)):
        low, high = 0.0, each.max()
        for _ in range(100):
            middle = (low + high) / 2
            over = np.clip(each - middle, 0, room[i]).sum() > eps
            low, high = (middle, high) if over else (low, middle)
        inside = np.clip(each, 0, room[i]).sum() <= eps
        moved[i] = np.sign(delta[i]) * np.clip(each - (0.0 if inside else high), 0, room[i])
    return images + moved


def _objective(weight, reference, x):
    inner = x.reshape(len(x), -1) @ weight
    far = np.sin(inner) - reference
    gradient = (2.0 * far * np.cos(inner)) @ weight.T
    return (far**2).sum(1), gradient.reshape(x.shape)


def twin(weight, images, start, eps, norm, num_steps):
    """APGD of one image after the other in float64, as the papers write it: (best, history)."""
    whole, ends, bests = np.asarray(images, np.float64), [], []
    reference = np.sin(whole.reshape(len(whole), -1) @ weight)
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    checkpoints = [int(np.ceil(round(share * num_steps, 9))) for share in shares]
    for image, first, own in zip(whole, np.asarray(start, np.float64), reference):
        f = lambda x: tuple(part[0] for part in _objective(weight, own, x[None]))  # noqa: B023
        project = lambda x: _project(x[None], image[None], eps, norm)[0]  # noqa: B023
        x, values = first, [f(first)[0]]
        best, best_value = x, values[0]
        run = _sparse if norm == "l1" else _dense
        for x, value in run(f, project, image, first, eps, norm, num_steps, checkpoints):
            values.append(value)
            if value > best_value:
                best, best_value = x, value
        ends.append(best)
        bests.append(np.maximum.accumulate(values))
    return np.stack(ends), np.stack(bests)


def _dense(f, project, image, x, eps, norm, num_steps, checkpoints):
    def direction(g):
        return np.sign(g) if norm == "linf" else g / np.linalg.norm(g)

    step, (value, gradient) = 2 * eps, f(x)
    best = (value, x, gradient)
    previous, rises, last_check, reduced, best_then = x, 0, 0, False, value
    for k in range(num_steps):
        z = project(x + step * direction(gradient))
        share = 1.0 if k == 0 else 0.75
        moved = project(x + share * (z - x) + (1 - share) * (x - previous))
        previous, before = x, value
        x, (value, gradient) = moved, f(moved)
        yield x, value
        rises += value > before
        if value > best[0]:
            best = (value, x, gradient)
        if k + 1 in checkpoints and k + 1 < num_steps:
            stuck = not reduced and best[0] == best_then and last_check > 0
            stuck = stuck or (last_check == 0 and best[0] == best_then)
            reduced = bool(rises < 0.75 * (k + 1 - last_check) or stuck)
            if reduced:
                step, (value, x, gradient) = step / 2, best
            last_check, rises, best_then = k + 1, 0, best[0]


def _sparse(f, project, image, x, eps, norm, num_steps, checkpoints):
    every, step, share, then = max(int(0.04 * num_steps), 1), eps, 0.2, x.size
    value, gradient = f(x)
    best = (value, x, gradient)
    for k in range(num_steps):
        if k and k % every == 0:
            now = int((np.abs(best[1] - image) > 1e-9).sum())
            if now < 0.95 * then:
                step, (value, x, gradient) = eps, best
            else:
                step = max(step / 1.5, eps / 10)
            share, then = now / x.size / 1.5, now
        least = np.sort(np.abs(gradient).ravel())[::-1][max(round(share * x.size), 1) - 1]
        signs = np.sign(gradient) * (np.abs(gradient) >= least)
        x = project(x + step * signs / np.abs(signs).sum())
        value, gradient = f(x)
        yield x, value
        if value > best[0]:
            best = (value, x, gradient)


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_apgd_equals_its_twin_step_for_step(norm):
    num_steps, images = 25, 0.2 + 0.6 * IMAGES
    config = attacks.AttackConfig(eps=EPS[norm], num_steps=num_steps, norm=norm, rule="apgd")
    start = attacks.random_start(images, KEY, config=config)
    result = attacks.u_pgd(ENCODER, images, KEY, config=config)
    best, history = twin(_weight(), images, start, EPS[norm], norm, num_steps)
    seen = np.square(np.asarray(result.history.best.l2))
    np.testing.assert_allclose(seen, history[:, :-1], rtol=2e-3)
    np.testing.assert_allclose(result.objective, history[:, -1], rtol=2e-3)
    assert np.mean(np.abs(result.images - best) > 2e-3) < 0.01  # a sign of a tiny gradient


def test_square_equals_its_twin_step_for_step():
    num_steps, eps, images = 40, 0.07, np.asarray(IMAGES, np.float64)
    config = attacks.AttackConfig(eps=eps, num_steps=num_steps, rule="square")
    result = attacks.u_pgd(ENCODER, IMAGES, KEY, config=config)
    draws = [jax.random.fold_in(key, 0x5EED) for key in attacks.image_keys(KEY, len(images))]
    stripes = attacks.Square().start(
        attacks.ball.Ball(IMAGES, eps, "linf"), attacks.image_keys(KEY, len(images))
    )
    sides = square._sides(0.8, *SIZE, num_steps)
    assert sides[0] == 5 and sides[-1] == 1 and np.all(np.diff(sides) <= 0)
    reference = np.sin(images.reshape(len(images), -1) @ _weight())
    for i, image in enumerate(images):
        best = _project(np.asarray(stripes[i], np.float64), image, eps, "linf")
        value = _objective(_weight(), reference[i], best[None])[0][0]
        for k in range(num_steps):
            place, paint = jax.random.split(jax.random.fold_in(draws[i], k))
            corner = np.asarray(jax.random.uniform(place, (2,)))
            row, column = (int(c * np.float32(n - sides[k] + 1)) for c, n in zip(corner, SIZE))
            signs = np.asarray(jax.random.rademacher(paint, (1, 1, 3), jnp.float32))
            tried = best.copy()
            window = np.s_[row : row + sides[k], column : column + sides[k]]
            tried[window] = np.clip(image[window] + eps * signs[0], 0, 1)
            new = _objective(_weight(), reference[i], tried[None])[0][0]
            best, value = (tried, new) if new > value else (best, value)
        np.testing.assert_allclose(result.objective[i], value, rtol=1e-4)
        np.testing.assert_allclose(result.images[i], best, atol=1e-6)
    np.testing.assert_array_equal(result.health.zero_gradients, 0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_reaches_the_optimum_of_a_linear_encoder(norm):
    """linf: all weights >= 0, so all pixels up, or all down; l2: the first singular vector."""
    weight = np.random.default_rng(2).random((PIXELS, 6))
    if norm == "l2":  # with a gap between the first two singular values
        left, _, right = np.linalg.svd(weight - 0.5, full_matrices=False)
        weight = left @ np.diag(0.7 ** np.arange(6)) @ right
    encoder = from_fn(linear, jnp.asarray(weight, jnp.float32), input_size=SIZE)
    images = 0.3 + 0.4 * IMAGES  # no pixel reaches an end of [0,1]
    eps = 0.1
    optimum = {
        "linf": eps * np.linalg.norm(weight.sum(0)),
        "l2": eps * np.linalg.svd(weight, compute_uv=False)[0],
    }[norm]
    config = attacks.AttackConfig(eps=eps, num_steps=30, norm=norm, rule="apgd")
    result = attacks.u_pgd(encoder, images, KEY, config=config)
    found = np.sqrt(np.asarray(result.objective))
    assert np.all(found >= 0.999 * optimum) and np.all(found <= 1.0001 * optimum)


def linear(weight, images):
    return images.reshape(len(images), -1) @ weight


@pytest.mark.parametrize("norm, rule", CASES)
def test_best_so_far_rises_and_the_ball_holds_from_any_start(norm, rule):
    """Black, white, and every pixel rounding the same way; started far outside."""
    images = jnp.stack([jnp.zeros((*SIZE, 3)), jnp.ones((*SIZE, 3)), jnp.full((*SIZE, 3), 1 / 3)])
    images = jnp.concatenate([images, IMAGES[:1]])
    config = attacks.AttackConfig(
        eps=EPS[norm], step_size=EPS[norm] / 3, num_steps=12, norm=norm, rule=rule
    )
    inside = attacks.random_start(images, KEY, config=config)
    outside = images + 7.0 * jax.random.normal(KEY, images.shape)
    for begun in (inside, outside):
        result = attacks.u_pgd(ENCODER, images, KEY, config=config, start=begun)
        moved = np.asarray(result.images)
        if begun is inside or rule == "fixed":  # the start itself may be the best point seen
            assert moved.min() >= 0 and moved.max() <= 1
            delta = (moved.astype(np.float64) - np.asarray(images, np.float64)).reshape(4, -1)
            size = np.linalg.norm(delta, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)
            unit = 1.0 if norm == "linf" else EPS[norm]  # of a pixel, of the norm
            assert size.max() <= EPS[norm] + np.spacing(np.float32(unit))
        best = np.asarray(result.history.best.l2)
        assert np.all(np.diff(best, axis=1) >= 0) and np.all(best >= result.history.dist_l2)
        if rule != "fixed":
            assert np.all(result.objective >= np.square(best[:, -1]) * (1 - 1e-5))


def test_the_program_is_the_same_uncompiled_and_on_eight_devices():
    images = jnp.concatenate([IMAGES, IMAGES[::-1], IMAGES])[:8]
    config = attacks.AttackConfig(eps=0.07, num_steps=4, rule="apgd")
    keys, mesh = attacks.image_keys(KEY, 8), devices.data_mesh()
    one = attacks.u_pgd(ENCODER, images, keys, config=config)
    eight = attacks.u_pgd(
        devices.replicate(mesh, ENCODER), *devices.shard(mesh, (images, keys)), config=config
    )
    assert len(eight.images.sharding.device_set) == 8
    np.testing.assert_allclose(one.images, eight.images, atol=1e-6)
    np.testing.assert_allclose(one.objective, eight.objective, rtol=1e-4)
    with jax.disable_jit():
        plain = attacks.u_pgd(ENCODER, images, keys, config=config)
    np.testing.assert_allclose(plain.images, one.images, atol=1e-5)


@pytest.mark.parametrize("rule", ["apgd", "momentum", "square"])
def test_radii_weights_and_images_share_one_program(rule):
    programs = lambda: attacks.unsupervised._u_pgd._cache_size()
    counts = []
    for scale in (1.0, 0.5, 0.25):
        config = attacks.AttackConfig(
            eps=0.1 * scale, step_size=0.03 * scale, num_steps=2, rule=rule
        )
        encoder = ENCODER.replace(params=scale * ENCODER.params)
        attacks.u_pgd(encoder, scale * IMAGES[:2], KEY, config=config)
        counts.append(programs())
    assert len(set(counts)) == 1


def test_apgd_beats_steps_of_one_length_at_their_cost():
    config = dict(eps=0.07, num_steps=20)
    fixed = attacks.AttackConfig(**config, step_size=0.001)
    apgd = attacks.AttackConfig(**config, rule="apgd")
    run = lambda config: attacks.u_pgd(ENCODER, IMAGES, KEY, config=config).objective
    assert np.median(run(apgd)) > 1.5 * np.median(run(fixed))


def test_nan_of_an_image_on_its_way_does_not_stop_its_attack():
    """The representation is NaN farther than 1 from the clean one, where the first step leads."""

    def walled(params, images):
        weight, clean = params
        moved = linear(weight, images)
        inside = jnp.linalg.norm(moved - clean, axis=1, keepdims=True) < 1.0
        return jnp.where(inside, moved, jnp.nan)

    weight = jnp.asarray(_weight(), jnp.float32)
    clean = linear(weight, 0.05 + 0.9 * IMAGES)
    encoder = ENCODER.replace(params=(weight, clean), apply_fn=walled)
    config = attacks.AttackConfig(eps=0.07, num_steps=12, rule="apgd")
    result = attacks.u_pgd(encoder, 0.05 + 0.9 * IMAGES, KEY, config=config)
    assert np.isnan(result.history.dist_l2).any() and np.isfinite(result.history.best.l2).all()
    assert np.all(result.objective > result.history.objective[:, 0])


def test_objectives_do_what_they_say():
    bank = jnp.concatenate([ENCODER(IMAGES), ENCODER(IMAGES[:, ::-1]), ENCODER(IMAGES[:, :, ::-1])])
    run = lambda objective, **changes: attacks.u_pgd(
        ENCODER, IMAGES, KEY, config=attacks.AttackConfig(
            eps=0.04, num_steps=15, rule="apgd", objective=objective), **changes
    )  # fmt: skip
    cosine = run("cosine")
    np.testing.assert_allclose(1 - cosine.objective, _cosine(cosine), atol=1e-5)
    assert np.median(_cosine(cosine)) <= np.median(_cosine(run("l2"))) + 1e-3
    target = ENCODER(IMAGES[::-1])
    towards = run("cosine", target=target)
    assert np.all(towards.objective[:2] > -1 + _cosine_to(ENCODER(IMAGES), target)[:2])
    ranks = {}
    for objective in ("l2", "neighbour", "neighbour-5"):
        result = run(objective, **({"bank": bank} if "neighbour" in objective else {}))
        far = np.linalg.norm(result.representations[:, None] - bank[None], axis=2)
        own = far[np.arange(5), np.arange(5)][:, None]
        ranks[objective] = (far < own - 1e-6).sum(1)
        if objective == "neighbour":  # positive where another is nearer
            np.testing.assert_array_equal(np.asarray(result.objective) > 0, ranks[objective] > 0)
        if objective == "neighbour-5":
            np.testing.assert_array_equal(np.asarray(result.objective) > 0, ranks[objective] > 4)
    assert (ranks["neighbour"] > 0).sum() >= (ranks["l2"] > 0).sum()
    with pytest.raises(ValueError, match="Expected bank"):
        run("neighbour")
    with pytest.raises(ValueError, match="Expected no bank"):
        run("l2", bank=bank)
    with pytest.raises(ValueError, match="no target"):
        run("neighbour", bank=bank, target=bank[:5])
    with pytest.raises(ValueError, match="more than k=5"):
        run("neighbour-5", bank=bank[:5])
    with pytest.raises(ValueError, match="linf with the step rule 'square'"):
        attacks.AttackConfig(rule="square", norm="l2")


def _cosine(result):
    return _cosine_to(result.representations, ENCODER(IMAGES))


def _cosine_to(a, b):
    a, b = (np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return (a * b).sum(1)
