"""What the READMEs say runs: their Python as it stands, their commands with flags that exist."""

from __future__ import annotations

import ast
import doctest
import importlib
import pathlib
import re
import shlex
import sys

import pytest

import ur_jax
from ur_jax import cli
from ur_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = pathlib.Path(ur_jax.__file__).parent
READMES = sorted(
    path for path in (*ROOT.glob("*.md"), *ROOT.glob("experiments/**/*.md"), *PACKAGE.rglob("*.md"))
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def blocks(path: pathlib.Path, language: str) -> list[str]:
    """The fenced blocks of a language in a README."""
    return fenced(path.read_text(), language)


def fenced(text: str, language: str) -> list[str]:
    """The fenced blocks of a language in a text."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for name, block in found if name == language]


@pytest.mark.parametrize(
    "path", [p for p in READMES if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict = {}
    for block in blocks(path, "python"):
        name = re.match(r"# (\w+\.py)\n", block)
        if name:  # a file that the reader is to write
            (tmp_path / name[1]).write_text(block)
            made = getattr(importlib.import_module(name[1][:-3]), "make", None)
            is_torch = made is not None and type(made()).__module__.startswith("torch.nn")
            assert made is None or isinstance(made(), ur_jax.Encoder) or is_torch
            if is_torch:
                encoder = ur_jax.load_encoder(f"torch:{name[1]}:make,input_size=32")
                assert encoder.dimension == 8
            sys.modules.pop(name[1][:-3])
        else:
            exec(compile(block, f"{path.name}", "exec"), namespace)


def commands(text: str):
    """(command, its flags) of every `ur-jax X` and `python experiments/X.py` in a text."""
    text = re.sub(r"\\\\?\n\s*", " ", text)
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
    indented = re.findall(r"^ {4}(.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    lines = [*"\n".join(fenced(text, "")).splitlines(), *indented]
    for span in (*(re.sub(r"\s+", " ", span) for span in spans), *lines):
        found = re.search(r"(?:ur-jax |python experiments/)([\w-]+)(?:\.py)?(.*)", span)
        if found and found[1].replace("_", "-") in cli.names():
            yield found[1].replace("_", "-"), found[2].partition("#")[0].strip()


def cases():
    for path in READMES:
        yield from ((str(path.relative_to(ROOT)), *each) for each in commands(path.read_text()))
    for path in MODULES:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        yield from ((str(path.relative_to(PACKAGE)), *each) for each in commands(text))


@pytest.mark.parametrize("where, name, flags", sorted(set(cases())))
def test_commands_parse(where, name, flags):
    words = shlex.split(flags)
    if not words or "..." in words:
        return  # its name alone
    try:
        cli.parse(cli.find(name), words)
    except UserError as error:
        pytest.fail(f"{where}: ur-jax {name} {flags}\n{error}")


@pytest.mark.parametrize(
    "path", [p for p in MODULES if ">>> " in p.read_text()], ids=lambda p: p.stem
)
def test_examples_in_docstrings(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    assert doctest.testmod(importlib.import_module(name)).failed == 0
