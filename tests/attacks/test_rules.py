"""Step rules: one from outside reaches the command line; a state travels; the best is kept."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax import attacks, cli
from ur_jax.attacks import RULES
from ur_jax.encoders import from_fn

TOY = """
import dataclasses
from ur_jax.attacks import RULES

@RULES.register("toy_half_steps")
@dataclasses.dataclass(frozen=True)
class HalfSteps:
    keeps_best = False

    def init(self, ball, start, step_size, num_steps):
        return step_size

    def step(self, state, ball, point):
        return state, point.images + 0.5 * state * ball.direction(point.gradient)
"""
ENCODER = """
import jax
from ur_jax.encoders import from_fn

def product(weight, images):
    return images.reshape(len(images), -1) @ weight

def make():
    return from_fn(product, jax.random.normal(jax.random.key(0), (192, 4)), input_size=(8, 8))
"""
FLAGS = (
    "--images demo --stages breakaway --num-images 4 --num-clean 8 --batch-size 8 "
    "--breakaway-steps 2 --step-size 0.02 --eps 0.05"
)


def test_a_rule_from_outside_is_on_the_command_line(tmp_path, monkeypatch, capsys):
    """Half steps of 0.02 are whole steps of 0.01, and not whole ones of 0.02."""
    (tmp_path / "toy_rules.py").write_text(TOY)
    (tmp_path / "toy_encoder.py").write_text(ENCODER)
    flags = [*FLAGS.split(), "--encoder", f"{tmp_path / 'toy_encoder.py'}:make"]
    monkeypatch.setattr(cli.hosts, "join", lambda *launch: None)
    monkeypatch.setattr(jax.config, "update", lambda *args: None)  # it has eight devices already

    def run(name, *words):
        out = tmp_path / name
        assert cli.run("evaluate", [*flags, "--out", str(out), *words]) == 0
        attacked = np.load(next((out / "parts" / "breakaway").glob("*.npz")))["attacked"]
        return attacked, json.loads((out / "summary.json").read_text())

    assert cli.run("evaluate", [*flags, "--out=x", "--rule=toy_half_step"]) == 2
    assert "error: Unknown step rule" in capsys.readouterr().out
    plugin = ("--plugin", str(tmp_path / "toy_rules.py"))
    half, summary = run("half", *plugin, "--rule", "toy_half_steps")
    assert summary["identity"]["protocol"]["rule"] == "toy_half_steps"
    whole, summary = run("whole", "--step-size", "0.01")
    assert summary["identity"]["protocol"]["rule"] == "fixed"
    np.testing.assert_allclose(half, whole, rtol=1e-4, atol=1e-5)
    double, _ = run("double")
    assert np.abs(half - double).max() > 1e-2


@dataclasses.dataclass(frozen=True)
class _Counting:
    """Goes up and down in turn, and counts its steps, image by image."""

    keeps_best = True

    def init(self, ball, start, step_size, num_steps):
        return step_size, jnp.zeros(len(start)), jnp.zeros((num_steps, len(start)))

    def step(self, state, ball, point):
        step_size, count, seen = state
        sign = jnp.where(count % 2 == 0, 1.0, -3.0).reshape(-1, 1, 1, 1)
        moved = point.images + sign * step_size * ball.direction(point.gradient)
        return (step_size, count + 1, seen.at[point.number].set(point.objective)), moved


class _Last(_Counting):
    """The same steps, and wherever they end."""

    keeps_best = False


@pytest.mark.parametrize("norm, eps, step_size", [("linf", 0.2, 0.03), ("l2", 0.8, 0.1)])
@pytest.mark.parametrize("num_restarts", [1, 3])
def test_a_rule_keeps_its_state_and_its_best_point(norm, eps, step_size, num_restarts):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((90, 8)), jnp.float32)
    encoder = from_fn(lambda w, x: x.reshape(len(x), -1) @ w, weight, input_size=(6, 5))
    images = jnp.asarray(rng.random((4, 6, 5, 3)), jnp.float32)
    config = dict(eps=eps, step_size=step_size, norm=norm, num_restarts=num_restarts, num_steps=6)
    with RULES.replaced("toy_counting", _Counting), RULES.replaced("toy_last", _Last):
        best = attacks.AttackConfig(**config, rule="toy_counting")
        result = attacks.u_pgd(encoder, images, jax.random.key(0), config=best)
        assert hash(best) == hash(dataclasses.replace(best))
        last = attacks.AttackConfig(**config, rule="toy_last")
        ended = attacks.u_pgd(encoder, images, jax.random.key(0), config=last)
    assert np.all(result.objective > ended.objective)
    passed = np.square(result.history.dist_l2).max(1)
    assert np.all(result.objective >= passed * (1 - 1e-5))
    np.testing.assert_allclose(result.representations, encoder(result.images), rtol=1e-5, atol=1e-5)
    moved = np.linalg.norm(result.representations - encoder(images), axis=1)
    np.testing.assert_allclose(np.square(moved), result.objective, rtol=1e-4)
