"""What a certificate is to the rest: its settings, its sampling, its numbers and its curves.

    CERTIFICATES.register("mine", CertificateKind(settings=MyConfig, ...))

in a file of one's own (`--plugin file.py`) puts it on the command line of `certify`
(`--method mine --mine.sigma 0.5`), into the table of results and into the report, and makes
`certify(model, image, key, config=MyConfig())` find it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from ur_jax.errors import UserError
from ur_jax.metrics import DistanceDistribution
from ur_jax.registry import Registry
from ur_jax.runs import Row
from ur_jax.types import Curve, Values

Columns = Mapping[str, np.ndarray]
"""The certificates of many images, a column for each field: "index", "name" and "label" (negative
where there is none) of the images, and the fields of the certificate."""


class Certificate(Protocol):
    """What every certificate has: a NamedTuple of numbers, texts and arrays, and among them

    Attributes:
      abstained: whether nothing is certified.
      num_drawn: samples drawn.
      num_bad: those of them whose output was not finite.
    """

    @property
    def abstained(self) -> bool: ...
    @property
    def num_drawn(self) -> int: ...
    @property
    def num_bad(self) -> int: ...
    def _asdict(self) -> dict[str, Any]: ...


def _no_curves(columns: Columns) -> Iterator[Curve]:
    """None."""
    yield from ()


def _no_values(columns: Columns, rows: Sequence[Row]) -> Iterator[Values]:
    """None."""
    yield from ()


@dataclasses.dataclass(frozen=True, eq=False)
class CertificateKind:
    """One way of certifying, as `CERTIFICATES` has it.

    Attributes:
      settings: frozen dataclass of the settings, whose fields become flags. Of these, the table of
        the command knows `sigma`, and `relative` needs `divergence`.
      smooths: what is certified: an "encoder", or a "classifier" on one, which needs a probe, or
        "directions" beside one, which are those of the clean images or of a probe's classes.
      certify: (model, images, key, *, config, indices, mesh, batch_size, on_progress) ->
        (index, certificate) of each image; as `center_smoothing`, which documents them.
      num_samples: settings -> samples that an image takes at most.
      rows: (columns, settings) -> the reported numbers; needs no more than what was written.
      relative: (columns, the distribution F of clean distances in `settings.divergence`) -> further
        columns, such as F of a certified distance; without it F is not computed.
      curves: columns, also the further ones -> what the report draws.
      values: (columns, also the further ones, the rows that were reported) -> the values per image
        that encoders are compared by.
      said: what is certified, and of which function: two sentences below the table and in the page.
      presets: {name of a preset: settings}; the first is the default, also where a preset has none.
    """

    settings: type
    smooths: Literal["encoder", "classifier", "directions"]
    certify: Callable[..., Iterable[tuple[int, Any]]]
    num_samples: Callable[[Any], int]
    rows: Callable[[Columns, Any], Iterable[Row]]
    relative: Callable[[Columns, DistanceDistribution], Columns] | None = None
    curves: Callable[[Columns], Iterable[Curve]] = _no_curves
    values: Callable[[Columns, Sequence[Row]], Iterable[Values]] = _no_values
    said: str = ""
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def preset(self, name: str = "") -> Any:
        """The settings of a preset, or the default ones."""
        return self.presets.get(name) or next(iter(self.presets.values()), None) or self.settings()


CERTIFICATES: Registry[CertificateKind] = Registry("certificate", "ur_jax.certificates")
"""Every kind of certificate, by the name that `--method` takes."""


def kind_of(config: Any) -> str:
    """The name of the certificate that a configuration is of.

    Raises:
      UserError: for anything else.
    """
    for name, kind in CERTIFICATES.items():
        if type(config) is kind.settings:
            return name
    expected = ", ".join(kind.settings.__name__ for kind in CERTIFICATES.values())
    raise UserError(
        f"Expected the settings of a certificate ({expected}) as config, got "
        f"{type(config).__name__}."
    )
