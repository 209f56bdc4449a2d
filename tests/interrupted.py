"""A process that ends in the middle, as it were."""

from __future__ import annotations

import itertools


def stop_after(count):
    """A progress bar that ends the process, as it were, before item `count`."""
    left = itertools.count(count, -1)

    def stopped(iterable, *_):
        for item in iterable:
            if next(left) == 0:
                raise KeyboardInterrupt
            yield item

    return stopped
