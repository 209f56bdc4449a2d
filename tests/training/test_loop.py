"""The training loop: data order, checkpoints, what a killed or stopped run leaves."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ur_jax import data, devices, training
from ur_jax.attacks import AttackConfig
from ur_jax.encoders.networks.layers import Dense, DenseNorm, NormConfig
from ur_jax.errors import Stop, UserError
from ur_jax.training.checkpoints import TrainingCheckpoints
from ur_jax.training.loop import LoopConfig, last_row, num_skipped, train
from ur_jax.training.views import AugmentConfig

BATCH = 8
CONFIG = LoopConfig(
    num_epochs=3,
    first_view=AugmentConfig(size=(4, 4)),
    second_view=AugmentConfig(size=(4, 4)),
    log_every=2,
    save_every=2,
)


class Tiny(nn.Module):
    """Flattened pixels, a linear layer with BatchNorm, a linear layer."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = NormConfig(group_size=4)
        x = DenseNorm(6, norm=norm, name="hidden")(x.reshape(len(x), -1), train)
        return {"projection": Dense(3, name="last")(jax.nn.relu(x))}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """30 images of noise, so that an epoch has 3 steps of 8 and leaves 6 images out."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(30):
        pixels = rng.integers(0, 255, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return data.open_images(f"folder:{folder}")


def _images(source, **kwargs):
    shape = {"input_size": (6, 6), "preparation": "resize"}
    return data.ShuffledImages(source, np.arange(30), batch_size=BATCH, seed=3, **shape, **kwargs)


METHOD = training.MocoV2(
    Tiny(), (0.5,) * 3, (0.2,) * 3, dimension=3, queue_size=16, momentum=0.9, group_size=4
)
ADVERSARY = training.Adversary("loss", AttackConfig(eps=0.05, step_size=0.02, num_steps=2))
OPTIMIZER = training.sgd(lambda step: 0.05)


@pytest.fixture(scope="module")
def run(source):
    """Trains in a folder and returns the final state's leaves; the same compiled step each time."""

    def run(directory, optimizer=OPTIMIZER, config=CONFIG, **kwargs):
        variables = Tiny().init(jax.random.key(0), jnp.zeros((4, 4, 4, 3)))
        state = training.init_state(METHOD, variables, optimizer, jax.random.key(1))
        arguments = (METHOD, optimizer, ADVERSARY, state, _images(source), directory)
        mesh = devices.data_mesh(jax.devices()[:2])
        state = train(*arguments, jax.random.key(2), config=config, mesh=mesh, **kwargs)
        return jax.tree.leaves(jax.tree.map(np.asarray, state))

    return run


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, run(directory)


def _rows(directory):
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _before_step(number, act):
    """A progress that acts before step `number` of those that are left, counted from 1."""

    def watch(steps, title, total):
        for count, step in enumerate(steps, start=1):
            if count == number:
                act()
            yield step

    return watch


def _killed():
    raise RuntimeError("killed")


@pytest.mark.parametrize("before_step", [1, 4, 6, 9])
def test_killed_anywhere_and_resumed_ends_with_the_same_bits(
    run, uninterrupted, tmp_path, before_step
):
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, watch=_before_step(before_step, _killed))
    whole, state = uninterrupted
    for a, b in zip(state, run(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)
    assert _rows(tmp_path) == _rows(whole)
    # Rows at every other step and at the end of each epoch.
    assert [int(row["step"]) for row in _rows(whole)] == [2, 3, 4, 6, 8, 9]
    assert last_row(whole) == {name: float(text) for name, text in _rows(whole)[-1].items()}


@pytest.mark.parametrize(
    "asked, ends", [(signal.SIGTERM, Stop), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_request_to_stop_saves_the_state(run, uninterrupted, tmp_path, asked, ends):
    ask = lambda: os.kill(os.getpid(), asked)
    before = signal.getsignal(asked)
    with pytest.raises(ends):
        run(tmp_path, watch=_before_step(5, ask))
    assert signal.getsignal(asked) is before
    with TrainingCheckpoints(tmp_path / "state") as saved:
        assert saved.latest_step == 5
    for a, b in zip(uninterrupted[1], run(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_second_ctrl_c_does_not_wait(run, tmp_path):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, watch=_before_step(2, twice))
    with TrainingCheckpoints(tmp_path / "state") as saved:
        assert saved.latest_step is None  # step 2 was not computed


def test_steps_that_are_not_finite_are_skipped_and_counted(run, tmp_path):
    """Of the optimizer's fifth step on; a third bad step in a row is one too many."""
    rate = lambda step: jnp.where(step >= 4, jnp.inf, 0.05)
    optimizer = training.sgd(rate, weight_decay=0.0)
    strict = dataclasses.replace(CONFIG, max_bad_steps=2)
    message = "not finite at step 7, the last of 3 in a row .* is that of step 6"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, optimizer=optimizer, config=strict)
    with pytest.raises(ValueError, match=message):  # and what is in a row is known after a restart
        run(tmp_path, optimizer=optimizer, config=strict)
    leaves = run(tmp_path, optimizer=optimizer)
    assert all(np.isfinite(leaf).all() for leaf in leaves if leaf.dtype == np.float32)
    rows = {int(row["step"]): row for row in _rows(tmp_path)}
    assert [rows[n]["skipped"] for n in (2, 3, 4, 6, 8, 9)] == ["0.0"] * 3 + ["2.0", "2.0", "1.0"]
    assert rows[9]["loss"] == "nan" and np.isfinite(float(rows[4]["loss"]))
    assert last_row(tmp_path)["step"] == 4 and num_skipped(tmp_path) == 5


def test_a_run_without_a_finite_step_ends_with_an_error(run, tmp_path):
    nothing = training.sgd(lambda step: jnp.nan, weight_decay=0.0)
    with pytest.raises(ValueError, match="at step 9, the last of 9 in a row"):
        run(tmp_path, optimizer=nothing)


def test_damage_is_named_in_one_line(run, uninterrupted, tmp_path):
    for name in ("state", "metrics.csv"):
        (shutil.copytree if name == "state" else shutil.copy)(
            uninterrupted[0] / name, tmp_path / name
        )
    metrics = tmp_path / "metrics.csv"
    whole = metrics.read_text()
    metrics.write_text(whole[:-30])
    with pytest.raises(UserError, match=r"metrics.csv is damaged: line 7[^\n]*$"):
        run(tmp_path)
    metrics.write_text(whole.replace(",0.", ",1.", 1))  # another number
    with pytest.raises(UserError, match=r"metrics.csv is damaged: its rows[^\n]*$"):
        run(tmp_path)
    metrics.write_text(whole)
    largest = max((tmp_path / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=r"state is damaged: .*is not as it was written[^\n]*$"):
        run(tmp_path)


def test_other_images_are_not_gone_on_with(run, source, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, watch=_before_step(5, _killed))
    fewer = lambda source: data.ShuffledImages(
        source, np.arange(29), batch_size=BATCH, seed=3, input_size=(6, 6), preparation="resize"
    )
    monkeypatch.setitem(globals(), "_images", fewer)
    with pytest.raises(UserError, match="Expected 30 readable images.*got 29"):
        run(tmp_path)


def test_order_depends_on_seed_and_epoch_alone(source):
    memory, streamed = _images(source), _images(source, in_memory=False)
    shares = [_images(source, process=i, num_processes=2) for i in range(2)]
    assert memory.steps_per_epoch == 3
    for epoch in (0, 1):
        expected = list(memory.epoch(epoch))
        for other in (streamed.epoch(epoch), zip(*(s.epoch(epoch) for s in shares), strict=True)):
            for a, b in zip(expected, other, strict=True):
                np.testing.assert_array_equal(a, np.concatenate(b) if isinstance(b, tuple) else b)
        np.testing.assert_array_equal(next(streamed.epoch(epoch, start=2)), expected[2])
    first, second = (np.concatenate(list(memory.epoch(e))) for e in (0, 1))
    assert not np.array_equal(first, second)


def test_fewer_images_than_a_batch(source):
    with pytest.raises(ValueError, match="at least one batch of 64 images, got 30"):
        data.ShuffledImages(
            source, np.arange(30), batch_size=64, seed=0, input_size=(6, 6), preparation="resize"
        )
