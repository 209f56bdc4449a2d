"""No certified image is moved farther than its certificate says; a false one is found out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.certify import CenterConfig
from ur_jax.certify.center import attacked
from ur_jax.encoders import from_fn

SIZE = (4, 4)
CONFIG = CenterConfig(bound="union", n0=300, n=600, alpha1=0.05, alpha2=0.05, delta=0.15)


def bent(weight, images):
    return jnp.tanh(images.reshape(len(images), -1) @ weight)


RNG = np.random.default_rng(0)
WEIGHT = jnp.asarray(RNG.normal(size=(48, 5)), jnp.float32)
ENCODER = from_fn(bent, WEIGHT, input_size=SIZE)


def test_no_certificate_is_broken_and_a_false_one_is(monkeypatch):
    images = RNG.random((4, *SIZE, 3)).astype(np.float32)
    run = lambda: attacked.attack_certified(
        ENCODER, images, jax.random.key(0), config=CONFIG, num_steps=8, indices=np.arange(4) + 3
    )
    found = run()
    assert np.isfinite(found.eps_out).all() and not found.broken.any()
    assert np.all(found.moved > 0) and set(found.attack) <= set(attacked.ATTACKS)
    # With a bound that is a tenth of the true one, the attacks find it out.
    honest = attacked.center_smoothing

    def false(*args, **kwargs):
        for index, certificate in honest(*args, **kwargs):
            yield index, certificate._replace(eps_out=certificate.eps_out / 20)

    monkeypatch.setattr(attacked, "center_smoothing", false)
    assert run().broken.any()
