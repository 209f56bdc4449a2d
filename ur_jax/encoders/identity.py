"""What determines an encoder's numbers, for records: settings, weights, and the function itself.

Two encoders with equal identities give equal representations. The function is described without
running it, in a way that neither another version of JAX nor another machine changes: by its source
without comments and layout, by what it reads from closures, globals and fields, down to the arrays
there, and by the arrays that tracing it finds. Functions of libraries are described by their names.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import io
import sys
import textwrap
import tokenize
import types
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ur_jax.encoders.base import Encoder
from ur_jax.encoders.checkpoints import tree_hash
from ur_jax.types import PyTree

_LIBRARIES = {
    *sys.stdlib_module_names,
    *("ur_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "optax", "chex", "orbax", "torch"),
    *("haiku", "equinox", "einops", "ml_dtypes", "etils", "jaxtyping", "beartype"),
}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), np.dtype)
_LAYOUT = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
)
_FLAX_FIELDS = ("parent", "scope")  # of a linen module: where it stands, no setting


def described(encoder: Encoder) -> dict[str, Any]:
    """What determines an encoder's numbers; JSON values.

    Args:
      encoder: the encoder.

    Returns:
      Its name, representation, dtype, hash of the weights, input size, preparation, mean and std,
      and a hash of its function. No place: the same encoder from another folder is the same.
    """
    return {
        "encoder": encoder.name,
        "representation": encoder.representation,
        "dtype": encoder.dtype,
        "weights_sha256": tree_hash(encoder.params),
        "input_size": list(encoder.input_size),
        "preparation": encoder.preparation,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "network": network_hash(encoder),
    }


def network_hash(encoder: Encoder) -> str:
    """Hash of an encoder's function, 16 hexadecimal digits: its architecture and its constants."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    leaves, structure = jax.tree.flatten(jax.tree.map(shape, encoder.params))
    images = jax.ShapeDtypeStruct((2, *encoder.input_size, 3), jnp.dtype(encoder.dtype))
    arguments = (encoder.apply_fn, structure, tuple(leaves), images)
    return (_cached_hash if _is_hashable(arguments) else _hash)(*arguments)


def code_hash(value: Any) -> str:
    """Hash of a function, class or object of another's code, 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(Description().of(value)).encode()).hexdigest()[:16]


def _hash(apply_fn: Any, structure: Any, leaves: tuple, images: jax.ShapeDtypeStruct) -> str:
    """Hash of a function of (params, images)."""
    closed = jax.make_jaxpr(apply_fn)(structure.unflatten(leaves), images)
    arrays = sorted({_array(value) for value in _constants(closed)})
    text = "\n".join([*Description().of(apply_fn), *arrays])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_cached_hash = functools.lru_cache(maxsize=32)(_hash)


def _is_hashable(value: Hashable) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _constants(closed: ClosedJaxpr) -> Iterator[Any]:
    """Arrays that a traced function has in it; single numbers may be written in as code."""
    values = list(closed.consts)
    for equation in closed.jaxpr.eqns:
        values += [atom.val for atom in equation.invars if isinstance(atom, Literal)]
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))
        )
        for part in inner:
            if isinstance(part, Jaxpr):
                part = ClosedJaxpr(part, ())
            if isinstance(part, ClosedJaxpr):
                yield from _constants(part)
    yield from (value for value in values if np.size(value) > 1)


def _array(value: PyTree) -> str:
    """An array by its shape and content, whatever its precision."""
    return f"array {np.shape(value)} {tree_hash(value)}"


class Description:
    """The lines that describe a value; what was met before is only pointed to."""

    def __init__(self):
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is given anew

    def of(self, value: Any) -> Iterator[str]:
        """Yields the lines of a value and of all that it refers to."""
        if isinstance(value, _PLAIN):
            yield repr(value)
            return
        if isinstance(value, types.ModuleType):
            yield f"module {value.__name__.partition('.')[0]}"
            return
        if id(value) in self._seen:
            yield f"see {self._seen[id(value)]}"
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            yield _array(value if _is_numeric(value) else np.frombuffer(_bytes(value), np.uint8))
        elif isinstance(value, Mapping):
            for key in sorted(value, key=repr):
                yield f"key {key!r}"
                yield from self.of(value[key])
        elif isinstance(value, (list, tuple)):
            yield f"{len(value)} items"
            for item in value:
                yield from self.of(item)
        elif isinstance(value, (set, frozenset)):
            yield from sorted("\n".join(self.of(item)) for item in value)
        elif isinstance(value, functools.partial):
            yield from self.of((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield from self.of((value.__func__, value.__self__))
        elif isinstance(value, (type, types.FunctionType)):
            yield from self._code(value)
        elif hasattr(value, "__wrapped__"):  # of jit and other decorators
            yield from self.of(value.__wrapped__)
        else:
            yield from self._instance(value)

    def _instance(self, value: Any) -> Iterator[str]:
        """The class and the fields of an object."""
        is_code = isinstance(value, types.BuiltinFunctionType) or hasattr(value, "__qualname__")
        yield from self.of(value.__qualname__ if is_code else type(value))
        if dataclasses.is_dataclass(value):
            names = [f.name for f in dataclasses.fields(value) if f.compare]
            yield from self.of({n: getattr(value, n, None) for n in names if n not in _FLAX_FIELDS})
        elif not is_code:
            names = {*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())}
            yield from self.of({n: getattr(value, n, None) for n in names if n[0] != "_"})

    def _code(self, value: type | types.FunctionType) -> Iterator[str]:
        """The source of a function or class, and what it reads; of a library's only the name."""
        yield f"{type(value).__name__} {value.__qualname__}"
        if (getattr(value, "__module__", None) or "").partition(".")[0] in _LIBRARIES:
            return
        source = list(_source(value))
        yield from source
        if isinstance(value, type) and not any(source):  # typed in
            yield from self.of({n: v for n, v in vars(value).items() if n[0] != "_"})
        functions = [value] if isinstance(value, types.FunctionType) else _functions_of(value)
        for function in functions:
            if function.__closure__:
                yield from self.of([_content(cell) for cell in function.__closure__])
            yield from self.of((function.__defaults__, function.__kwdefaults__))
            for name in sorted(_names(function.__code__) & set(function.__globals__)):
                yield f"global {name}"
                yield from self.of(function.__globals__[name])
        if isinstance(value, type):
            yield from self.of(value.__bases__)


def _functions_of(value: type) -> list[types.FunctionType]:
    """The functions of a class, as they were written: Flax wraps those of its modules."""
    functions = (inspect.unwrap(v) for v in vars(value).values() if callable(v))
    own = [f for f in functions if isinstance(f, types.FunctionType)]
    return [f for f in own if f.__module__ == value.__module__]


def _content(cell: Any) -> Any:
    """What a closure's cell holds; it may hold nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _names(code: types.CodeType) -> set[str]:
    """Names that a code reads, those of the functions inside it included."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _source(value: type | types.FunctionType) -> Iterator[str]:
    """The words of a source, without comments and layout, which change no number."""
    try:
        text = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):  # typed in, or made by `exec`
        text = ""
    words = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in _LAYOUT:
                words.append(token.string)
    except (tokenize.TokenError, SyntaxError):
        pass  # a lambda's lines may begin or end within an expression
    yield " ".join(words)
    if isinstance(value, types.FunctionType) and (not words or value.__name__ == "<lambda>"):
        code = value.__code__  # two lambdas of a line have the same lines
        plain = [const for const in code.co_consts if isinstance(const, _PLAIN)]
        yield repr((code.co_names, code.co_varnames, plain))
        if not words:  # typed in
            yield hashlib.sha256(code.co_code).hexdigest()


def _is_numeric(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool


def _bytes(value: Any) -> bytes:
    """The content of an array that holds no numbers: keys, text, objects."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(value)).tobytes()
    return repr(np.asarray(value).tolist()).encode()
