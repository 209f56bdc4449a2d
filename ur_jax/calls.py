"""A call for each thing that people ask most, the same jobs as the command line's.

summary = ur_jax.evaluate(encoder, images)             # a table; .to_dataframe()
other = ur_jax.evaluate(robust, images)
print(ur_jax.compare(summary, other))                  # image by image
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ur_jax import data, runs
from ur_jax.certify.registry import CERTIFICATES
from ur_jax.errors import UserError, unknown_name
from ur_jax.jobs.base import JOBS, EncoderLike, ImagesLike, Job, ProbeLike
from ur_jax.jobs.certify import Certify
from ur_jax.jobs.label_free import LabelFree
from ur_jax.jobs.minutes import check_alone
from ur_jax.runs import Summary

if TYPE_CHECKING:
    from ur_jax.report.paired import Comparison

J = TypeVar("J", bound=Job)
_GIVEN = {"encoder", "images", "probe", "method", "config", "protocol", "minutes"}


def evaluate(
    encoder: EncoderLike,
    images: ImagesLike,
    *,
    preset: str = "quick",
    minutes: float | None = None,
    out: str | os.PathLike | None = None,
    **settings: Any,
) -> Summary:
    """The label-free table of an encoder: how far attacks move its representations.

    Args:
      encoder: an `Encoder`, or what `load_encoder` takes: "demo", a checkpoint, file.py:make.
      images: an array [N,H,W,3] (uint8, or floats in [0,1]), a list of Pillow's images, a
        `datasets.Dataset`, or a spec such as "folder:photos"; see `data.as_source`.
      preset: "quick", minutes on a CPU, or "paper", its protocol. It asks for no more images than
        there are.
      minutes: time to take: speed is measured, and as many images are attacked as fit, which their
        intervals show; None for the preset's number.
      out: folder that keeps the results, so that a run that stopped goes on; None keeps none.
      **settings: fields of `jobs.LabelFree` or of its `EvaluationConfig`, to change the preset's:
        num_images=16, eps=(0.05,), stages=("attacks",).

    Returns:
      The numbers, with their intervals; prints as a table.

    Raises:
      UserError: for an unknown preset or setting, and as the job does.
    """
    source = data.as_source(images)
    job = _preset(LabelFree, preset)
    own, config = _divided(LabelFree, job.protocol, settings)
    if minutes is not None and "num_images" in config:
        check_alone(minutes, config["num_images"], ())
    job = dataclasses.replace(job, encoder=encoder, images=source, minutes=minutes, **own)
    protocol = dataclasses.replace(job.protocol, **config)
    few = {
        name: min(getattr(protocol, name), len(source))
        for name in (*(() if minutes else ("num_images",)), "num_clean")
        if name not in config and getattr(protocol, name) is not None
    }
    protocol = dataclasses.replace(protocol, **few)
    return dataclasses.replace(job, protocol=protocol).run(out)


def certify(
    encoder: EncoderLike,
    images: ImagesLike,
    *,
    method: str = "center",
    probe: ProbeLike | None = None,
    preset: str = "quick",
    minutes: float | None = None,
    out: str | os.PathLike | None = None,
    **settings: Any,
) -> Summary:
    """Certificates of many images.

    Args:
      encoder: as of `evaluate`.
      images: as of `evaluate`.
      method: a name of `certify.CERTIFICATES`.
      probe: of a certificate of a classifier: a `Classifier`, the folder of one, or "nearest".
      preset: "adaptive", "quick" or "paper".
      minutes: time to take: as many images are certified as fit; None for the preset's number.
      out: as of `evaluate`.
      **settings: fields of `jobs.Certify` or of the certificate's settings, to change the preset's:
        num_images=8, sigma=0.5.

    Returns:
      The numbers, with their intervals over images.

    Raises:
      UserError: for an unknown method, preset or setting, and as the job does.
    """
    if method not in CERTIFICATES:
        raise unknown_name("certificate", method, CERTIFICATES)
    source = data.as_source(images)
    job, config = _preset(Certify, preset), CERTIFICATES[method].preset(preset)
    own, changed = _divided(Certify, config, settings)
    few = {"num_images": job.num_images if minutes else min(job.num_images, len(source))}
    if minutes is not None and "num_images" in own:
        check_alone(minutes, own["num_images"], ())
    few["num_distribution"] = min(job.num_distribution, len(source))
    config = dataclasses.replace(config, **changed)
    changes: dict[str, Any] = few | own
    return Certify(
        encoder=encoder, images=source, probe=probe, config=config, minutes=minutes, **changes
    ).run(out)  # fmt: skip


def compare(first: Summary | str | os.PathLike, second: Summary | str | os.PathLike) -> Comparison:
    """Two encoders on the same images, image by image: which is more robust, and is it decided?

    Args:
      first: what `evaluate` or `certify` returned, or the folder of a run.
      second: of another encoder, on the same images, with the same settings.

    Returns:
      A verdict for each measure; prints as a table.

    Raises:
      UserError: for a folder that holds no run, or runs that differ in more than the encoder.
    """
    from ur_jax.report import paired

    x, y = _with_values(first), _with_values(second)
    names = str(x.identity.get("encoder")), str(y.identity.get("encoder"))
    if names[0] == names[1]:
        names = f"{names[0]} (first)", f"{names[1]} (second)"
    return paired.compare_summaries(x, y, names)


def _with_values(run: Summary | str | os.PathLike) -> Summary:
    """A summary with the values of its images."""
    if isinstance(run, Summary):
        if not run.values:
            raise UserError(
                "Expected a summary with the values of its images, as evaluate returns it, got one "
                "that was read from its file: give the folder instead."
            )
        return run
    folder = runs.as_folder(run)
    if not (folder / "summary.json").exists():
        raise UserError(f"Expected the folder of a finished run, got {folder}.")
    summary = Summary.read(folder / "summary.json")
    if summary.job not in JOBS:
        raise unknown_name("job", summary.job, JOBS)
    values = tuple(JOBS[summary.job].values(Path(folder), summary, {}))
    return dataclasses.replace(summary, values=values)


def _preset(kind: type[J], name: str) -> J:
    """A job's settings by the name of a preset."""
    if name not in kind.presets:
        raise unknown_name("preset", name, kind.presets)
    found = kind.presets[name]
    assert isinstance(found, kind)
    return found


def _divided(kind: type[Job], config: Any, settings: dict[str, Any]) -> tuple[dict, dict]:
    """Settings by what they are fields of: a job, or its nested configuration."""
    of_job = {field.name for field in dataclasses.fields(kind)} - _GIVEN
    of_config = {field.name for field in dataclasses.fields(config)}
    own: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        value = tuple(value) if isinstance(value, list) else value  # as a notebook writes it
        if name in of_config:
            nested[name] = value
        elif name in of_job:
            own[name] = value
        else:
            raise unknown_name("setting", name, sorted(of_job | of_config))
    return own, nested
