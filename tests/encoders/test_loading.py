"""Encoders come back from files and checkpoints with the same numbers, or with one clear error."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import sys

import fuzz_flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_rules
from flax import traverse_util
from published_files import TINY, save_torch, tensors

import ur_jax
from ur_jax import cli, devices
from ur_jax.attacks import AttackConfig, u_pgd
from ur_jax.encoders import checkpoints, loading, mapping, torch_files
from ur_jax.encoders import convert as convert_weights
from ur_jax.encoders.zoo import ENCODERS


@pytest.fixture
def tiny():
    """An encoder small enough to save and load in every test, published like the others."""
    with ENCODERS.replaced("tiny", TINY) as spec:
        yield spec


@pytest.fixture
def published(tmp_path, tiny):
    return save_torch(tmp_path / "tiny.pth.tar", tensors())


@pytest.fixture
def converted(tmp_path, published):
    out = tmp_path / "converted"
    convert_weights.main(convert_weights.Config("tiny", published, out))
    return out


@pytest.fixture(scope="module")
def demo_variables():
    """Random variables of the encoder that ships with the package, statistics included."""
    rng = np.random.default_rng(0)
    shapes = mapping.variable_shapes(ENCODERS["demo"], {})
    draws = {
        path: rng.standard_normal(shape) * np.sqrt(1.25 / np.prod(shape[:-1]))
        if len(shape) > 1
        else rng.uniform(0.5, 1.5, shape)
        for path, shape in ((path, leaf.shape) for path, leaf in shapes.items())
    }
    variables = traverse_util.unflatten_dict(draws, sep="/")
    return jax.tree.map(np.float32, variables)


@jax.jit
def _represent(encoder, images):
    return encoder(images)


IMAGES = reference_rules.images(8, 8, range(16))


def test_reference_value(published):
    """The whole encoder against NumPy, at one pixel of its 3x3 convolution."""
    image = IMAGES[:1, :3, :3]
    spec = {k.removeprefix("module.encoder_q."): v for k, v in tensors().items()}
    x = (image - np.float32(TINY.mean)) / np.float32(TINY.std)
    conv = np.einsum("bhwi,oihw->bo", x, spec["conv1.weight"])
    scale = spec["bn1.weight"] / np.sqrt(spec["bn1.running_var"] + 1e-5)
    features = (conv - spec["bn1.running_mean"]) * scale + spec["bn1.bias"]
    expected = features @ spec["fc.weight"].T + spec["fc.bias"]
    for fold in (True, False):
        encoder = loading.load_encoder(published, "tiny", fold=fold).replace(input_size=(3, 3))
        np.testing.assert_allclose(_represent(encoder, image), expected, rtol=1e-5)


def test_the_command_that_is_printed_next_runs(published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a folder"
    convert_weights.main(convert_weights.Config("tiny", published, out))
    (line,) = (text for text in capsys.readouterr().out.splitlines() if "Next: " in text)
    program, command, *words = shlex.split(line.removeprefix("Next: "))
    assert program == "ur-jax" and str(out) in words
    # It gets to its work: the encoder is loaded, the images are listed, the settings are met.
    with fuzz_flags.nothing_computes(), pytest.raises(fuzz_flags.Computed):
        cli.run(command, words)


def test_checkpoint_gives_the_published_numbers(published, converted, monkeypatch):
    direct = loading.load_encoder(published, "tiny")
    monkeypatch.setitem(sys.modules, "torch", None)
    restored = loading.load_encoder(converted)
    assert loading.weights_hash(restored) == loading.weights_hash(direct)
    assert restored.apply_fn == direct.apply_fn and restored.name == "tiny"
    jax.tree.map(np.testing.assert_array_equal, restored.params, direct.params)


def test_one_device_and_eight(converted):
    encoder = loading.load_encoder(converted)
    results = []
    for used in (jax.devices()[:1], jax.devices()):
        mesh = devices.data_mesh(used)
        on_mesh = devices.replicate(mesh, encoder), devices.shard(mesh, IMAGES)
        results.append(np.asarray(_represent(*on_mesh)))
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_other_weights_do_not_recompile(converted):
    traces = []

    @jax.jit
    def represent(encoder, images):
        traces.append(encoder)
        return encoder(images)

    represent(loading.load_encoder(converted), IMAGES)
    variables, _ = checkpoints.restore_encoder(converted)
    represent(loading.make_encoder(TINY, jax.tree.map(lambda x: 2 * x, variables)), IMAGES)
    assert len(traces) == 1


def test_folding_agrees_on_random_statistics(demo_variables):
    """The CIFAR ResNet-20, with no gain, bias or statistic at its initial value."""
    images = reference_rules.images(32, 32)
    make = functools.partial(loading.make_encoder, ENCODERS["demo"], demo_variables)
    folded, unfolded = (np.asarray(_represent(make(fold=fold), images)) for fold in (True, False))
    assert np.ptp(unfolded) > 0.1
    np.testing.assert_allclose(folded, unfolded, rtol=1e-4, atol=1e-5 * abs(unfolded).max())


def test_representations_and_dtypes(published):
    load = lambda *args, **kwargs: loading.load_encoder(published, "tiny", *args, **kwargs)
    dimensions = {r: load(r).dimension for r in ("paper", "features", "backbone", "projection")}
    assert dimensions == {"paper": 5, "features": 4, "backbone": 4, "projection": 5}
    half = load(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.bfloat16.dtype}
    exact, rounded = np.asarray(_represent(load(), IMAGES)), _represent(half, IMAGES)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert rounded.dtype == np.float32 and 0 < error < 0.02
    with pytest.raises(ValueError, match=r"Unknown representation 'projecton'.*'projection'"):
        load("projecton")
    with pytest.raises(ValueError, match="Unknown dtype 'float16'"):
        load(dtype="float16")


def test_packaged_encoder_by_bare_name(tmp_path, monkeypatch, demo_variables):
    metadata = {"encoder": "demo", "config": {}}
    checkpoints.save_encoder(tmp_path / "demo", demo_variables, metadata)
    monkeypatch.setattr(loading, "_PRETRAINED", tmp_path)
    encoder = loading.load_encoder("demo")
    assert (encoder.name, encoder.input_size, encoder.dimension) == ("demo", (32, 32), 64)


def test_nothing_there():
    with pytest.raises(FileNotFoundError, match=r"no checkpoint or file at demoo.*package: demo"):
        loading.load_encoder("demoo")
    with pytest.raises(FileNotFoundError, match=r"fetch moco_v2_200ep.*with name='mocov2'"):
        loading.load_encoder("mocov2")


def test_names(published, converted):
    with pytest.raises(ValueError, match="Expected the encoder's name with the file .*mocov2"):
        loading.load_encoder(published)
    with pytest.raises(ValueError, match="Unknown encoder 'tinny'; did you mean 'tiny'"):
        loading.load_encoder(published, "tinny")
    with pytest.raises(ValueError, match="Expected encoder 'mocov2', but .* holds 'tiny'"):
        loading.load_encoder(converted, "mocov2")
    with pytest.raises(ValueError, match="Expected no prefix"):
        loading.load_encoder(converted, prefix="backbone.")


def test_checkpoint_of_another_network(tmp_path, tiny, converted):
    variables, metadata = checkpoints.restore_encoder(converted)
    kernel = variables["params"]["head"]["fc"].pop("kernel")
    variables["params"]["head"]["fc"] |= {"gain": kernel, "bias": np.zeros(7, np.float32)}
    checkpoints.save_encoder(tmp_path / "other", variables, metadata)
    with pytest.raises(ValueError, match="1 missing, 1 unexpected, 1 mis-shaped") as error:
        loading.load_encoder(tmp_path / "other")
    assert "mis-shaped: params/head/fc/bias is (7,), expected (5,)" in str(error.value)

    checkpoints.save_encoder(tmp_path / "unknown", variables, {**metadata, "encoder": "mine"})
    with pytest.raises(ValueError, match="Unknown encoder in checkpoint 'mine'"):
        loading.load_encoder(tmp_path / "unknown")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path, tiny, value):
    arrays = tensors()
    arrays["module.encoder_q.fc.weight"][1, 2] = value
    path = save_torch(tmp_path / "bad.pth", arrays)
    with pytest.raises(ValueError, match="NaN or infinite in params/head/fc/kernel"):
        loading.load_encoder(path, "tiny")


def test_users_file_by_prefix(tmp_path, tiny, capsys):
    arrays = tensors("backbone.") | {"classifier.weight": np.zeros((2, 4), np.float32)}
    path = save_torch(tmp_path / "own.pth", arrays)
    with pytest.raises(ValueError, match="--prefix backbone"):
        loading.load_encoder(path, "tiny")
    direct = loading.weights_hash(loading.load_encoder(path, "tiny", prefix="backbone."))
    config = convert_weights.Config("tiny", path, tmp_path / "own", prefix="backbone.")
    convert_weights.main(config)
    assert "Left out: 1 tensors" in capsys.readouterr().out
    assert loading.weights_hash(loading.load_encoder(tmp_path / "own")) == direct


def test_a_backbone_of_other_surroundings_is_converted_and_loaded(tmp_path, tiny, published):
    """A file without a head, or with another: what needs none comes out as of the whole file."""
    whole = loading.load_encoder(published, "tiny", representation="backbone")
    headless = {k: v for k, v in tensors("backbone.").items() if ".fc." not in k}
    path = save_torch(tmp_path / "own.pth", headless | {"backbone.fc.weight": np.zeros((9, 4))})
    with pytest.raises(ValueError, match="fc.bias"):
        loading.load_encoder(path, "tiny", prefix="backbone.")  # "paper" needs the head
    direct = loading.load_encoder(path, "tiny", representation="backbone", prefix="backbone.")
    config = convert_weights.Config(
        "tiny", path, tmp_path / "out", prefix="backbone.", representation="backbone"
    )
    convert_weights.main(config)
    restored = loading.load_encoder(tmp_path / "out", representation="features")
    for encoder in (direct, restored):
        np.testing.assert_allclose(encoder(IMAGES), whole(IMAGES), rtol=1e-6)
    with pytest.raises(ValueError, match="'paper'.*Expected one of: backbone, features"):
        loading.load_encoder(tmp_path / "out")
    ur_jax.save_encoder(tmp_path / "again", restored)
    again = loading.load_encoder(tmp_path / "again", representation="backbone")
    np.testing.assert_array_equal(again(IMAGES), restored(IMAGES))


def test_conversion_replaces_a_checkpoint_only_when_told_to(converted, published):
    config = convert_weights.Config("tiny", published, converted)
    with pytest.raises(ValueError, match="exists; .*--overwrite"):
        convert_weights.main(config)
    convert_weights.main(dataclasses.replace(config, overwrite=True))
    assert loading.load_encoder(converted).name == "tiny"


def test_conversion_records_its_source(published, converted):
    metadata = checkpoints.restore_encoder(converted)[1]
    assert metadata["encoder"] == "tiny" and metadata["config"] == {}
    assert metadata["source"] == "tiny.pth.tar"
    assert metadata["source_sha256"] == torch_files.file_sha256(published)


def test_conversion_of_a_bad_file_writes_nothing(tmp_path, tiny):
    path = save_torch(tmp_path / "bad.pth", dict(list(tensors().items())[1:]))
    with pytest.raises(ValueError, match="1 missing"):
        convert_weights.main(convert_weights.Config("tiny", path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_conversion_needs_its_flags():
    with pytest.raises(ValueError, match="Expected --list, or also --source, --out"):
        convert_weights.Config("mocov2")
    with pytest.raises(ValueError, match="Unknown encoder 'moco2'; did you mean 'mocov2'"):
        convert_weights.Config("moco2", "a", "b")


def test_table_lists_every_encoder(capsys):
    convert_weights.main(convert_weights.Config(list=True))
    shown = capsys.readouterr().out
    for spec in ENCODERS.values():
        assert spec.name in shown and spec.reference.split()[0] in shown
    assert "skip_hidden 128 (paper)" in shown


def test_full_size_file(tmp_path, golden_dir):
    """MoCo v2's published layout on disk, converted and loaded directly: the same weights."""
    layout = json.loads((golden_dir / "mocov2.layout.json").read_text())
    path = save_torch(tmp_path / "moco_v2.pth.tar", reference_rules.state_dict(layout))
    convert_weights.main(convert_weights.Config("mocov2", path, tmp_path / "out"))
    direct = loading.load_encoder(path, "mocov2")
    restored = loading.load_encoder(tmp_path / "out")
    assert loading.weights_hash(direct) == loading.weights_hash(restored)
    assert (restored.dimension, restored.input_size) == (128, (224, 244))


def test_training_goes_on_from_a_converted_file(tmp_path, tiny):
    """Parts beside the encoder come back from the checkpoint, and the encoder is as without."""
    keys = {k.replace("encoder_q", "encoder_k"): np.asarray(2 * v) for k, v in tensors().items()}
    file = save_torch(tmp_path / "tuned.pth.tar", tensors() | keys)
    convert_weights.main(convert_weights.Config("tiny", file, tmp_path / "out"))
    loaded = loading.load_variables(tmp_path / "out")
    momentum = loaded.parts["momentum"]["params"]["head"]["fc"]["kernel"]
    np.testing.assert_array_equal(momentum, 2 * loaded.variables["params"]["head"]["fc"]["kernel"])
    both = (loading.load_encoder(path, "tiny") for path in (tmp_path / "out", file))
    np.testing.assert_array_equal(*(encoder(IMAGES) for encoder in both))


@pytest.mark.parametrize("name", loading._SHIPPED)
def test_what_ships_is_what_its_checkpoint_lists(name):
    """And nothing that Orbax wrote of the place where it was made."""
    folder = loading._PRETRAINED / name
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"files.json", *json.loads((folder / "files.json").read_text())["files"]}


def test_the_robust_demo_encoder_moves_less():
    """All encoders that ship load, and the fine-tuned ones move less under U-PGD, relatively."""
    images = jnp.asarray(reference_rules.images(32, 32, range(8)))
    config = AttackConfig(eps=0.05, step_size=0.01, num_steps=5)

    def moved(name):
        encoder = loading.load_encoder(name)
        assert encoder.name == name
        clean = np.asarray(encoder(images))
        result = u_pgd(encoder, images, jax.random.key(0), config=config)
        between = np.median(np.linalg.norm(clean[:4] - clean[4:], axis=1))
        return np.median(np.linalg.norm(result.representations - clean, axis=1)) / between

    weak = moved("demo")
    assert all(moved(name) < 0.75 * weak for name in ("demo-robust", "demo-robust-v1"))
