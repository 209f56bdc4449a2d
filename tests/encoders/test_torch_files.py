"""Published files: nothing in them runs, and they map without a remainder or with one error."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from published_files import LAYOUTS, TINY, VARIANTS, save_torch, tensors

from ur_jax.encoders import mapping
from ur_jax.encoders.zoo import ENCODERS


def _assert_tiny(published):
    source = tensors("")
    flat = {"params": published.variables["params"], "stats": published.variables["batch_stats"]}
    stem = flat["params"]["backbone"]["stem"]
    np.testing.assert_array_equal(
        stem["conv"]["kernel"], source["conv1.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(stem["norm"]["scale"], source["bn1.weight"])
    np.testing.assert_array_equal(
        flat["stats"]["backbone"]["stem"]["norm"]["var"], source["bn1.running_var"]
    )
    np.testing.assert_array_equal(flat["params"]["head"]["fc"]["kernel"], source["fc.weight"].T)


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_both_formats_of_torch(tmp_path, legacy):
    path = save_torch(tmp_path / "x.pth.tar", tensors(), legacy)
    _assert_tiny(mapping.load_published(path, TINY))


def test_reads_half_precision(tmp_path):
    import torch

    group = {k: torch.from_numpy(v).to(torch.bfloat16) for k, v in tensors().items()}
    torch.save({"state_dict": group}, tmp_path / "half.pt")
    kernel = mapping.load_published(tmp_path / "half.pt", TINY).variables["params"]["head"]["fc"]
    assert kernel["kernel"].dtype == np.float32
    np.testing.assert_allclose(kernel["kernel"], tensors("")["fc.weight"].T, rtol=2**-8)


def test_reads_safetensors_without_torch(tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    save_file(tensors(), tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    _assert_tiny(mapping.load_published(tmp_path / "x.safetensors", TINY))


def test_without_torch_says_how_to_get_it(tmp_path, monkeypatch):
    path = save_torch(tmp_path / "x.pth", tensors())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'ur_jax\[torch\]'"):
        mapping.load_published(path, TINY)


@pytest.mark.parametrize("entry", [None, "model", "any_name"])
def test_finds_the_only_tensors_of_a_users_file(tmp_path, entry):
    import torch

    group = {k: torch.from_numpy(v) for k, v in tensors().items()}
    torch.save(group if entry is None else {entry: group, "epoch": 1}, tmp_path / "own.pt")
    _assert_tiny(mapping.load_published(tmp_path / "own.pt", TINY))


def test_says_what_a_file_without_weights_holds(tmp_path):
    import torch

    torch.save({"epoch": 3, "optimizer": {"state": {}}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"'state_dict'.*a dict with epoch, optimizer"):
        mapping.load_published(tmp_path / "x.pt", TINY)


def test_fine_tuned_and_training_files(tmp_path):
    """What training leaves in a file is a part or ignored by name, and plain data is allowed."""
    import torch

    keys = {k.replace("encoder_q", "encoder_k"): np.asarray(2 * v) for k, v in tensors().items()}
    extra = keys | {"module.queue": np.zeros((5, 16)), "module.queue_ptr": np.zeros(1, np.int64)}
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = save_torch(
        tmp_path / "checkpoint_0209.pth.tar",
        tensors() | extra,
        optimizer=optimizer.state_dict(),
        args=argparse.Namespace(lr=0.1, schedule=[15, 20]),
        meters=collections.defaultdict(list, loss=[1.0]),
        best=np.float64(0.5),
    )
    loaded = mapping.load_published(path, TINY)
    _assert_tiny(loaded)
    momentum = loaded.parts["momentum"]["params"]["head"]["fc"]["bias"]
    np.testing.assert_array_equal(momentum, 2 * tensors()["module.encoder_q.fc.bias"])
    # A part is there as a whole or not at all.
    del keys["module.encoder_k.fc.bias"]
    with pytest.raises(ValueError, match="missing: module.encoder_k.fc.bias"):
        mapping.map_tensors(tensors() | keys, TINY)


class _Malicious:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_pickle_runs_nothing(tmp_path, legacy):
    marker = tmp_path / "ran"
    path = save_torch(tmp_path / "x.pth", tensors(), legacy, extra=_Malicious(marker))
    asked = rf"asks for {os.mkdir.__module__}\.mkdir.*Nothing was run"
    with pytest.raises(ValueError, match=asked):
        mapping.load_published(path, TINY)
    assert not marker.exists()


def test_whole_pickled_model_is_refused_by_name(tmp_path):
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        mapping.load_published(tmp_path / "model.pt", TINY)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "x.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.6, 0.97])
def test_truncated_file(tmp_path, name, kept):
    from safetensors.numpy import save_file

    path = tmp_path / name
    if name == "x.safetensors":
        save_file(tensors(), path)
    else:
        save_torch(path, tensors(), legacy=name == "legacy.pth")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=f"{name} to be .*truncated"):
        mapping.load_published(path, TINY)


def test_no_weights_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nothing.pth"):
        mapping.load_published(tmp_path / "nothing.pth", TINY)
    with pytest.raises(ValueError, match="got the directory"):
        mapping.load_published(tmp_path, TINY)
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="x.npz to be a PyTorch checkpoint"):
        mapping.load_published(tmp_path / "x.npz", TINY)


@pytest.mark.parametrize("name", LAYOUTS)
def test_mutated_layout_names_all_three(golden_dir, name):
    """One key missing, one extra and one transposed come in one error, for every family."""
    layout = json.loads((golden_dir / f"{name}.layout.json").read_text())
    spec = ENCODERS[VARIANTS.get(name, name)]
    listed = [t for group in layout["tensors"].values() for t in group]
    arrays = {t["key"]: np.broadcast_to(np.zeros((), t["dtype"]), t["shape"]) for t in listed}
    mapping.map_tensors(arrays, spec, layout["container"])

    used = [t["key"] for t in listed if t["used"] and t["key"].endswith("weight")]
    kernels = [key for key in used if arrays[key].ndim > 1 and arrays[key].shape[0] > 3]
    missing = kernels[len(kernels) // 2]
    transposed = next(k for k in kernels[::-1] if arrays[k].T.shape != arrays[k].shape)
    extra = f"{spec.prefix}extra.weight"
    expected = arrays[transposed].shape
    del arrays[missing]
    arrays |= {extra: np.zeros(3, np.float32), transposed: arrays[transposed].T}
    with pytest.raises(ValueError) as error:
        mapping.map_tensors(arrays, spec, layout["container"])
    message = str(error.value)
    assert "1 missing, 1 unexpected, 1 mis-shaped" in message
    assert f"missing: {missing} for " in message
    assert f"unexpected: {extra} (3,)" in message
    assert f"mis-shaped: {transposed} is {expected[::-1]}" in message


def test_long_lists_are_cut():
    arrays = tensors() | {f"module.encoder_q.extra{i}": np.zeros(1) for i in range(25)}
    with pytest.raises(ValueError, match="25 unexpected") as error:
        mapping.map_tensors(arrays, TINY)
    assert str(error.value).count("unexpected: module") == 10
    assert "unexpected: and 15 more" in str(error.value)


def test_integer_weights_are_refused():
    arrays = tensors() | {"module.encoder_q.fc.bias": np.zeros(5, np.int32)}
    with pytest.raises(ValueError, match=r"fc\.bias is int32, expected floating point"):
        mapping.map_tensors(arrays, TINY)


@pytest.mark.parametrize("prefix", ["backbone.", "model.", "module.", "", "net.module.f."])
def test_error_suggests_the_prefix_which_then_works(prefix):
    arrays = tensors(prefix) | ({"classifier.weight": np.zeros((2, 4))} if prefix else {})
    with pytest.raises(ValueError, match=re.escape(f"pass prefix={prefix!r}")):
        mapping.map_tensors(arrays, TINY)
    published = mapping.map_tensors(arrays, TINY, prefix=prefix)
    _assert_tiny(published)
    assert published.left_out == (("classifier.weight",) if prefix else ())


def test_prefix_needs_no_dot():
    _assert_tiny(mapping.map_tensors(tensors("backbone."), TINY, prefix="backbone"))


def test_file_of_another_kind_of_network():
    with pytest.raises(ValueError, match=r"no tensor of encoder 'tiny'; it has a\.b.*check"):
        mapping.map_tensors({"a.b": np.zeros(3)}, TINY)


def _published(path, **settings):
    return mapping.load_published(path, TINY, **settings)


def _write(path, **entries):
    """A file of the tiny encoder with other entries beside its tensors, and one more group."""
    import torch

    group = {k: torch.from_numpy(v.copy()) for k, v in tensors().items()}
    torch.save({"state_dict": group | entries.pop("beside", {}), **entries}, path)
    return path


@pytest.mark.parametrize(
    "beside",
    [
        {"epoch": 3},
        {"head._extra_state": None},
        {"lr": 0.1, "name": "mine", "done": True},
        {"best": np.float32(0.5), "count": np.int64(3)},
        {"classes": np.array(["cat", "dog"])},
        {"args": argparse.Namespace(lr=0.1)},
        {"at": datetime.datetime(2024, 1, 2), "folder": pathlib.Path(".")},
        {3: 4},
    ],
)
def test_what_lies_beside_the_tensors_is_skipped_by_name(tmp_path, beside):
    path = _write(tmp_path / "x.pth", beside=beside)
    loaded = _published(path)
    _assert_tiny(loaded)
    assert loaded.skipped == tuple(map(str, beside))


def test_weights_as_numpy_arrays_and_the_states_of_random_numbers(tmp_path):
    import random

    import torch

    states = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    arrays = tensors()
    torch.save({"model": arrays, "rng": states, "rng_state": torch.get_rng_state()}, tmp_path / "x")
    _assert_tiny(_published(tmp_path / "x"))
    halves = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in arrays.items()}
    torch.save(halves, tmp_path / "half.pt")
    kernel = _published(tmp_path / "half.pt").variables["params"]["head"]["fc"]["kernel"]
    np.testing.assert_allclose(kernel, arrays["module.encoder_q.fc.weight"].T, rtol=1e-3)


def test_one_of_several_groups_is_chosen(tmp_path):
    import torch

    group = {k: torch.from_numpy(v) for k, v in tensors().items()}
    double = {k: 2 * v for k, v in group.items()}
    path = tmp_path / "two.pth"
    torch.save({"model": group, "model_ema": {"module": double}, "epoch": 2}, path)
    with pytest.raises(ValueError, match=r"several: 'model' \(8 .*'model_ema.module'.*--gr"):
        _published(path)
    _assert_tiny(_published(path, group="model"))
    chosen = _published(path, group="model_ema.module").variables["params"]["head"]["fc"]
    np.testing.assert_array_equal(chosen["bias"], 2 * tensors()["module.encoder_q.fc.bias"])
    with pytest.raises(ValueError, match=r"two.pth to .* in 'ema', but it has 'model' \("):
        _published(path, group="ema")


def test_a_tensor_of_another_kind_is_named(tmp_path):
    import torch

    group = {k: torch.from_numpy(v) for k, v in tensors().items()}
    key = "module.encoder_q.fc.weight"
    group[key] = group[key].to_sparse()
    torch.save({"state_dict": group}, tmp_path / "sparse.pth")
    with pytest.raises(ValueError, match=rf"sparse.pth, but {key} is torch.float32, .*sparse"):
        _published(tmp_path / "sparse.pth")


@pytest.mark.parametrize("head", ["absent", "other"])
@pytest.mark.parametrize("prefix", ["module.encoder_q.", "backbone."])
def test_a_backbone_without_its_head_or_with_another(tmp_path, head, prefix):
    arrays = {k: v for k, v in tensors(prefix).items() if ".fc." not in k}
    if head == "other":
        arrays |= {f"{prefix}fc.weight": np.zeros((10, 4), "f4"), f"{prefix}fc.bias": np.ones(10)}
    given = None if prefix.startswith("module") else prefix
    with pytest.raises(ValueError, match="2 missing" if head == "absent" else "2 mis-shaped"):
        mapping.map_tensors(arrays, TINY, prefix=given)
    mapped = mapping.map_tensors(arrays, TINY.without_head(), prefix=given)
    assert set(mapped.variables["params"]) == {"backbone"} and not mapped.left_out
    whole = mapping.map_tensors(tensors(), TINY).variables
    for kind in ("params", "batch_stats"):
        ours, theirs = (v[kind]["backbone"] for v in (mapped.variables, whole))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_decoder_of_mae_is_known(golden_dir):
    layout = json.loads((golden_dir / "mae.layout.json").read_text())
    listed = [t for group in layout["tensors"].values() for t in group]
    arrays = {t["key"]: np.broadcast_to(np.zeros((), t["dtype"]), t["shape"]) for t in listed}
    decoder = ("mask_token", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight")
    arrays |= {name: np.zeros((2, 2), "f4") for name in decoder}
    mapping.map_tensors(arrays, ENCODERS["mae"], layout["container"])
