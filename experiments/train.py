"""Trains an encoder without labels, or fine-tunes one adversarially.

    python experiments/train.py --images folder:cifar10/train --out runs/demo
    python experiments/train.py --preset mocov2 --init CHECKPOINT --images folder:imagenet/train \\
        --attack untargeted --out runs/mocov2_untargeted
    python experiments/train.py --preset fare --init CHECKPOINT --images folder:PATH --out runs/fare

Writes to --out: `state/` (the newest training state; a killed run goes on from it and ends with the
same bits), `metrics.csv`, `tensorboard/`, `samples/` (views of each epoch, clean and attacked) and,
at the end, `encoder/`, a checkpoint for `load_encoder`.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, Literal

import command
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ur_jax import data, devices, runs, training
from ur_jax.attacks import AttackConfig
from ur_jax.encoders import checkpoints, loading
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.encoders.zoo.spec import EncoderSpec
from ur_jax.errors import UserError, unknown_name
from ur_jax.report import plots as report
from ur_jax.training import views as augment
from ur_jax.training.loop import LoopConfig, train


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, how; the defaults are the recipe of encoder "demo"."""

    images: str = tyro.MISSING
    """Image spec: folder:PATH, tfds:NAME/SPLIT or demo."""
    out: Path = tyro.MISSING
    """Folder of the run; a run that stopped there goes on."""
    preset: str = "demo"
    """demo, or the fine-tuning recipes mocov2, mocov3 (the paper's) and fare."""
    method: Literal["mocov2", "mocov3", "fare"] = "mocov2"
    attack: Literal["none", "untargeted", "targeted", "loss"] = "none"
    """The attack inside training; fare has its own, the loss."""
    init: str | None = None
    """Checkpoint, published file or shipped encoder to go on from; random weights without."""
    encoder: str | None = None
    """Which encoder a published file holds, or whose network to train from random weights."""
    representation: str = "features"
    """Of fare: which representation is kept."""
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
    key_momentum: float = 0.99
    """Of mocov3: at the beginning of a cosine to 1."""
    queue_size: int = 4096
    temperature: float = 0.1
    group_size: int | None = 64
    """Images that share BatchNorm statistics; the whole batch without."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; the weights that are trained are float32 either way."""
    adversary: AttackConfig = AttackConfig(eps=0.05, step_size=0.005, num_steps=3)
    num_workers: int = 0
    """Processes that decode images, where they do not fit into memory."""
    log_every: int = 20
    """Steps between rows of metrics."""
    save_every: int = 1000
    """Steps between checkpoints, beside those at the end of epochs."""


_PAPER_V2 = Config(
    preset="mocov2", attack="untargeted", num_epochs=10, start_epoch=200, schedule_epochs=210,
    warmup_epochs=0, rate_per_epoch=True, learning_rate=0.03, weight_decay=1e-4, batch_size=192,
    view_size=224, key_momentum=0.999, queue_size=65280, temperature=0.2, group_size=32,
)  # fmt: skip
PRESETS = {
    "demo": Config(),
    # 32 images share statistics: MoCo's 256 over 8 GPUs.
    "mocov2": _PAPER_V2,
    # The learning rate is 1.5e-3 * batch size / 256.
    "mocov3": dataclasses.replace(
        _PAPER_V2,
        preset="mocov3",
        method="mocov3",
        start_epoch=300,
        schedule_epochs=310,
        warmup_epochs=40,
        rate_per_epoch=False,
        optimizer="adamw",
        learning_rate=1.5e-3 * 128 / 256,
        weight_decay=0.1,
        batch_size=128,
        key_momentum=0.99,
        group_size=None,
    ),  # fmt: skip
    "fare": Config(
        preset="fare",
        method="fare",
        attack="loss",
        num_epochs=2,
        warmup_epochs=0.14,
        optimizer="adamw",
        learning_rate=1e-5,
        weight_decay=1e-4,
        batch_size=128,
        view_size=None,
        group_size=None,
        adversary=AttackConfig(eps=4 / 255, step_size=1 / 255, num_steps=10),
    ),  # fmt: skip
}
"""The recipes. "mocov2" and "mocov3" are the paper's fine-tuning of the published checkpoints (its
section 5; not yet run at full size), "fare" is Schlarmann et al.'s (arXiv:2402.12336)."""


def main(config: Config) -> None:
    check(config)
    loaded = initial(config)
    source = data.open_images(config.images)
    images = data.ShuffledImages(
        source,
        data.evenly_spaced(len(source), config.num_images or len(source)),
        **decoding(config, loaded.spec),
        batch_size=config.batch_size,
        seed=config.seed,
        num_workers=config.num_workers,
        process=jax.process_index(),
        num_processes=jax.process_count(),
    )
    method, variables = make_method(config, loaded, images.steps_per_epoch)
    optimizer = make_optimizer(config, loaded.spec, images.steps_per_epoch)
    is_plain = config.attack == "none"
    adversary = None if is_plain else training.Adversary(config.attack, config.adversary)
    first, second = views(config, loaded.spec)
    loop = LoopConfig(
        config.num_epochs, first, second, config.num_parts, config.log_every, config.save_every
    )
    described = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "preset")}
    described |= {
        "listing_hash": source.listing_hash,
        "num_readable": images.num_images,
        "init_sha256": checkpoints.tree_hash(variables) if config.init else None,
    }
    runs.open_run(config.out, described)
    if checkpoints.is_saved(config.out / "encoder"):
        command.console.print(f"{config.out} is finished; nothing was left to do.")
        return
    target_key, step_key = jax.random.split(jax.random.key(config.seed))
    state = training.init_state(method, variables, optimizer, target_key, loaded.parts)
    title = f"{config.method}, attack {config.attack}"
    with command.counter(title, config.num_epochs * images.steps_per_epoch) as update:
        state = train(
            method, optimizer, adversary, state, images, config.out, step_key,
            config=loop,
            mesh=devices.data_mesh(jax.devices()),
            on_metrics=lambda row: update(row["step"], f"loss {row['loss']:.4f}"),
            on_epoch=lambda epoch, samples: report.plot_views(
                config.out / "samples" / f"epoch-{epoch:03d}.png", *samples
            ),
        )  # fmt: skip
    trained = jax.tree.map(np.asarray, method.encoder_variables(state))
    provenance = {
        "encoder": loaded.spec.name,
        "config": loaded.config,
        "training": described | {"steps": int(state.step)},
        "trained_with": runs.provenance(),
    }
    checkpoints.save_encoder(config.out / "encoder", trained, provenance)
    command.console.print(f"Encoder written to {config.out / 'encoder'}", highlight=False)


def check(config: Config) -> None:
    """Raises ValueError for flags that do not go together."""
    if config.method == "fare" and config.init is None:
        raise UserError("Expected --init with --method fare: it keeps a trained encoder's outputs.")
    if config.init is None and config.start_epoch:
        raise UserError(f"Expected --init with --start-epoch {config.start_epoch:g}, got none.")


def initial(config: Config) -> loading.Loaded:
    """The variables to begin with: loaded, or random."""
    if config.init is not None:
        return loading.load_variables(config.init, config.encoder)
    name = config.encoder or "demo"
    if name not in ENCODERS:
        raise unknown_name("encoder to train", name, ENCODERS)
    spec = ENCODERS[name]
    example = jnp.zeros((2, *spec.input_size, 3))
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    variables = jax.jit(spec.network(folded=False).init)(key, example)
    return loading.Loaded(variables, spec, {}, {})


def decoding(config: Config, spec: EncoderSpec) -> dict[str, Any]:
    """Size and preparation at which images are decoded."""
    height, width = spec.input_size
    if config.decode_size is None and height <= 64:
        return {"input_size": (height, width), "preparation": spec.preparation}
    size = config.decode_size or round(height * 8 / 7)
    return {"input_size": (size, size), "preparation": "resize_crop"}


def views(config: Config, spec: EncoderSpec) -> list[augment.AugmentConfig | None]:
    """Distributions of the two views; fare has one."""
    size = spec.input_size if config.view_size is None else (config.view_size,) * 2
    if config.method == "fare":
        return [augment.FARE.at(size), None]
    recipes = {
        "mocov2": (augment.MOCO_V2, augment.MOCO_V2),
        "mocov3": (augment.MOCO_V3_VIEW1, augment.MOCO_V3_VIEW2),
    }
    return [view.at(size, blur_scale=size[0] / 224) for view in recipes[config.method]]


def make_method(
    config: Config, loaded: loading.Loaded, steps_per_epoch: int
) -> tuple[training.Method, Any]:
    """The method, and the variables that it begins with."""
    spec, variables = loaded.spec, loaded.variables
    if config.method == "fare":
        encoder = loading.make_encoder(
            spec, variables, loaded.config, config.representation, fold=False
        )
        return training.Fare.of(encoder, config.dtype), encoder.params
    if not takes_groups(spec):
        able = [name for name, spec in ENCODERS.items() if takes_groups(spec)]
        raise unknown_name(f"encoder for {config.method}", spec.name, able)
    shared = {
        "network": spec.network(folded=False, group_size=config.group_size, **loaded.config),
        "mean": spec.mean,
        "std": spec.std,
        "dimension": loading.representation_dimensions(spec, loaded.config)["projection"],
        "temperature": config.temperature,
        "group_size": config.group_size,
        "dtype": config.dtype,
    }
    if config.method == "mocov2":
        shared |= {"queue_size": config.queue_size, "momentum": config.key_momentum}
        return training.MocoV2(**shared), variables
    momentum = training.momentum_schedule(config.key_momentum, **epochs(config, steps_per_epoch))
    return training.MocoV3(**shared, momentum=momentum), variables


def takes_groups(spec: EncoderSpec) -> bool:
    """Whether an encoder's network can be trained by MoCo: it says whose statistics are shared."""
    return "group_size" in inspect.signature(spec.network).parameters


def make_optimizer(config: Config, spec: EncoderSpec, steps_per_epoch: int):
    """The optimizer with its schedule."""
    schedule = training.cosine_schedule(
        config.learning_rate,
        warmup_epochs=config.warmup_epochs,
        per_epoch=config.rate_per_epoch,
        **epochs(config, steps_per_epoch),
    )
    make = {"sgd": training.sgd, "adamw": training.adamw}[config.optimizer]
    mask = training.trained_mask(spec.frozen)
    return make(schedule, weight_decay=config.weight_decay, mask=mask)


def epochs(config: Config, steps_per_epoch: int) -> dict[str, float]:
    """Where this run lies in the schedules."""
    end = config.schedule_epochs or config.start_epoch + config.num_epochs
    return {
        "steps_per_epoch": steps_per_epoch,
        "num_epochs": end,
        "start_epoch": config.start_epoch,
    }


if __name__ == "__main__":
    command.run(main, Config, PRESETS)
