"""Trains an encoder without labels, or fine-tunes one adversarially.

    python experiments/train.py --images folder:cifar10/train --out runs/demo
    python experiments/train.py --preset mocov2 --init CHECKPOINT --images folder:imagenet/train \\
        --attack untargeted --out runs/mocov2_untargeted
    python experiments/train.py --preset fare --init CHECKPOINT --images folder:PATH --out runs/fare

Writes to --out: `state/` (the newest training state; a killed run goes on from it and ends with the
same bits), `metrics.csv`, `tensorboard/`, `samples/` (views of each epoch, clean and attacked) and,
at the end, `encoder/`, a checkpoint for `load_encoder`. Takes several hosts: each batch is divided
over all devices.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh

from ur_jax import data, devices, training
from ur_jax.attacks import AttackConfig
from ur_jax.checks import check_number, check_whole
from ur_jax.data import ShuffledImages
from ur_jax.encoders import checkpoints, loading
from ur_jax.encoders.base import Encoder
from ur_jax.encoders.loading import Loaded
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.errors import DamagedError, UserError, unknown_name
from ur_jax.jobs.base import EncoderLike, Job, Session, outside_code, register
from ur_jax.runs.provenance import provenance
from ur_jax.runs.summary import Row, Summary
from ur_jax.training import (
    FareConfig,
    LoreConfig,
    MethodConfig,
    MocoV2Config,
    MocoV3Config,
    SimClipConfig,
    Start,
)
from ur_jax.training.loop import LoopConfig, last_row, num_skipped, require_board, train
from ur_jax.training.methods import Epochs
from ur_jax.training.step import check_parts

_OPTIMIZERS = {"sgd": training.sgd, "adamw": training.adamw}


@register("train")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Job):
    """What to train, on what, how; the defaults are the recipe of encoder "demo"."""

    not_identity: ClassVar[tuple[str, ...]] = ("log_every", "save_every", "max_bad_steps")

    encoder: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which encoder a published file holds, or whose network to train from random weights."""
    name: tyro.conf.Suppress[str | None] = None
    """Not used: `encoder` is that name."""
    init: EncoderLike | None = None
    """Checkpoint, published file, shipped encoder or a function that makes one
    (package.module:make, file.py:make) to go on from; random weights without."""
    representation: str = "features"
    """Of fare, lore and simclip: which representation is kept."""
    method: tyro.conf.OmitArgPrefixes[MethodConfig] = MocoV2Config()
    attack: Literal["none", "untargeted", "targeted", "loss"] = "none"
    """The attack inside training; fare, lore and simclip are made for that on the loss."""
    num_images: int | None = None
    """Evenly spaced subset of this size; all images by default."""
    seed: int = 0
    num_epochs: int = 8
    """Passes over the images in this run."""
    start_epoch: float = 0.0
    """Epoch at which the schedules begin: where the checkpoint was published."""
    schedule_epochs: float | None = None
    """Epoch at which the learning rate reaches 0; by default where this run ends."""
    warmup_epochs: float = 0.5
    rate_per_epoch: bool = False
    """Learning rate constant within an epoch, as MoCo v2 has it."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.06
    weight_decay: float = 5e-4
    batch_size: int = 256
    """Global, over all devices."""
    num_parts: int = 1
    """Parts of a batch whose gradients are accumulated, to save memory."""
    view_size: int | None = 24
    """Height and width of the training views; the encoder's input size without. For small images,
    smaller views are cheaper, and objects, which a random crop enlarges, keep their size."""
    decode_size: int | None = None
    """Height and width at which images are decoded; by default the encoder's input size for small
    images, and 8/7 of it (shorter side resized, then the centre) for others."""
    dtype: str = "float32"
    """Compute dtype, float32 or bfloat16; the weights that are trained are float32 either way."""
    adversary: AttackConfig = AttackConfig(eps=0.05, step_size=0.005, num_steps=3)
    log_every: int = 20
    """Steps between rows of metrics."""
    save_every: int = 1000
    """Steps between checkpoints, beside those at the end of epochs."""
    max_bad_steps: int = 10
    """Steps in a row that are skipped if loss or gradient is not finite; one more stops the run."""

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, "num_epochs", "num_parts", "log_every", "save_every")
        check_whole(self, "batch_size", least=2)
        check_whole(self, "num_images", "view_size", "decode_size", least=2, optional=True)
        check_number(self, "start_epoch", "warmup_epochs", "weight_decay", least=0.0)
        check_whole(self, "max_bad_steps", least=0)
        check_number(self, "learning_rate", above=0.0)
        training.check_dtype(self.dtype)
        if self.schedule_epochs is not None:
            check_number(self, "schedule_epochs", above=0.0)
        if self.attack != "none":
            training.Adversary(self.attack, self.adversary)  # says what is wrong with it
        if self.attack == "loss" and self.method.needs_random_start:
            if not self.adversary.random_start:
                raise UserError(
                    f"Expected a random start with --method {self.method.name}, got none: at the "
                    "image itself its loss has no gradient, and the attack would do nothing."
                )
        if self.representation != "features" and not self.method.takes_representation:
            raise UserError(
                f"Expected no --representation with --method {self.method.name}, whose loss has an "
                f"output of its own, got {self.representation!r}; leave it out."
            )
        self._schedule(1)  # as does the schedule

    @property
    def settings(self) -> dict[str, Any]:
        asked = {k: v for k, v in super().settings.items() if k != "init"}
        return {
            **asked,
            "representation": self.representation,
            "dtype": self.dtype,
            "method": {"name": self.method.name, **_plain(self.method)},
            "adversary": None if self.attack == "none" else dataclasses.asdict(self.adversary),
        }

    @property
    def request(self) -> dict[str, Any]:
        begun: dict[str, Any] = {"encoder": self._name, "init": None}
        if isinstance(self._begun, Encoder):
            begun["init"] = loading.described(self._begun)
        elif self.init is not None:
            held = {"variables": self._begun.variables, "parts": self._begun.parts}
            begun["init"] = {
                "config": self._begun.config,
                "weights_sha256": checkpoints.tree_hash(held),
            }
        images = self.source().content_hash
        known = {"job": self.kind, **begun, "images": images, **self.settings}
        return known | outside_code(self.kind, known)

    def opened(self) -> Self:
        if self.images is tyro.MISSING:
            raise UserError(f"Expected images for {self.kind}, got none.")
        if self.init is None and self.method.needs_init:
            raise UserError(
                f"Expected --init with --method {self.method.name}: it begins with a trained "
                "encoder."
            )
        if self.init is None and self.start_epoch:
            raise UserError(f"Expected --init with --start-epoch {self.start_epoch:g}, got none.")
        opened = dataclasses.replace(self, images=data.as_source(self.images))
        assert opened._begun is not None  # raises for what cannot be loaded
        return opened

    @property
    def samples(self) -> int:
        """Views that will pass through the encoder, two of an image; an attack's step counted 3."""
        steps = 0 if self.attack == "none" else 3 * self.adversary.num_steps
        return (self.num_images or len(self.source())) * self.num_epochs * (2 + steps)

    def doubt(self) -> tuple[str, ...]:
        return ()  # what is trained need not be good yet

    def check(self, mesh: Mesh) -> None:
        require_board()
        devices.check_divisible(self.batch_size, devices.data_mesh(jax.devices()))
        method, _ = self.method.make(self._start(1))
        check_parts(self.batch_size, method.group_size, self.num_parts)
        total = len(self.source())
        if (self.num_images or total) > total:
            raise UserError(
                f"Expected num_images <= {total}, all there are, got {self.num_images}."
            )

    def compute(self, session: Session) -> None:
        out = session.run.path
        if checkpoints.is_saved(out / "encoder"):
            self._known(out / "encoder")
            return
        images = self._shuffled(session)
        start = self._start(images.steps_per_epoch)
        method, variables = self.method.make(start)
        target_key, step_key = jax.random.split(jax.random.key(self.seed))
        optimizer = self._optimizer(images.steps_per_epoch)
        state = training.init_state(method, variables, optimizer, target_key, start.parts)
        adversary = None
        if self.attack != "none":
            adversary = training.Adversary(self.attack, self.adversary)
        first, second = self.method.views(self._view_size)
        state = train(
            method, optimizer, adversary, state, images, out, step_key,
            config=LoopConfig(
                self.num_epochs, first, second, self.num_parts, self.log_every, self.save_every,
                self.max_bad_steps,
            ),
            mesh=devices.data_mesh(jax.devices()),
            watch=session.progress,
            on_epoch=functools.partial(_draw_samples, out),
        )  # fmt: skip
        trained = jax.tree.map(np.asarray, method.encoder_variables(state))
        self._save(out, trained, int(state.step))

    def merge(self, session: Session) -> Summary:
        known = self._known(session.run.path / "encoder")
        last = known.get("last") or last_row(session.run.path)  # of a version that kept none
        steps = int(last.pop("step", known["training"]["steps"]))
        return self.summary((), steps=steps, skipped=known.get("skipped", 0), last=last)

    def summary(self, rows: Sequence[Row], unreadable: Any = None, **details: Any) -> Summary:
        title = f"train: {self._name} by {self.method.name}, attack {self.attack}"
        title = f"{title}, on {self.source().spec}"
        return Summary(self.kind, title, self.identity, tuple(rows), unreadable or {}, details)

    @classmethod
    def remarks(cls, summary: Summary) -> Iterator[str]:
        last = ", ".join(f"{name} {value:g}" for name, value in summary.details["last"].items())
        yield f"After {summary.details['steps']} steps: {last} (all rows in metrics.csv)."
        if skipped := summary.details.get("skipped"):
            yield (
                f"{skipped} of the steps were skipped, as loss or gradient was not finite; "
                "metrics.csv says where."
            )
        yield "The encoder is the checkpoint encoder/ in the folder of the results."

    @functools.cached_property
    def _begun(self) -> Loaded | Encoder:
        """What training begins with: a network of this package, or an encoder of one's own."""
        if isinstance(self.init, Encoder):
            return self.init
        if self.init is not None:
            if loading.is_own(self.init):
                return loading.load_encoder(
                    self.init, self.encoder, self.representation, fold=False
                )
            return loading.load_variables(self.init, self.encoder)
        name = self.encoder or "demo"
        if name not in ENCODERS:
            raise unknown_name("encoder to train", name, ENCODERS)
        spec = ENCODERS[name]
        example = jnp.zeros((2, *spec.input_size, 3))
        key = jax.random.fold_in(jax.random.key(self.seed), 1)
        variables = jax.jit(spec.network(folded=False).init)(key, example)
        return Loaded(variables, spec, {}, {})

    @property
    def _spec(self) -> Any:
        """What has the encoder's name, input size and preparation."""
        return self._begun if isinstance(self._begun, Encoder) else self._begun.spec

    @property
    def _name(self) -> str:
        """The encoder's name."""
        return self._spec.name

    @property
    def _view_size(self) -> tuple[int, int]:
        """Height and width of the views."""
        size = self.view_size
        return tuple(self._spec.input_size) if size is None else (size, size)

    def _shuffled(self, session: Session) -> ShuffledImages:
        """The training images, decoded at their size."""
        height, width = self._spec.input_size
        size, preparation = (height, width), self._spec.preparation
        if self.decode_size is not None or height > 64:
            side = self.decode_size or round(height * 8 / 7)
            size, preparation = (side, side), "resize_crop"
        source = self.source()
        return ShuffledImages(
            source,
            data.evenly_spaced(len(source), self.num_images or len(source)),
            input_size=size,
            preparation=preparation,
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=session.num_workers,
            process=session.host,
            num_processes=session.num_hosts,
        )

    def _start(self, steps_per_epoch: int) -> Start:
        """What the method is made from."""
        begun = self._begun
        return Start(
            None if isinstance(begun, Encoder) else begun,
            begun if isinstance(begun, Encoder) else None,
            self._epochs(steps_per_epoch),
            self.representation,
            self.dtype,
        )

    def _epochs(self, steps_per_epoch: int) -> Epochs:
        """Where this run lies in the schedules."""
        end = self.schedule_epochs or self.start_epoch + self.num_epochs
        return Epochs(steps_per_epoch, end, self.start_epoch)

    def _schedule(self, steps_per_epoch: int) -> optax.Schedule:
        """The learning rate by step."""
        return training.cosine_schedule(
            self.learning_rate,
            warmup_epochs=self.warmup_epochs,
            per_epoch=self.rate_per_epoch,
            **self._epochs(steps_per_epoch)._asdict(),
        )

    def _optimizer(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """The optimizer with its schedule."""
        frozen = getattr(self._spec, "frozen", ())
        return _OPTIMIZERS[self.optimizer](
            self._schedule(steps_per_epoch),
            weight_decay=self.weight_decay,
            mask=training.trained_mask(frozen),
        )

    def _known(self, path: Path) -> dict[str, Any]:
        """What is kept with the encoder that this run has trained."""
        try:
            checkpoints.check_files(path)
            return checkpoints.read_metadata(path)
        except UserError as error:
            remedy = "It is written again from the newest state."
            raise DamagedError(path, str(error), remedy) from error

    def _save(self, out: Path, trained: Any, steps: int) -> None:
        """Writes the trained encoder as a checkpoint, with the last row of its metrics."""
        record = {"training": {**self.identity, "steps": steps}, "trained_with": provenance()}
        begun, path = self._begun, out / "encoder"
        record |= {"last": last_row(out), "skipped": num_skipped(out)}
        if isinstance(begun, Encoder):
            tuned = dataclasses.replace(begun, params=trained)
            loading.save_encoder(path, tuned, metadata=record)
            return
        known = {"encoder": begun.spec.name, "config": begun.config}
        checkpoints.save_encoder(path, trained, known | record)


def _plain(method: MethodConfig) -> dict[str, Any]:
    """A method's settings; noise that there is none of is left out, as before it could be."""
    plain = dataclasses.asdict(method)  # pyright: ignore[reportArgumentType]
    return {k: v for k, v in plain.items() if (k, v) != ("noise", 0.0)}


def _draw_samples(out: Path, epoch: int, samples: Any) -> None:
    """Views of an epoch, where what draws is installed."""
    try:
        from ur_jax.report import plots  # needs matplotlib, of the extra "report"

        plots.plot_views(out / "samples" / f"epoch-{epoch:03d}.png", *samples)
    except ImportError as error:  # a MissingPackageError, too
        warnings.warn(f"No views were drawn: {error}", stacklevel=2)


# The recipes. "mocov2" and "mocov3" are the paper's fine-tuning of the published checkpoints (its
# section 5; not yet run at full size), "fare" is Schlarmann et al.'s (arXiv:2402.12336), "lore"
# (arXiv:2505.18884) and "simclip" (arXiv:2407.14971) are these methods with its numbers.
_PAPER_V2 = Train(
    method=MocoV2Config(queue_size=65280, temperature=0.2, key_momentum=0.999, group_size=32),
    attack="untargeted", num_epochs=10, start_epoch=200, schedule_epochs=210, warmup_epochs=0,
    rate_per_epoch=True, learning_rate=0.03, weight_decay=1e-4, batch_size=192, view_size=224,
)  # fmt: skip
PRESETS: dict[str, Train] = {
    "demo": Train(),
    # 32 images share statistics: MoCo's 256 over 8 GPUs.
    "mocov2": _PAPER_V2,
    # The learning rate is 1.5e-3 * batch size / 256.
    "mocov3": dataclasses.replace(
        _PAPER_V2,
        method=MocoV3Config(temperature=0.2, key_momentum=0.99, group_size=None),
        start_epoch=300,
        schedule_epochs=310,
        warmup_epochs=40,
        rate_per_epoch=False,
        optimizer="adamw",
        learning_rate=1.5e-3 * 128 / 256,
        weight_decay=0.1,
        batch_size=128,
    ),
    "fare": Train(
        method=FareConfig(),
        attack="loss",
        num_epochs=2,
        warmup_epochs=0.14,
        optimizer="adamw",
        learning_rate=1e-5,
        weight_decay=1e-4,
        batch_size=128,
        view_size=None,
        adversary=AttackConfig(eps=4 / 255, step_size=1 / 255, num_steps=10),
    ),
}
PRESETS["lore"] = dataclasses.replace(PRESETS["fare"], method=LoreConfig())
PRESETS["simclip"] = dataclasses.replace(PRESETS["fare"], method=SimClipConfig())
Train.presets = PRESETS
