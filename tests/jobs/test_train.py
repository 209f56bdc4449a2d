"""The training job: killed and resumed, its methods' flags, and a method from outside."""

from __future__ import annotations

import dataclasses
import json
import re

import interrupted
import jax
import numpy as np
import pytest
import tiny_encoder

from ur_jax import cli, data
from ur_jax.attacks import AttackConfig
from ur_jax.encoders import checkpoints, loading
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.errors import UserError
from ur_jax.jobs.train import Train
from ur_jax.training import FareConfig, LoreConfig, MocoV2Config, MocoV3Config
from ur_jax.training.methods import METHODS


@pytest.fixture(autouse=True)
def _tiny():
    """Encoder "demo" with a network of a few hundred weights."""
    with tiny_encoder.stands_for_demo():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    tiny_encoder.save_images(folder, 24)
    return folder


@pytest.fixture
def job(folder):
    return Train(
        images=f"folder:{folder}", batch_size=8, num_epochs=3, view_size=8,
        method=MocoV2Config(group_size=4, queue_size=16),
    )  # fmt: skip


def test_killed_and_resumed_ends_with_the_same_encoder(job, tmp_path):
    whole = job.run(tmp_path / "whole", plots=False)
    with pytest.raises(KeyboardInterrupt):
        job.run(tmp_path / "killed", progress=interrupted.stop_after(4))
    assert not (tmp_path / "killed" / "encoder").exists()
    assert job.run(tmp_path / "killed").details == whole.details
    assert whole.details["steps"] == 9 and whole.rows == ()
    assert {"epoch", "loss", "grad_norm"} <= set(whole.details["last"])
    (first, metadata), (second, _) = (
        checkpoints.restore_encoder(tmp_path / name / "encoder") for name in ("whole", "killed")
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert len((tmp_path / "killed" / "metrics.csv").read_text().splitlines()) == 1 + 3
    assert (tmp_path / "whole" / "samples" / "epoch-003.png").exists()
    assert metadata["training"]["method"]["queue_size"] == 16
    with pytest.raises(UserError, match="another configuration.*learning_rate"):
        dataclasses.replace(job, learning_rate=0.1).run(tmp_path / "whole")
    # Finished: nothing is trained again. How often something is written may change.
    again = dataclasses.replace(job, log_every=7).run(tmp_path / "whole")
    assert again.details == whole.details
    assert "9 steps" in " ".join(Train.remarks(again))


def test_identity_knows_what_training_begins_with_and_no_place(job, tmp_path):
    tiny_encoder.save(tmp_path / "here")
    tiny_encoder.save(tmp_path / "there")
    here, there = (
        dataclasses.replace(job, init=str(tmp_path / name)).opened() for name in ("here", "there")
    )
    assert here.identity == there.identity
    assert here.identity["init"] != job.opened().identity["init"]
    json.dumps(here.identity["method"])


@pytest.fixture
def command(monkeypatch):
    """The command line, in a process whose devices are there already."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return lambda *words: cli.run("train", [*words])


def test_fine_tunes_by_fare_from_the_command_line(command, folder, tmp_path, capsys):
    tiny_encoder.save(tmp_path / "init")
    words = [
        "--preset", "fare", "--init", str(tmp_path / "init"), "--images", f"folder:{folder}",
        "--out", str(tmp_path / "out"), "--batch-size", "8", "--num-epochs", "1",
        "--adversary.num-steps", "1",
    ]  # fmt: skip
    assert command(*words) == 0
    assert "After 3 steps" in capsys.readouterr().out
    trained, metadata = checkpoints.restore_encoder(tmp_path / "out" / "encoder")
    assert metadata["training"]["adversary"]["num_steps"] == 1
    before, _ = checkpoints.restore_encoder(tmp_path / "init")
    jax.tree.map(np.testing.assert_array_equal, trained["batch_stats"], before["batch_stats"])
    assert not np.array_equal(*(jax.tree.leaves(t["params"])[0] for t in (trained, before)))


def _parsed(*words):
    flags = ("--images", "demo", "--out", "x", *words)
    return cli.parse(cli.find("train"), flags).job


def test_flags_of_methods_follow_preset_and_choice():
    assert _parsed() == dataclasses.replace(Train(), images="demo")
    for name, preset in Train.presets.items():
        assert _parsed("--preset", name) == dataclasses.replace(preset, images="demo")
    assert _parsed("--queue-size", "64").method == MocoV2Config(queue_size=64)
    # What two methods share stays as the preset has it.
    assert _parsed("--preset", "mocov2", "--method", "mocov3").method == MocoV3Config(
        temperature=0.2, key_momentum=0.999, group_size=32
    )
    assert _parsed("--preset", "fare").method == FareConfig()
    assert _parsed("--preset", "lore", "--rho", "0.2").method == LoreConfig(rho=0.2)
    assert _parsed("--preset", "lore", "--adversary.rule", "apgd").adversary.rule == "apgd"
    assert _parsed("--adversary.eps", "0.1").adversary.eps == 0.1


def test_a_flag_that_the_method_lacks_is_refused():
    with pytest.raises(UserError, match="Expected no --queue-size with --method fare"):
        _parsed("--method", "fare", "--queue-size", "64")
    with pytest.raises(UserError, match="no --representation with --method mocov2.*'backbone'"):
        _parsed("--representation", "backbone")


@pytest.mark.parametrize(
    "words, message",
    [
        (("--preset", "fare"), "--init with --method fare"),
        (("--start-epoch", "200"), "--init with --start-epoch 200"),
        (("--preset", "lore"), "--init with --method lore"),
        (("--method", "lore", "--rho", "0"), "rho > 0, got 0"),
        (("--method", "lore", "--primal-steps", "0"), "primal_steps >= 1"),
        (("--preset", "simclip", "--adversary.no-random-start"), "random start with --method sim"),
        (("--preset", "fare", "--adversary.objective", "cosine"), "objective 'l2' inside training"),
        (("--dtype", "float16"), "float32 or bfloat16, got float16: its largest"),
        (("--dtype", "float64"), "dtype 'float64'"),
        (("--max-bad-steps", "-1"), "max_bad_steps >= 0, got -1"),
        (("--learning-rate", "nan"), "learning_rate > 0, got nan"),
        (("--learning-rate", "-0.1"), "learning_rate .*-0.1"),
        (("--weight-decay", "inf"), "weight_decay .*inf"),
        (("--num-epochs", "0"), "num_epochs >= 1, got 0"),
        (("--warmup-epochs", "9"), "0 <= warmup_epochs < 8"),
        (("--batch-size", "0"), "batch_size .* got 0"),
        (("--batch-size", "100"), "divisible"),
        (("--num-images", "0"), "num_images .* got 0"),
        (("--num-images", "1000000"), "num_images <= 512"),
        (("--view-size", "1"), "view_size .* got 1"),
        (("--num-parts", "0"), "num_parts"),
        (("--encoder", "demmo"), "did you mean 'demo'"),
        (("--temperature", "nan"), "temperature > 0, got nan"),
        (("--queue-size", "0"), "queue_size >= 1"),
        (("--key-momentum", "1"), "key_momentum >= 0 and < 1"),
        (("--init", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_values_without_sense_are_named_before_a_folder_is_claimed(
    words, message, command, tmp_path, capsys
):
    out = tmp_path / "out"
    status = command("--images", "demo", "--out", str(out), *words)
    said = capsys.readouterr()
    printed = " ".join((said.out + said.err).split())
    assert status == 2 and "Traceback" not in printed
    assert re.search(message, printed), printed
    assert not (out / "config.json").exists()


TOY = '''
"""A method from outside: representations of the two views shall be close."""
import dataclasses
import jax.numpy as jnp
from ur_jax.training.methods import MethodConfig, register
from ur_jax.training.views import AugmentConfig


@register("toy")
@dataclasses.dataclass(frozen=True)
class ToyConfig(MethodConfig):
    """Settings.

    Attributes:
      margin: Distance that is close enough.
    """

    margin: float = 0.25

    def views(self, size):
        return AugmentConfig(size=size), AugmentConfig(size=size)

    def make(self, start):
        encoder = start.encoder()
        return Toy(encoder.replace(params=None), self.margin), encoder.params


@dataclasses.dataclass(frozen=True)
class Toy:
    encoder: object
    margin: float
    group_size = 1

    def init(self, variables, key, parts):
        return variables["params"], variables["batch_stats"], {}

    def targets(self, state, views, key, apart):
        return {}, {}

    def represent(self, variables, target, images):
        return self.encoder.replace(params=variables)(images)

    def attack_losses(self, variables, target, targets, rows, images):
        return jnp.sum(self.represent(variables, target, images) ** 2, -1)

    def attacked_targets(self, target, targets, attacked, apart):
        return target, targets

    def losses(self, variables, target, targets, part):
        first, second = (self.represent(variables, target, v) for v in part.views)
        distance = jnp.sum((first - second) ** 2, -1)
        return jnp.maximum(distance - self.margin, 0), variables["batch_stats"], {}

    def finish(self, target, targets):
        return target

    def encoder_variables(self, state):
        return state.variables
'''


def test_a_method_from_outside_is_on_the_command_line_and_trains(command, folder, tmp_path, capsys):
    (tmp_path / "toy_method.py").write_text(TOY)
    plugin = ["--plugin", str(tmp_path / "toy_method.py")]
    try:
        with pytest.raises(SystemExit):
            command(*plugin, "--help")
        helped = capsys.readouterr().out
        assert "toy" in helped and "--margin" in helped and "Distance that is close" in helped
        words = [
            *plugin, "--method", "toy", "--margin", "0.0", "--images", f"folder:{folder}",
            "--out", str(tmp_path / "out"), "--batch-size", "8", "--num-images", "16",
            "--num-epochs", "1", "--view-size", "8",
        ]  # fmt: skip
        assert command(*words) == 0
        assert "After 2 steps" in capsys.readouterr().out
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["method"] == {"name": "toy", "margin": 0.0}
        assert checkpoints.is_saved(tmp_path / "out" / "encoder")
    finally:
        METHODS._items.pop("toy", None)


def test_what_every_method_promises():
    assert {*METHODS} >= {"mocov2", "mocov3", "fare", "lore", "simclip"}
    for name, kind in METHODS.items():
        assert kind.name == name and dataclasses.is_dataclass(kind)
        first, _ = kind().views((16, 16))
        assert first.size == (16, 16)


def test_a_notebook_gives_a_live_source(folder, tmp_path):
    source = data.open_images(f"folder:{folder}")
    assert Train(images=source).opened().source() is source
    assert "demo" in ENCODERS
    with pytest.raises(UserError, match="Expected method to be a MethodConfig, got 'mocov2'"):
        Train(images=source, method="mocov2")
    with pytest.raises(UserError, match="random_start=True for an untargeted"):
        Train(attack="untargeted", adversary=AttackConfig(random_start=False))


OWN = """
import jax, jax.numpy as jnp
import flax.linen as nn
import ur_jax

class Net(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(self.width, (3, 3))(x))
        return nn.Dense(5)(nn.relu(x).mean((1, 2)))

def make(width=6):
    variables = Net(width).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return ur_jax.from_linen(Net(width), variables, input_size=(8, 8), name="mine")
"""


def test_fare_tunes_an_encoder_of_ones_own(command, folder, tmp_path, capsys):
    (tmp_path / "own_of_train.py").write_text(OWN)
    place, out = f"{tmp_path / 'own_of_train.py'}:make", tmp_path / "out"
    words = [
        "--preset", "fare", "--init", f"{place},width=4", "--images", f"folder:{folder}",
        "--batch-size", "8", "--num-epochs", "1", "--adversary.num-steps", "1",
    ]  # fmt: skip
    assert command(*words, "--out", str(out)) == 0, capsys.readouterr().out
    before, after = (loading.load_encoder(p) for p in (f"{place},width=4", out / "encoder"))
    assert after.name == "mine" and after.params["params"]["Conv_0"]["kernel"].shape[-1] == 4
    same = jax.tree.map(np.array_equal, before.params, after.params)
    assert all(jax.tree.leaves(same["batch_stats"])) and not any(jax.tree.leaves(same["params"]))
    assert "training" in checkpoints.read_metadata(out / "encoder")
    # And again from what was tuned.
    words[3] = str(out / "encoder")
    assert command(*words, "--out", str(tmp_path / "again")) == 0
    capsys.readouterr()
    words[1:4] = ["mocov2", "--init", f"{place},width=4"]
    assert command(*words, "--start-epoch", "0", "--out", str(tmp_path / "moco")) == 2
    assert "fare, lore and simclip train any encoder" in " ".join(capsys.readouterr().out.split())
