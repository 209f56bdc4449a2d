"""What there is to measure: sweeps over works, encoders, dtypes and batch sizes, and presets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax

from ur_jax.encoders import loading
from ur_jax.encoders.base import DTYPES
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.errors import UserError, unknown_name
from ur_jax.performance import work
from ur_jax.typed import check_types


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Every work with every encoder, dtype and batch size.

    Attributes:
      works: names of `work.WORKS`.
      encoders: names of `ENCODERS`, or what `load_encoder` takes.
      dtypes: "float32", "bfloat16".
      batch_sizes: images over all devices.
      num_steps: steps of an attack.
      num_samples: noisy samples of an image; cap of a certificate's.
      num_center: samples that give a certificate's center.
      num_rows: rows of the bank that distances go to.
      repeats: timed runs of each implementation.

    Raises:
      ValueError: for an unknown name or a number below 1.
    """

    works: tuple[str, ...] = ("u_pgd", "forward", "noisy")
    encoders: tuple[str, ...] = ("resnet50",)
    dtypes: tuple[str, ...] = ("float32",)
    batch_sizes: tuple[int, ...] = (8,)
    num_steps: int = 2
    num_samples: int = 16
    num_center: int = 2_000
    num_rows: int = 10_000
    repeats: int = 5

    def __post_init__(self):
        check_types(self)
        known = {"works": work.WORKS, "encoders": ENCODERS, "dtypes": DTYPES}
        for field, names in known.items():
            for name in getattr(self, field):
                is_loadable = field == "encoders" and loading.is_loadable(name)
                if name not in names and not is_loadable:
                    raise unknown_name(field.removesuffix("s"), name, names)
        counts = ("num_steps", "num_samples", "num_center", "num_rows", "repeats")
        for name, value in [(n, getattr(self, n)) for n in counts] + [
            ("batch size", size) for size in self.batch_sizes
        ]:
            if value < 1:
                raise UserError(f"Expected {name} >= 1, got {value}.")

    def cases(self) -> Iterator[tuple[str, work.Size]]:
        """Yields (work, size), the works outermost."""
        axes = (self.works, self.encoders, self.dtypes, self.batch_sizes)
        rest = (self.num_steps, self.num_samples, self.num_center, self.num_rows)
        for name, encoder, dtype, batch_size in itertools.product(*axes):
            yield name, work.Size(encoder, dtype, batch_size, *rest)


_CERTIFICATES, _STREAMS = ("certificates", "adaptive"), ("stream", "streams")

PRESETS: dict[str, tuple[Sweep, ...]] = {
    "cpu": (
        Sweep(),
        Sweep(works=("center", "distances"), encoders=("mocov2",), batch_sizes=(64,)),
        Sweep(
            works=("u_pgd", "forward", "training"),
            encoders=("demo",),
            batch_sizes=(64,),
            num_steps=5,
        ),
        Sweep(
            works=_CERTIFICATES, encoders=("demo",), batch_sizes=(64,), num_samples=5_000, repeats=2
        ),
    ),
    # In the order of what matters: the budget may end before the list does.
    "gpu": (
        Sweep(
            works=("u_pgd", "noisy"),
            dtypes=("bfloat16", "float32"),
            batch_sizes=(256,),
            num_steps=10,
            num_samples=2_560,
        ),
        Sweep(
            works=("forward",), encoders=("mae", "mocov3"), dtypes=("bfloat16",), batch_sizes=(256,)
        ),
        Sweep(
            works=("center", "distances"), batch_sizes=(256,), num_center=10_000, num_rows=100_000
        ),
        Sweep(
            works=("u_pgd",),
            encoders=("mocov3",),
            dtypes=("bfloat16",),
            batch_sizes=(256,),
            num_steps=10,
        ),
        Sweep(works=("u_pgd",), dtypes=("bfloat16",), batch_sizes=(32, 1024), num_steps=10),
        Sweep(
            works=_CERTIFICATES,
            dtypes=("bfloat16",),
            batch_sizes=(1024,),
            num_samples=100_000,
            num_center=10_000,
            repeats=1,
        ),
        Sweep(works=("training",), batch_sizes=(192,), repeats=5),
    ),
    # How time grows with images, steps, samples and the bank.
    "scaling": (
        Sweep(works=("forward", "u_pgd"), encoders=("demo",), batch_sizes=(16, 64, 256, 1024)),
        *(
            Sweep(works=("u_pgd",), encoders=("demo",), batch_sizes=(64,), num_steps=num)
            for num in (8, 32)
        ),
        *(
            Sweep(works=("noisy",), encoders=("demo",), batch_sizes=(64,), num_samples=num)
            for num in (1_024, 8_192)
        ),
        *(
            Sweep(works=("center",), encoders=("demo",), batch_sizes=(64,), num_center=num)
            for num in (2_500, 5_000, 10_000)
        ),
        *(
            Sweep(works=("distances",), encoders=("demo",), batch_sizes=(64,), num_rows=num)
            for num in (10_000, 100_000, 1_000_000)
        ),
    ),
    "toy": (
        Sweep(
            works=tuple(name for name in work.WORKS if name not in _CERTIFICATES + _STREAMS),
            encoders=("demo",),
            batch_sizes=(4,),
            num_samples=8,
            num_center=64,
            num_rows=256,
            repeats=2,
        ),
        Sweep(works=("u_pgd", "forward"), batch_sizes=(2,), num_steps=1, repeats=1),
        Sweep(
            works=_CERTIFICATES + _STREAMS,
            encoders=("demo",),
            batch_sizes=(64,),
            num_center=1_000,
            num_samples=1_000,
            repeats=1,
        ),
    ),
    "streams": (
        Sweep(works=("noise", "grid-noise", "forward"), repeats=3),
        Sweep(
            works=_STREAMS,
            encoders=("demo",),
            batch_sizes=(32,),
            num_center=1_000,
            num_samples=4_000,
            repeats=3,
        ),
    ),
}
"""What to measure: on a CPU, in one command on a GPU, how it scales, whether it runs, or what the
certificates of other smoothed encoders cost."""


def rehearsal(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """The same works, encoders and dtypes at a size that a CPU has in minutes."""
    few = dict(num_steps=1, num_samples=4, num_center=64, num_rows=256, repeats=1)
    some = dict(few, num_samples=1_000, num_center=1_000, encoders=("demo",))  # or no certificate
    small = [
        dataclasses.replace(
            sweep,
            batch_sizes=(64,) if sweep.works == _CERTIFICATES else (2 * jax.local_device_count(),),
            **(some if sweep.works == _CERTIFICATES else few),
        )
        for sweep in sweeps
    ]
    return list(dict.fromkeys(small))
