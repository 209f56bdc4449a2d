"""States of a training run: other devices, half of a save, damage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ur_jax import devices
from ur_jax.training.checkpoints import TrainingCheckpoints


def _state(seed):
    params = {"w": jax.random.normal(jax.random.key(seed), (8, 2)), "not trained": None}
    optimizer = optax.sgd(0.1, momentum=0.9).init(params)
    key, step = jax.random.key(seed), jnp.int32(seed)
    return {"params": params, "optimizer": optimizer, "key": key, "step": step}


def _comparable(state):
    return jax.tree.map(np.asarray, {**state, "key": jax.random.key_data(state["key"])})


def test_training_state_resumes_on_other_devices(tmp_path):
    with TrainingCheckpoints(tmp_path / "run", max_to_keep=2) as run:
        assert run.latest_step is None
        for step in (1, 2, 3):
            run.save(step, _state(step), {"seed": 5, "step": step})
    (tmp_path / "run" / "4.orbax-checkpoint-tmp").mkdir()  # a save that was killed

    mesh = devices.data_mesh()
    like = devices.replicate(mesh, _state(0))
    with TrainingCheckpoints(tmp_path / "run") as run:
        assert run.latest_step == 3
        state, metadata = run.restore(like)
    assert metadata == {"seed": 5, "step": 3}
    assert state["params"]["w"].sharding.device_set == set(mesh.devices.flat)
    _assert_equal(_comparable(state), _comparable(_state(3)))
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["2", "3"]


def test_training_state_errors(tmp_path):
    with TrainingCheckpoints(tmp_path / "run") as run:
        with pytest.raises(ValueError, match="no checkpoint to resume from"):
            run.restore(_state(0))
        run.save(1, _state(1), {})
        run.wait()
        wrong = {**_state(0), "params": {"w": jnp.zeros((8, 3)), "not trained": None}}
        with pytest.raises(ValueError, match="step 1 .*damaged or of another configuration"):
            run.restore(wrong)


def _assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
