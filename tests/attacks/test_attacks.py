"""Attacks: the golden histories, closed forms on linear encoders, and the ball."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_rules import images as reference_images

from ur_jax import attacks
from ur_jax.encoders import from_fn

SIZE = (6, 5)
PIXELS = SIZE[0] * SIZE[1] * 3


def _flat_linear(weight, images):
    return images.reshape(len(images), -1) @ weight


def _linear_encoder(dimension=8, seed=0):
    weight = np.random.default_rng(seed).standard_normal((PIXELS, dimension)).astype(np.float32)
    return from_fn(_flat_linear, jnp.asarray(weight), input_size=SIZE)


def _images(count, seed=1):
    return jnp.asarray(np.random.default_rng(seed).random((count, *SIZE, 3), np.float32))


@pytest.mark.parametrize("norm", attacks.NORMS)
@pytest.mark.parametrize("eps", [1e-4, 0.05, 0.7, 5.0])
@pytest.mark.parametrize("kind", ["random", "black", "white", "grey", "tiny"])
def test_projection_is_inside_the_ball_and_the_box_for_any_input(norm, eps, kind):
    rng = np.random.default_rng(3)
    shape = (4, 40, 30, 3)
    images = {
        "random": rng.random(shape),
        "black": np.zeros(shape),
        "white": np.ones(shape),
        "grey": np.full(shape, 1 / 3),  # every pixel rounds the same way
        "tiny": rng.random(shape) * 1e-6,
    }[kind].astype(np.float32)
    for delta in (rng.standard_normal(shape), np.full(shape, 0.1), np.full(shape, -1e-3)):
        moved = attacks.project(
            jnp.asarray(images + delta.astype(np.float32)), jnp.asarray(images), eps=eps, norm=norm
        )
        moved = np.asarray(moved)
        assert moved.min() >= 0.0 and moved.max() <= 1.0
        difference = moved.astype(np.float64) - images.astype(np.float64)
        ulp = float(np.spacing(np.float32(max(eps, 1.0))))
        if norm == "linf":
            assert np.abs(difference).max() <= eps + ulp
        else:
            norms = {
                "l2": np.sqrt((difference**2).sum((1, 2, 3))),
                "l1": np.abs(difference).sum((1, 2, 3)),
            }
            assert norms[norm].max() <= eps + np.spacing(np.float32(eps))


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_projection_leaves_what_is_inside(norm):
    images = _images(3)
    near = jnp.clip(images + 1e-3, 0.0, 1.0)
    np.testing.assert_array_equal(attacks.project(near, images, eps=1.0, norm=norm), near)


def test_the_l1_projection_is_the_nearest_point_of_ball_and_box():
    """Of 20,000 random points of both, none is nearer; and its KKT conditions hold."""
    rng = np.random.default_rng(5)
    image, attacked = rng.random((1, 2, 2, 3)), rng.normal(0.5, 0.7, (1, 2, 2, 3))
    eps = 0.9
    moved = attacks.project(*(jnp.asarray(x, jnp.float32) for x in (attacked, image)),
                            eps=eps, norm="l1")  # fmt: skip
    moved = np.asarray(moved, np.float64)
    assert abs(np.abs(moved - image).sum() - eps) < 1e-5
    weights = rng.dirichlet(np.full(12, 0.3), 20_000) * eps * rng.choice([-1, 1], (20_000, 12))
    others = np.clip(image.reshape(-1) + weights, 0, 1)
    nearest = np.linalg.norm(moved - attacked)
    assert np.linalg.norm(others - attacked.reshape(-1), axis=1).min() >= nearest - 1e-6
    far, size = np.abs(attacked - image), np.abs(moved - image)
    inside = (size > 1e-4) & (moved > 1e-4) & (moved < 1 - 1e-4)
    assert np.ptp((far - size)[inside]) < 1e-5  # one threshold for all that are neither


def _numpy_pgd(weight, images, start, eps, step_size, num_steps, norm, target=None):
    """PGD on f(x) = W x in float64 with the gradient written out."""
    flatten = lambda x: x.reshape(len(x), -1)
    weight, images, x = (np.asarray(a, np.float64) for a in (weight, images, start))
    clean = flatten(images) @ weight
    reference, sign = (clean, 1.0) if target is None else (np.asarray(target, np.float64), -1.0)
    distances, norms = [], []
    for _ in range(num_steps):
        difference = flatten(x) @ weight - reference
        distances.append(np.linalg.norm(difference, axis=1))
        gradient = sign * 2.0 * difference @ weight.T
        if norm == "linf":
            direction = np.sign(gradient)
        else:
            direction = gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
        delta = flatten(x) + step_size * direction - flatten(images)
        if norm == "linf":
            delta = np.clip(delta, -eps, eps)
        else:
            delta *= eps / np.maximum(np.linalg.norm(delta, axis=1, keepdims=True), eps)
        x = np.clip(flatten(images) + delta, 0, 1).reshape(images.shape)
        norms.append(np.linalg.norm(flatten(x - images), axis=1))
    return x, np.stack(distances, 1), np.stack(norms, 1)


@pytest.mark.parametrize("norm, eps, step_size", [("linf", 0.05, 0.02), ("l2", 0.6, 0.2)])
@pytest.mark.parametrize("targeted", [False, True])
def test_u_pgd_equals_a_float64_twin(norm, eps, step_size, targeted):
    encoder, images = _linear_encoder(), _images(5)
    target = encoder(_images(5, seed=9)) if targeted else None
    config = attacks.AttackConfig(eps=eps, step_size=step_size, num_steps=7, norm=norm)
    start = attacks.project(images + 0.01, images, eps=eps, norm=norm)
    result = attacks.u_pgd(
        encoder, images, jax.random.key(0), config=config, target=target, start=start
    )
    x, distances, norms = _numpy_pgd(encoder.params, images, start, eps, step_size, 7, norm, target)
    # The l2 ball is shrunk by a share of 2^-18, so that a float32 norm can't leave it.
    np.testing.assert_allclose(result.images, x, atol=2e-6 + 2.0**-18 * eps)
    np.testing.assert_allclose(result.history.dist_l2, distances, rtol=2e-5)
    np.testing.assert_allclose(result.history.perturb_l2, norms, rtol=2e-5)
    np.testing.assert_allclose(result.representations, encoder(result.images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["untargeted", "targeted"])
def test_golden_attack_history(golden, mocov2_encoder, mode):
    images = reference_images(224, 244)
    delta = np.random.default_rng([0, 11]).uniform(-0.05, 0.05, size=(2, 3, 224, 244))
    start = images + delta.astype(np.float32).transpose(0, 2, 3, 1)
    config = attacks.AttackConfig(eps=0.05, step_size=0.001, num_steps=6)
    clean = golden("mocov2.npz")["representation"]  # which test_parity holds ours to
    target = jnp.asarray(clean[::-1].copy()) if mode == "targeted" else None
    result = attacks.u_pgd(
        mocov2_encoder,
        jnp.asarray(images),
        jax.random.key(0),
        config=config,
        target=target,
        start=jnp.asarray(start),
    )
    expected = golden("attack_mocov2.npz")
    for name in ("dist_l1", "dist_l2", "dist_linf"):
        ours, theirs = np.asarray(getattr(result.history, name)), expected[f"{mode}_{name}"]
        np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, err_msg=name)
    for name, rtol in (("perturb_l1", 2e-3), ("perturb_l2", 2e-3), ("perturb_linf", 1e-5)):
        theirs = expected[f"{mode}_{name}"]
        np.testing.assert_allclose(getattr(result.history, name), theirs, rtol=rtol, err_msg=name)
    np.testing.assert_allclose(
        result.history.cosine_similarity, expected[f"{mode}_cosine_similarity"], atol=1e-4
    )
    reference = clean if target is None else target
    final = np.linalg.norm(np.asarray(result.representations - reference), axis=1)
    np.testing.assert_allclose(final, expected[f"{mode}_final_dist_l2"], rtol=1e-2)


def test_loss_pgd_climbs_and_equals_u_pgd_on_the_same_objective():
    encoder, images, key = _linear_encoder(), _images(4), jax.random.key(5)
    config = attacks.AttackConfig(eps=0.1, step_size=0.02, num_steps=6)
    target = encoder(_images(4, seed=9))
    loss = attacks.loss_pgd(_negative_distance, (encoder, target), images, key, config=config)
    untargeted = attacks.u_pgd(encoder, images, key, config=config, target=target)
    np.testing.assert_allclose(loss.images, untargeted.images, atol=1e-6)
    assert np.all(np.asarray(loss.loss) > np.asarray(loss.history[:, 0]))


def _negative_distance(params, images):
    encoder, target = params
    return -jnp.sum(jnp.square(encoder(images) - target), axis=-1)


def test_fgsm_is_one_step_to_the_surface():
    encoder, images = _linear_encoder(), 0.4 + 0.2 * _images(4)
    result = attacks.u_fgsm(encoder, images, jax.random.key(0), eps=0.03)
    np.testing.assert_allclose(result.history.perturb_linf[:, 0], 0.03, rtol=1e-5)
    # From any start, one step of size eps reaches the face of the ball that the sign points to.
    start = attacks.random_start(images, jax.random.key(0), config=attacks.fgsm_config(0.03))
    gradient = (encoder(start) - encoder(images)) @ encoder.params.T
    moved = np.sign(np.asarray(gradient)).reshape(images.shape)
    delta = np.asarray(result.images - images)
    assert np.all(delta * moved >= -1e-6)


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_random_start_is_uniform_in_the_ball(norm):
    # Radius / eps of a uniform point in a d-dimensional ball has mean d / (d + 1).
    images = jnp.full((4000, 1, 1, 3), 0.5)
    config = attacks.AttackConfig(eps=0.1, norm=norm)
    start = attacks.random_start(images, jax.random.key(1), config=config)
    delta = np.asarray(start - images).reshape(-1, 3) / 0.1
    radius = np.linalg.norm(delta, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)
    # Standard deviation of the radius is sqrt(d / (d + 2)) / (d + 1): 0.19 for d = 3; 4.5 sigmas.
    assert abs(radius.mean() - 0.75) < 4.5 * 0.194 / np.sqrt(4000)
    assert np.abs(delta.mean(0)).max() < 4.5 * 0.58 / np.sqrt(4000)


def test_restarts_keep_each_images_worst():
    encoder, images, key = _linear_encoder(), _images(6), jax.random.key(2)
    single = attacks.AttackConfig(eps=0.2, step_size=0.02, num_steps=3)
    several = attacks.AttackConfig(eps=0.2, step_size=0.02, num_steps=3, num_restarts=5)
    best = attacks.u_pgd(encoder, images, key, config=several)
    first = attacks.u_pgd(encoder, images, key, config=single)
    objective = np.asarray(best.objective)
    assert np.all(objective >= np.asarray(first.objective)) and np.any(objective > first.objective)
    np.testing.assert_allclose(
        objective, np.square(np.asarray(best.representations - encoder(images))).sum(1), rtol=1e-4
    )


def test_keys_per_image_make_batches_irrelevant():
    encoder, images = _linear_encoder(), _images(6)
    keys = attacks.image_keys(jax.random.key(3), 6)
    config = attacks.AttackConfig(eps=0.1, step_size=0.02, num_steps=3)
    whole = attacks.u_pgd(encoder, images, keys, config=config)
    parts = [
        attacks.u_pgd(encoder, images[i : i + 3], keys[i : i + 3], config=config) for i in (0, 3)
    ]
    np.testing.assert_allclose(whole.images, np.concatenate([p.images for p in parts]), atol=1e-6)


def test_compiled_attack_has_no_callback_no_weight_gradient_and_compiles_once():
    images, keys = _images(4), attacks.image_keys(jax.random.key(0), 4)
    before = attacks.unsupervised._u_pgd._cache_size()
    for seed in range(3):  # new weights of the same network, and other radii
        config = attacks.AttackConfig(eps=0.1 * (1 + seed), step_size=0.02, num_steps=4)
        attacks.u_pgd(_linear_encoder(seed=seed), images, keys, config=config)
    assert attacks.unsupervised._u_pgd._cache_size() == before + 1
    encoder = _linear_encoder()
    arguments = (encoder, images, keys, None, None, *attacks.config.split(config))
    lowered = attacks.unsupervised._u_pgd.lower(*arguments)
    text = lowered.as_text()
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text
    # A weight gradient would be a product of shape (PIXELS, 8) inside the loop.
    jaxpr = str(jax.make_jaxpr(attacks.unsupervised._u_pgd, static_argnums=6)(*arguments))
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    shapes = (f"f32[{PIXELS},8] = ", f"f32[8,{PIXELS}] = ")
    assert products and not any(shape in line for line in products for shape in shapes)


def test_sharded_batch_equals_one_device():
    from ur_jax import devices

    encoder, images, mesh = _linear_encoder(), _images(16), devices.data_mesh()
    keys = attacks.image_keys(jax.random.key(0), 16)
    config = attacks.AttackConfig(eps=0.1, step_size=0.02, num_steps=3)
    one = attacks.u_pgd(encoder, images, keys, config=config)
    eight = attacks.u_pgd(
        devices.replicate(mesh, encoder), *devices.shard(mesh, (images, keys)), config=config
    )
    assert len(eight.images.sharding.device_set) == 8
    np.testing.assert_allclose(one.images, eight.images, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eps": 0.0}, "eps > 0"),
        ({"eps": -1.0}, "eps > 0"),
        ({"eps": float("nan")}, "eps > 0"),
        ({"step_size": 0.0}, "step_size > 0"),
        ({"num_steps": 0}, "num_steps >= 1"),
        ({"num_restarts": 0}, "num_restarts >= 1"),
        ({"norm": "l3"}, "Unknown norm 'l3'"),
        ({"num_restarts": 2, "random_start": False}, "random start"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        attacks.AttackConfig(**change)


def test_bad_input():
    encoder, images, key = _linear_encoder(), _images(2), jax.random.key(0)
    config = attacks.AttackConfig()
    with pytest.raises(ValueError, match="random_start=True"):
        attacks.u_pgd(encoder, images, key, config=attacks.AttackConfig(random_start=False))
    with pytest.raises(ValueError, match=r"in \[0,1\], got .* divide by 255"):
        attacks.u_pgd(encoder, images * 255, key, config=config)
    with pytest.raises(ValueError, match="NaN"):
        attacks.u_pgd(encoder, images.at[0].set(jnp.nan), key, config=config)
    with pytest.raises(ValueError, match="floating-point"):
        attacks.u_pgd(encoder, jnp.zeros(images.shape, jnp.uint8), key, config=config)
    with pytest.raises(ValueError, match=r"\(B,6,5,3\)"):
        attacks.u_pgd(encoder, images[:, :5], key, config=config)
    with pytest.raises(ValueError, match=r"\(2,8\)"):
        attacks.u_pgd(encoder, images, key, config=config, target=jnp.zeros((3, 8)))
    with pytest.raises(ValueError, match="2 images"):
        attacks.u_pgd(encoder, images, jax.random.split(key, 3), config=config)
