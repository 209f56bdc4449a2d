"""Eight CPU devices, strict dtype promotion, full-precision products, shapes checked at every call
of a public function, a cache of compiled programs, and the shared data."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import signal
import tempfile

# Ctrl-C is ignored in what a shell starts in the background, and by all that this starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Eight devices on two busy cores may wait longer for each other than the 40 s until XLA aborts.
_FLAGS = ["--xla_cpu_collective_call_terminate_timeout_seconds=600"]
# Most of what tests cost is compiling, and most of that is making small programs fast. Not so in
# files that use `optimised`, nor with XLA_FLAGS=--xla_backend_optimization_level=3, which compiles
# everything as users do.
_LEVEL, _QUICKLY = "xla_backend_optimization_level", "JAX_DISABLE_MOST_OPTIMIZATIONS"
if _LEVEL not in os.environ.get("XLA_FLAGS", ""):
    os.environ[_QUICKLY] = "1"
    _FLAGS += [f"--{_LEVEL}=1", "--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no other way
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
# Here and in what is started: the compilers for GPUs and TPUs are installed, their devices are not.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import typed_calls  # noqa: E402

jax.config.update("jax_disable_most_optimizations", os.environ.get(_QUICKLY) == "1")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

typed_calls.install()

_MANY_MAPS = 15_000
_LONGEST = ("parity", "recorded", "protocol", "training", "hosts", "cli", "launchers", "gates")
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config):
    """Keeps compiled programs and hashes of images for as long as the tests run, for all of their
    processes, and leaves the user's own cache alone."""
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ["XDG_CACHE_HOME"] = folder.name
    os.environ.setdefault(_CACHE, folder.name)
    jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process ends with one of them while others wait."""
    longest = {f"test_{name}.py": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: longest.get(item.path.name, len(longest)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, which compiles and prepares once for all of them."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # by number of tests, which says little
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs, whose memory maps a process may hold only 65,530 of."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimised():
    """For files whose programs run for longer than it takes to make them fast."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ.get(_QUICKLY) == "1")


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """Real pictures, which are never committed: they lie beside the checkout."""
    if not _SHARED.is_dir():
        pytest.skip(f"needs real pictures, expected beside the checkout in {_SHARED.name}/data")
    return _SHARED


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """The reference outputs, see their README."""
    return pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden(golden_dir):
    """Reads one file of reference outputs: golden("mocov2.npz")."""
    return lambda name: np.load(golden_dir / name)


@pytest.fixture(scope="session")
def mocov2_encoder(golden_dir):
    """The MoCo v2 encoder with the reference outputs' synthetic weights."""
    import json

    import reference_rules

    from ur_jax.encoders import loading, mapping
    from ur_jax.encoders.zoo import ENCODERS

    layout = json.loads((golden_dir / "mocov2.layout.json").read_text())
    spec = ENCODERS["mocov2"]
    published = mapping.map_tensors(reference_rules.state_dict(layout), spec)
    return loading.make_encoder(spec, published.variables, published.config)
