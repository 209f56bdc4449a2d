"""How many images fit into some minutes: measured on this machine once, then fixed and recorded.

    job = LabelFree(encoder=encoder, images="folder:photos", minutes=5)

Compiling is counted, and some time is left for what is decoded and drawn. A run that goes on takes
the number that it began with, however fast the machine is now, and so ends with the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax

from ur_jax.errors import UserError, shown
from ur_jax.jobs.progress import console

FEWEST = 6
"""Images whose median has a finite 95 % interval: fewer are no answer."""

_SHARE = 0.85  # of the time: in the rest images are decoded, tables and plots are made
_SECONDS = 60.0


class Speed(NamedTuple):
    """What a program takes here: seconds to compile it, and of a sample (see `Job.samples`)."""

    compiling: float
    sample: float


class Budget(NamedTuple):
    """Time, and how fast it goes.

    Attributes:
      minutes: asked for.
      spent: seconds that are gone already.
      num_programs: that are to be compiled.
      speed: of this host.
      num_hosts: that share the work.
    """

    minutes: float
    spent: float
    num_programs: int
    speed: Speed
    num_hosts: int = 1

    @property
    def samples(self) -> float:
        """How many samples fit; negative if not even the programs do."""
        seconds = _SECONDS * self.minutes * _SHARE - self._fixed
        return seconds * self.num_hosts / self.speed.sample

    def needed(self, samples: float) -> float:
        """Minutes that so many samples take."""
        seconds = self._fixed + samples * self.speed.sample / self.num_hosts
        return seconds / _SHARE / _SECONDS

    @property
    def _fixed(self) -> float:
        """Seconds that do not depend on the number of images."""
        return self.spent + self.num_programs * self.speed.compiling


def check_minutes(minutes: float) -> None:
    """Raises UserError for what is no time."""
    if not (math.isfinite(minutes) and minutes > 0):
        raise UserError(f"Expected minutes as a positive number, got {shown(minutes)}.")


def speed(run: Callable[[], Any], samples: int) -> Speed:
    """Times a program: once with compiling it, once without.

    Args:
      run: runs it; gives arrays.
      samples: that pass through the encoder meanwhile.
    """
    seconds = []
    for _ in range(2):
        begin = time.monotonic()
        jax.block_until_ready(run())
        seconds.append(time.monotonic() - begin)
    first, warm = seconds
    return Speed(max(first - warm, 0.0), warm / samples)


def check_alone(minutes: float, num_images: int, unasked: Collection[int]) -> None:
    """Raises UserError for minutes beside a number of images that is not a preset's."""
    if num_images not in unasked:
        raise UserError(f"Expected minutes or num_images, got both: {minutes:g} and {num_images}.")


def too_few(budget: Budget, samples: float, num_images: int, cheaper: str) -> UserError:
    """What to say where not even the fewest images fit, and what would be cheaper."""
    needed = math.ceil(10 * budget.needed(samples)) / 10
    return UserError(
        f"Expected minutes >= {needed:g} on this machine, got {budget.minutes:g}: {num_images} "
        "images, the fewest whose median has an interval, take so long. Cheaper: "
        f"{cheaper}."
    )


def tell(budget: Budget, samples: float, what: str) -> None:
    """Says what fits, and how long it will take."""
    took = budget.needed(samples) * _SHARE
    console.print(
        f"{budget.minutes:g} minutes: {what} fit, about {took:.1f} minutes of computing.",
        highlight=False,
        soft_wrap=True,
    )
