"""Progress for whoever watches: a bar in a terminal, a line in a notebook, now and then a line in a
log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

console = Console()
_LOG_SECONDS = 60.0
_shown: list[RichProgress] = []


class Progress(Protocol):
    """Passes items on and shows how far they are."""

    def __call__(
        self, iterable: Iterable[Any], description: str, total: int, /
    ) -> Iterable[Any]: ...


def quiet(iterable: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    """Passes items on and shows nothing."""
    return iterable


def watched(iterable: Iterable[Any], description: str, total: int) -> Iterator[Any]:
    """Passes items on under a bar with the time left; one line at the end where nobody watches."""
    with counter(description, total) as update:
        for number, item in enumerate(iterable, start=1):
            yield item
            update(number, getattr(item, "text", ""))  # of a step of training: its loss
    if not (console.is_terminal or console.is_jupyter):
        console.print(f"{description}: {total} batches done", highlight=False)


@contextlib.contextmanager
def counted(
    progress: Progress, description: str, total: int
) -> Iterator[Callable[[int, str], None]]:
    """Gives update(completed, text) for what is no passing on of items; the text has the time left.

    `watched` shows both, and ends with the text where nobody watches; any other progress is handed
    as many items as are completed.
    """
    if progress is not watched:
        items = iter(progress(range(total), description, total))
        passed = 0

        def pass_on(completed: int, text: str) -> None:
            nonlocal passed
            for _ in range(completed - passed):
                next(items, None)
            passed = max(passed, completed)

        yield pass_on
        if passed == total:
            next(items, None)  # it ends when one more is asked for
        return
    last = ""
    with counter(description, total, time_left=False) as show:

        def update(completed: int, text: str) -> None:
            nonlocal last
            last = f"{description}: {completed}/{total}, {text}"
            show(completed, text)

        yield update
    if last and not (console.is_terminal or console.is_jupyter):
        console.print(last, highlight=False)


@contextlib.contextmanager
def counter(
    description: str, total: int, *, time_left: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Gives update(completed, text) of a progress bar; a line a minute where nobody watches.

    Args:
      description: what is counted.
      total: how many there will be.
      time_left: show what is left at the pace so far; the text may tell it better.
    """
    if console.is_jupyter:
        yield _notebook_line(description, total, time_left)
        return
    shown = time.monotonic()
    with RichProgress(
        *_columns()[: None if time_left else -1],
        TextColumn("{task.fields[text]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=total, text="")
        _shown.append(bar)

        def update(completed: int, text: str) -> None:
            nonlocal shown
            bar.update(task, completed=completed, text=text)
            if not console.is_terminal and time.monotonic() - shown > _LOG_SECONDS:
                shown = time.monotonic()
                console.print(f"{description}: {completed}/{total} {text}", highlight=False)

        try:
            yield update
        finally:
            if bar in _shown:
                _shown.remove(bar)


def stop() -> None:
    """Ends the bars that are shown: a command that ends at once leaves them in the middle."""
    while _shown:
        _shown.pop().stop()


def _notebook_line(description: str, total: int, time_left: bool) -> Callable[[int, str], None]:
    """A line of a notebook's output that is written anew: no widget has to be installed for it."""
    from IPython.display import display  # pyright: ignore[reportMissingImports]

    start = time.monotonic()
    handle = display({"text/plain": description}, raw=True, display_id=True)

    def update(completed: int, text: str) -> None:
        seconds = time.monotonic() - start
        left = seconds / max(completed, 1) * (total - completed)
        line = f"{description}: {completed}/{total}, {seconds:.0f} s, "
        line += f"{left:.0f} s left {text}" if time_left else text
        handle.update({"text/plain": line}, raw=True)

    return update


def _columns() -> tuple[ProgressColumn, ...]:
    """Of a progress bar."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
