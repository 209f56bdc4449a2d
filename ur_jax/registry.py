"""Things that are added by name, and where a user's own ones come from.

    @RULES.register("my_rule")                # in the package, in one's own file, or in a package
    def ...                                   # whose entry points name the group
    METRICS.register("my_metric", Metric(...))

A registered thing is on the command line, in the tables, in the report and in the documentation.
What lies outside the package is imported by `--plugin FILE.py` (or `UR_JAX_PLUGINS`, several with a
comma), or by an entry point of the registry's group: `[project.entry-points."ur_jax.metrics"]`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, overload

from ur_jax.errors import NotFoundError, UserError, unknown_name

T = TypeVar("T")
PLUGINS = "UR_JAX_PLUGINS"
_registries: list[Registry[Any]] = []


class Registry(Mapping[str, T]):
    """Names and what they stand for, in the order of registration.

    Args:
      kind: what a name stands for, in words, for errors: "metric".
      group: of entry points by which installed packages add to it: "ur_jax.metrics".
      of: the class that items are instances of, where it is one.
    """

    def __init__(self, kind: str, group: str, of: type[T] | None = None):
        self.kind, self.group, self.of = kind, group, of
        self._items: dict[str, T] = {}
        self._outside: set[str] = set()
        self._pending: bool = True
        _registries.append(self)

    @overload
    def register(self, name: str, item: T) -> T: ...

    @overload
    def register(self, name: str) -> Callable[[T], T]: ...

    def register(self, name, item=None):
        """Adds an item, or decorates what is to be added; returns the item.

        Raises:
          UserError: for a name that is taken by something else, or that cannot be one; for an
            item of another class.
        """
        if not isinstance(name, str):
            raise UserError(f"Expected the name of a {self.kind} in quotes, got {name!r:.80}.")
        if item is None:
            return lambda decorated: self.register(name, decorated)
        if not name or set(name) & set("/\\= \t\n"):
            raise UserError(
                f"Expected the name of a {self.kind} without spaces, slashes and '=', got {name!r}."
            )
        if self.of is not None and not isinstance(item, self.of):
            raise UserError(
                f"Expected {self.of.__name__}(...) as the {self.kind} {name!r}, got "
                f"{type(item).__name__}."
            )
        if self._items.get(name, item) is not item:
            raise UserError(f"There is a {self.kind} {name!r} already; choose another name.")
        self._items[name] = item
        if _registering_module().partition(".")[0] != __package__:
            self._outside.add(name)
        return item

    @property
    def outside(self) -> dict[str, T]:
        """What was registered outside this package: its code is no version of ours."""
        self._load()
        return {name: self._items[name] for name in self._items if name in self._outside}

    @contextlib.contextmanager
    def replaced(self, name: str, item: T) -> Iterator[T]:
        """Has a name stand for another item for as long as a `with` lasts, as in a test."""
        self._load()
        before = dict(self._items)
        self._items[name] = item
        try:
            yield item
        finally:
            self._items = before

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._items:
            raise unknown_name(self.kind, name, self._items)
        return self._items[name]

    def get(self, name: str, default: Any = None) -> T | Any:
        """The item of a name, or the default."""
        self._load()
        return self._items.get(name, default)

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(tuple(self._items))

    def __len__(self) -> int:
        self._load()
        return len(self._items)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {len(self)} names)"

    def _load(self) -> None:
        """Asks installed packages, once."""
        if not self._pending:
            return
        self._pending = False
        for entry in importlib.metadata.entry_points(group=self.group):
            item = entry.load()
            if entry.name not in self._items:  # it may have registered itself
                self.register(entry.name, item)


def registries() -> tuple[Registry[Any], ...]:
    """All that there are."""
    return tuple(_registries)


def _registering_module() -> str:
    """Name of the module whose code, run from top to bottom, registers something at this moment."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__", "")


def import_object(place: str) -> Any:
    """Imports what `package.module:name` or `folder/file.py:name` names.

    Raises:
      UserError: for another form, a module that is not there, or one without the name.
    """
    module, _, name = place.rpartition(":")
    if not module or not name.isidentifier():
        raise UserError(
            f"Expected package.module:name or file.py:name, got {place!r}; name is a function of "
            "that module, as in encoders.py:make."
        )
    found = import_module(module)
    if not hasattr(found, name):
        raise unknown_name(
            f"name in {module}", name, [n for n in vars(found) if not n.startswith("_")]
        )
    return getattr(found, name)


def import_module(module: str) -> ModuleType:
    """Imports `package.module` or `folder/file.py`; an error inside it keeps its traceback.

    A file is imported as Python does a script's neighbours, by its stem, so that what it defines
    can be pickled for worker processes.

    Raises:
      NotFoundError: for a file or module that is not there.
      UserError: for a file whose name is another module's.
    """
    if not module.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # as `python -m` does
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # something that it imports itself
            raise NotFoundError(
                f"There is no module {module!r} ({error}); give the path of a file, or a module of "
                "an installed package or of the current folder."
            ) from error
    path = Path(module).expanduser().resolve()
    if not path.is_file():
        raise NotFoundError(f"There is no file {module}; check the path.")
    if not path.stem.isidentifier():
        raise UserError(f"Expected a file whose name is a Python name, got {path.name}; rename it.")
    known = sys.modules.get(path.stem)
    if known is None:
        sys.path.insert(0, str(path.parent))
        known = importlib.import_module(path.stem)
    if Path(getattr(known, "__file__", None) or "").resolve() != path:
        raise UserError(f"{path} has the name of another module, {path.stem!r}; rename the file.")
    return known


def load_plugins(places: str | None = None) -> None:
    """Imports files and modules that register things: a comma between them.

    Args:
      places: as `import_module` takes them; by default the environment variable UR_JAX_PLUGINS.
    """
    for place in (os.environ.get(PLUGINS, "") if places is None else places).split(","):
        if place.strip():
            import_module(place.strip())
