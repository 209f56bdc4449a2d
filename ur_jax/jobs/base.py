"""The job: one computation on one encoder, with a folder of its own, and the only protocol for it.

    job = LabelFree(encoder="demo", images="folder:photos", protocol=EvaluationConfig(...))
    summary = job.run("runs/demo")      # or job.run(), which keeps nothing
    print(summary); summary.to_dataframe()

A command line, the benchmark and a notebook make the same object. It is a frozen dataclass of what
is asked for; `identity` is what determines its numbers; `compute` writes parts as they finish, so
that a killed run computes only what is missing and ends with the same numbers; `merge` makes the
summary of all hosts' parts. A new kind of job is one file with a subclass that registers itself.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self, TypeVar, cast, runtime_checkable

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from ur_jax import data, devices, runs
from ur_jax.data import ImageSource
from ur_jax.devices import hosts
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.encoders.identity import code_hash
from ur_jax.errors import DamagedError, MissingPackageError, UserError
from ur_jax.jobs.progress import Progress, quiet, watched
from ur_jax.metrics import Metric
from ur_jax.probes.classifier import Classifier
from ur_jax.registry import Registry, registries
from ur_jax.runs import Run, lock
from ur_jax.runs.summary import Summary
from ur_jax.typed import check_types
from ur_jax.types import Curve, Values

J = TypeVar("J", bound="Job")
J = TypeVar("J", bound="Job")
_NUM_DOUBTED, _NUM_REPAIRS = 4, 20


@runtime_checkable
class ImageSequence(Protocol):
    """An array of images, a list of pictures, or a data set; see `data.as_source`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


EncoderLike = Encoder | str
Representation = Annotated[str, tyro.conf.arg(aliases=("--output",))]
ImagesLike = ImageSource | str | ImageSequence
"""What `data.as_source` takes; on a command line a spec."""
ProbeLike = Classifier | str


@dataclasses.dataclass(frozen=True)
class Session:
    """Where a job is computed, and by whom; nothing here changes a number.

    Attributes:
      run: the job's folder.
      bank: folder of clean representations that jobs on the same encoder share; None for none.
      host: number of this host; it computes every `num_hosts`-th part.
      num_hosts: how many there are. A job may go on with another number of them.
      mesh: this host's devices.
      num_workers: processes that load images; 0 loads in threads of this one.
      progress: shows progress.
    """

    run: Run
    bank: Path | None = None
    host: int = 0
    num_hosts: int = 1
    mesh: Mesh = dataclasses.field(default_factory=devices.data_mesh)
    num_workers: int = 0
    progress: Progress = quiet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(abc.ABC):
    """One computation on one encoder; the docstrings below are the help of its flags."""

    kind: ClassVar[str]
    """Its name in `JOBS`: the command that runs it."""
    image_fields: ClassVar[tuple[str, ...]] = ("images",)
    """Fields that name images."""
    not_identity: ClassVar[tuple[str, ...]] = ()
    """Fields that change no number, such as a place or a batch size."""
    out_is_optional: ClassVar[bool] = False
    """Whether the command may run without a folder, and keep nothing."""
    presets: ClassVar[Mapping[str, Job]] = {}
    """Named settings; the first one is the default."""

    encoder: EncoderLike = tyro.MISSING
    """Checkpoint directory, published file (with --name), an encoder that ships (demo), a function
    that makes one (package.module:make or file.py:make), or a network of PyTorch:
    torch:file.py:make, timm:NAME[@WEIGHTS], hf:DIRECTORY or hf:ID[@REVISION], each with arguments
    after it, as in hf:DIRECTORY,input_size=336,trust_remote_code=True."""
    images: ImagesLike = tyro.MISSING
    """Image spec: folder:PATH, tfds:NAME/SPLIT or demo."""
    name: str | None = None
    """Which encoder a published file holds."""
    representation: Representation = "paper"
    """paper, backbone, projection or another output of the network."""
    dtype: str = "float32"
    """float32 or bfloat16."""

    @classmethod
    def command(cls) -> type[Job]:
        """The class whose fields are the command's flags: this one, unless flags are registered."""
        return cls

    def __post_init__(self):
        check_types(self, but=(tyro.MISSING,))

    @property
    def settings(self) -> dict[str, Any]:
        """What is asked for, beside encoder and images: the fields that change numbers."""
        left_out = {f.name for f in dataclasses.fields(Job)}
        left_out |= {*self.image_fields, *self.not_identity}
        fields = [f.name for f in dataclasses.fields(self) if f.name not in left_out]
        return {name: getattr(self, name) for name in fields}

    @property
    def requires(self) -> dict[str, str]:
        """What other jobs made and this one reads, {name: hash}, such as a probe's weights."""
        return {}

    @property
    def request(self) -> dict[str, Any]:
        """What determines the numbers, but for what is `requires`d: known before that is there."""
        images = {field: self.source(field).content_hash for field in self.image_fields}
        known = {"job": self.kind, **loading.described(self.model), **images, **self.settings}
        return known | outside_code(self.kind, known)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the numbers: settings, the encoder, the images' content; no place."""
        return self.request | ({"requires": requires} if (requires := self.requires) else {})

    @property
    def model(self) -> Encoder:
        """The encoder, of a job that is `opened`."""
        assert isinstance(self.encoder, Encoder), self.encoder
        return self.encoder

    def source(self, field: str = "images") -> ImageSource:
        """The images of a field, of a job that is `opened`."""
        source = getattr(self, field)
        assert isinstance(source, ImageSource), source
        return source

    def opened(self) -> Self:
        """This job with its encoder loaded and its images listed, where they were only named.

        Raises:
          UserError: for what cannot be loaded or opened.
        """
        for field in ("encoder", *self.image_fields):
            if getattr(self, field) is tyro.MISSING:
                raise UserError(f"Expected {field} for {self.kind}, got none.")
        changes: dict[str, Any] = {}
        if not isinstance(self.encoder, Encoder):
            changes["encoder"] = loading.load_encoder(
                self.encoder, self.name, self.representation, self.dtype
            )
        for field in self.image_fields:
            changes[field] = data.as_source(getattr(self, field))
        return dataclasses.replace(self, **changes)

    def with_image_cache(self, folder: str | os.PathLike | None) -> Self:
        """This job, `opened`, with its images decoded once for all jobs that share a folder."""
        if folder is None:
            return self
        sources = {f: data.CachedImages(self.source(f), folder) for f in self.image_fields}
        return dataclasses.replace(self, **cast(dict[str, Any], sources))

    def settled(self, begun: Mapping[str, Any], mesh: Mesh) -> Self:
        """This job with what is found out on the machine, such as a batch size that fits.

        Args:
          begun: the identity that a run which goes on began with; {} for a new one.
          mesh: this host's devices.
        """
        return self

    def check(self, mesh: Mesh) -> None:  # noqa: B027
        """Raises UserError for settings that cannot be met, before a folder is claimed."""

    def doubt(self) -> tuple[str, ...]:
        """Looks whether the encoder can be measured at all, on a few images; see `Encoder.check`.

        Returns:
          What a user should know though it stops nothing.

        Raises:
          UserError: for an encoder that depends on chance or on the batch, is broken or collapsed.
        """
        source, encoder = self.source(), self.model
        number = min(_NUM_DOUBTED, len(source))
        batches = data.image_batches(
            source, data.evenly_spaced(len(source), number), batch_size=number,
            input_size=encoder.input_size, preparation=encoder.preparation,
        )  # fmt: skip
        batch = next(batches)
        images = np.unique(batch.images[batch.mask], axis=0)  # copies have one representation
        return encoder.check(images) if len(images) else ()

    @property
    def samples(self) -> int:
        """Images that will pass through the encoder, an attack's step counted as 3; 0 unknown."""
        return 0

    @abc.abstractmethod
    def compute(self, session: Session) -> None:
        """Computes this host's share of the parts that are missing."""

    @abc.abstractmethod
    def merge(self, session: Session) -> Summary:
        """Makes the tables and the summary of all hosts' parts, once all are there."""

    def draw(self, session: Session) -> None:  # noqa: B027
        """Writes plots of a merged run."""

    @classmethod
    def remarks(cls, summary: Summary) -> Iterator[str]:
        """Lines that the command prints below the table."""
        if summary.unreadable:
            yield f"{len(summary.unreadable)} unreadable images were left out."

    @classmethod
    def curves(
        cls, folder: Path, summary: Summary, siblings: Mapping[str, Summary]
    ) -> Iterator[Curve]:
        """What the report draws of a finished run, from its tables.

        Args:
          folder: the run's.
          summary: of the run.
          siblings: of the encoder's other jobs, {stage: summary}.
        """
        yield from ()

    @classmethod
    def values(
        cls, folder: Path, summary: Summary, siblings: Mapping[str, Summary]
    ) -> Iterator[Values]:
        """What the numbers of a finished run sum up, image by image, where its tables have it.

        Args: as of `curves`.
        """
        yield from ()

    def summary(
        self,
        rows: Sequence[runs.Row],
        unreadable: Mapping[str, str] | None = None,
        **details: Any,
    ) -> Summary:
        """The summary of this job, for `merge` to return."""
        title = f"{self.kind}: {self.model.name} ({self.model.representation})"
        return Summary(
            self.kind,
            f"{title} on {self.source().spec}",
            self.identity,
            tuple(rows),
            unreadable or {},
            details,
            runs.provenance() | self._published,
        )

    @property
    def _published(self) -> dict[str, Any]:
        """The files of a published network that this encoder was made of."""
        origin = self.model.origin
        files = {k: origin.arguments[k] for k in ("revision", "sha256") if k in origin.arguments}
        return {"encoder": {"place": origin.place, **files}} if files else {}

    def run(
        self,
        out: str | os.PathLike | None = None,
        *,
        bank: Path | None = None,
        image_cache: str | os.PathLike | None = None,
        num_workers: int = 0,
        progress: Progress = watched,
        plots: bool = True,
    ) -> Summary:
        """Computes what is missing, on all hosts that call it, and returns the summary.

        Args:
          out: the folder of the results; a run that stopped there goes on. None keeps nothing.
          bank: folder of clean representations that jobs on the same encoder share.
          image_cache: folder of decoded images, see `data.CachedImages`; it changes no number.
          num_workers: processes that load images.
          progress: shows progress; `progress.quiet` shows none.
          plots: also draw.

        Returns:
          What `merge` made, on every host.

        Raises:
          UserError: for bad input, or a folder that holds another job's results.
        """
        with contextlib.ExitStack() as stack:
            folder = out or stack.enter_context(tempfile.TemporaryDirectory())
            path = runs.as_folder(folder)
            with hosts.before_merge():  # bad input makes no folder
                mesh = devices.data_mesh()
                claim = path / "config.json"
                begun = runs.read_json(claim) if claim.exists() else {}
                job = self.opened().with_image_cache(image_cache).settled(begun, mesh)
                data.check_workers(num_workers)
                job.check(mesh)
                for remark in () if begun else job.doubt():
                    warnings.warn(remark, stacklevel=2)
            if out is not None:
                stack.enter_context(lock.held(path))
            with hosts.before_merge():
                session = Session(
                    runs.open_run(path, job.identity), bank,
                    jax.process_index(), jax.process_count(), mesh, num_workers, progress,
                )  # fmt: skip
            for _ in range(_NUM_REPAIRS):  # what was damaged is set aside: it is computed again
                if _is_computed(job, session, plots=plots and out is not None):
                    break
            else:
                raise UserError(
                    f"What is written to {path} does not come back as it was, {_NUM_REPAIRS} times "
                    "in a row: look at the disk."
                )
            summary = Summary.read(path / "summary.json")
            values = tuple(type(job).values(path, summary, {}))
            return dataclasses.replace(summary, values=values)


def _is_computed(job: Job, session: Session, *, plots: bool) -> bool:
    """Computes what is missing, on all hosts, and merges; False if a damaged part was set aside."""
    damaged = False
    with hosts.before_merge():
        try:
            job.compute(session)
        except DamagedError as error:
            damaged = _is_set_aside(error, session)
    if hosts.on_all_hosts(damaged).any():
        return False
    with hosts.before_merge():
        if hosts.is_first():
            try:
                summary = job.merge(session)
                if plots:
                    _draw(job, session)
            except DamagedError as error:
                damaged = _is_set_aside(error, session)
            else:
                summary.write(session.run.path)  # last: with it, the job is finished
    return not hosts.on_all_hosts(damaged).any()


def _is_set_aside(error: DamagedError, session: Session) -> bool:
    """Sets aside, with a warning, what is damaged of the run or of a bank; raises anything else."""
    is_own = os.path.abspath(session.run.path) == os.path.abspath(error.path.parent)
    if not (is_own or "parts" in error.path.parts):
        raise error
    if error.path.exists():  # another host may have been first
        place = runs.set_aside(error.path)
        warnings.warn(f"{error} It now lies at {place}.", stacklevel=3)
    return True


def _draw(job: Job, session: Session) -> None:
    """Draws, where what draws is installed."""
    try:
        job.draw(session)
    except MissingPackageError as error:
        warnings.warn(f"No plots were drawn. {error}", stacklevel=2)


def outside_code(kind: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """{"code": {what: hash}} of what is registered outside this package and changes numbers.

    A rule of a `--plugin` that was edited is another rule, whatever its name. Encoders and images
    are known by their own content.

    Args:
      kind: of the job.
      request: what determines its numbers; a name in it is what it stands for.
    """
    named, is_own = {kind, *_texts(runs.plain(request))}, kind in JOBS.outside
    found = {}
    for registry in registries():
        for name, item in registry.outside.items():
            reports = any(column.job == kind for column in getattr(item, "columns", ()))
            if name in named or reports or (is_own and isinstance(item, Metric)):
                found[f"{registry.kind} {name}"] = code_hash(item)
    return {"code": found} if found else {}


def _texts(value: Any) -> Iterator[str]:
    """The texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


JOBS: Registry[type[Job]] = Registry("job", "ur_jax.jobs")
"""Every kind of job, by the name of its command."""


J = TypeVar("J", bound=Job)


def register(name: str):
    """Decorates a subclass of `Job`: names it and adds it to `JOBS`."""

    def add(job: type[J]) -> type[J]:
        job.kind = name
        JOBS.register(name, job)
        return job

    return add
