"""How a result is shown: a table on a terminal and in a notebook, or a data frame."""

from __future__ import annotations

import abc
import io
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH = 80


class Shown(abc.ABC):
    """What prints as its table."""

    @abc.abstractmethod
    def __rich__(self) -> Any:
        """The table, for `rich`."""

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=_WIDTH, no_color=True, force_jupyter=False, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def _repr_mimebundle_(self, include: Sequence[str] = (), exclude: Sequence[str] = (), **_):
        """The table, for a notebook."""
        from rich.console import Console

        console = Console(width=_WIDTH, record=True, file=io.StringIO(), force_jupyter=False)
        console.print(self)
        html = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
        return {"text/plain": str(self), "text/html": html}


def to_arrow(records: Sequence[Mapping[str, Any]]):
    """Records of equal keys, one at least, as a `pyarrow.Table`."""
    import pyarrow as pa

    return pa.table({name: [record[name] for record in records] for name in records[0]})


def to_dataframe(table: Any):
    """A `pyarrow.Table` as a data frame: pandas', or polars' where only that is installed.

    Raises:
      UserError: if neither is installed.
    """
    from ur_jax.errors import UserError

    try:
        return table.to_pandas()
    except ImportError:
        pass
    try:
        import polars  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "A data frame needs pandas or polars: install one, or use to_arrow()."
        ) from None
    return polars.from_arrow(table)
