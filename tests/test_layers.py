"""No import climbs: each room imports only from those below it, and none goes in a circle."""

from __future__ import annotations

import ast
import pathlib

import pytest

import ur_jax

ROOT = pathlib.Path(ur_jax.__file__).parent
LAYERS = (
    ("types", "errors", "registry", "checks", "typed", "_begin"),
    ("stats",),
    ("devices", "distances"),
    ("metrics",),
    ("runs",),
    ("encoders",),
    ("data",),
    ("attacks", "probes"),
    ("certify",),
    ("training",),
    ("jobs",),
    ("report",),
    ("calls",),
    ("performance",),
    ("jobs.benchmark", "jobs.reproduce_cifar"),
    ("endings",),
    ("cli",),
)
"""From low to high. The benchmark is what uses all others."""

HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(ROOT.rglob("*.py"))


def room_of(module: str) -> str:
    """The room of a dotted name below the package; "" for the package itself."""
    parts = module.split(".")
    two = ".".join(parts[:2])
    return two if two in HEIGHT else parts[0]


def imports(path: pathlib.Path):
    """(line, dotted name below the package) of what a module imports when it is imported."""
    tree = ast.parse(path.read_text())
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in inside or not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module == "ur_jax":
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif node.module.startswith("ur_jax."):
            below = node.module.removeprefix("ur_jax.")
            for alias in node.names:
                is_module = (ROOT / below.replace(".", "/") / f"{alias.name}.py").exists()
                yield node.lineno, f"{below}.{alias.name}" if is_module else below


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_do_not_climb(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module == "__init__":
        return  # the package's front
    assert room_of(module) in HEIGHT, f"{module} is in no room of LAYERS"
    for line, imported in imports(path):
        if imported.startswith("__"):
            continue  # of the package itself, such as its version
        climbs = HEIGHT[room_of(imported)] > HEIGHT[room_of(module)]
        assert not climbs, f"{path.name}:{line} imports {imported}, which lies above"


def test_no_module_is_larger_than_one_idea():
    long = {p.name: n for p in MODULES if (n := len(p.read_text().splitlines())) > 490}
    assert not long, long
