"""The certificates of many images as a job: what it reports, labels by name, what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ur_jax import cli, runs
from ur_jax.certify import (
    CERTIFICATES,
    CenterConfig,
    Classifier,
    CosineConfig,
    GeometricMedianConfig,
    MeanConfig,
    NeighbourConfig,
    RandomizedConfig,
    eps_out_from_counts,
    lower_bound,
)
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError
from ur_jax.jobs import Session, certify_parts
from ur_jax.jobs.certify import Certify
from ur_jax.jobs.progress import quiet, watched
from ur_jax.metrics import METRICS
from ur_jax.probes.checkpoint import save_probe
from ur_jax.runs import files, folder

CENTER = CenterConfig(bound="union", n0=300, n=1000, alpha1=0.05, alpha2=0.05, delta=0.15)
RANDOMIZED = RandomizedConfig(bound="union", n=1000, alpha=0.01)
NEAREST = {"config": RANDOMIZED, "probe": "nearest"}
STREAM = {"n0": 200, "n": 400, "m": 400, "step": 200}
STREAMS = {
    "geometric_median": GeometricMedianConfig(**STREAM),
    "mean": MeanConfig(**STREAM),
    "cosine": CosineConfig(**STREAM),
    "neighbour": NeighbourConfig(**STREAM, bank=40),
}


def flatten_and_multiply(params, images):
    return images.reshape(images.shape[0], -1) @ params


WEIGHT = np.random.default_rng(0).standard_normal((48, 6)).astype(np.float32) / 7
ENCODER = from_fn(flatten_and_multiply, jnp.asarray(WEIGHT), input_size=(4, 4))


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def rows_are_written_as_soon_as_they_are_there(monkeypatch):
    monkeypatch.setattr(certify_parts, "_FLUSH_SECONDS", -1.0)


def save(path, classes="ab", number=8, seed=1):
    """Small images of noise in classes, one of them unreadable."""
    rng = np.random.default_rng(seed)
    for i in range(number):
        place = path / classes[i % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)).save(place / f"{i}.png")
    return f"folder:{path}"


@pytest.fixture
def photos(tmp_path):
    """Nine of two classes; one is unreadable."""
    spec = save(tmp_path / "photos")
    (tmp_path / "photos" / "a" / "broken.png").write_bytes(b"not an image")
    return spec


def make(images, **changes):
    settings = {"num_images": 9, "batch_size": 16, "encoder": ENCODER, "images": images}
    return Certify(**(settings | changes))


def certificates(out):
    return pq.read_table(out / "certificates.parquet").to_pylist()


def run_killed(job, out, monkeypatch):
    """Runs to the end, dying five times at the second file that it writes."""
    write, deaths = files.atomic_path, 0
    while True:
        left = itertools.count(1 if deaths < 5 else 1000, -1)

        def write_or_die(path, left=left):
            if path.name != ".lease.json" and next(left) == 0:
                raise Killed
            return write(path)

        for module in (files, folder):
            monkeypatch.setattr(module, "atomic_path", write_or_die)
        try:
            return job.run(out, progress=quiet), deaths
        except Killed:
            deaths += 1


@pytest.mark.parametrize("method", list(STREAMS))
@pytest.mark.filterwarnings("ignore:.*broken")
def test_certificates_of_streams_killed_and_resumed_give_the_same_table(
    photos, tmp_path, monkeypatch, method
):
    job, alone, killed = make(photos, config=STREAMS[method]), tmp_path / "a", tmp_path / "b"
    whole = job.run(alone, progress=quiet)
    summary, deaths = run_killed(job, killed, monkeypatch)
    assert deaths == 5 and repr(summary.rows) == repr(whole.rows)
    for name in ("certificates.parquet", "summary.json"):
        assert (alone / name).read_bytes() == (killed / name).read_bytes()
    said = " ".join(Certify.remarks(whole))
    assert "under every change" in said or "whatever change" in said
    assert {row.images for row in whole.rows if row.metric != "certified_neighbour"} == {method}
    curves = list(Certify.curves(alone, whole, {}))
    assert curves and all(len(c.x) == len(c.value) for c in curves)
    found = {(row.metric, row.radius): row.value for row in whole.rows}
    values = list(Certify.values(alone, whole, {}))
    compared = {(each.metric, each.radius) for each in values}
    assert compared == {key for key in found if key[0] not in ("certified", "mean_radius")}
    for each in values:
        summed = np.mean if each.metric == "certified_neighbour" else np.median
        assert summed(each.value) == pytest.approx(found[each.metric, each.radius], rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*broken")
def test_what_is_certified_stands_over_what_an_attack_finds(photos, tmp_path):
    job = make(photos, config=STREAMS["geometric_median"], attacked=2)
    rows = {row.metric: row for row in job.run(tmp_path / "out", progress=quiet).rows}
    row = rows["certified_over_found"]
    assert row.n == 2 and 1 < row.value < 100 and row.radius == 0.25
    with pytest.raises(UserError, match="with --attacked, got 'neighbour'"):
        dataclasses.replace(job, config=STREAMS["neighbour"]).run(tmp_path / "no", progress=quiet)


@pytest.mark.parametrize("changes", [{"config": CENTER}, NEAREST], ids=["center", "randomized"])
@pytest.mark.filterwarnings("ignore:.*broken")
def test_killed_and_resumed_gives_the_same_table(photos, tmp_path, monkeypatch, changes):
    job, alone, killed = make(photos, **changes), tmp_path / "alone", tmp_path / "killed"
    whole = job.run(alone, progress=quiet)
    summary, deaths = run_killed(job, killed, monkeypatch)
    assert deaths == 5 and repr(summary.rows) == repr(whole.rows)
    for name in ("certificates.parquet", "summary.json"):
        assert (alone / name).read_bytes() == (killed / name).read_bytes()
    rows = certificates(alone)
    names = ["a/0", "a/2", "a/4", "a/6", "a/broken", "b/1", "b/3", "b/5", "b/7"]
    readable = [i for i, name in enumerate(names) if "broken" not in name]
    assert [row["index"] for row in rows] == readable
    assert (alone / "curves.png").stat().st_size > 1000
    [(unreadable, reason)] = summary.unreadable.items()
    assert "broken.png" in unreadable and "image" in reason
    assert summary.details["samples"] == sum(row["num_drawn"] for row in rows)
    [certified] = [r for r in summary.rows if r.metric == "certified" and r.radius is None]
    assert certified.n == 8
    times = pq.read_table(alone / "times.parquet").to_pylist()
    assert [row["index"] for row in times] == readable
    if "probe" in changes:
        check_radii(rows, summary)
    else:
        check_divergences(rows, summary)


def check_divergences(rows, summary):
    """A certificate follows from its row alone, also at another alpha; so do the numbers."""
    for row in rows:
        if row["abstained"]:
            continue
        pair = np.array(row["distances"], np.float32), np.array(row["counts"])
        for config in (CENTER, dataclasses.replace(CENTER, alpha2=0.01)):
            assert eps_out_from_counts(*pair, row["n"], config=config) >= row["eps_out"]
        assert 0 < row["quantile"] <= 1 and row["normalised"] > 0
    assert [row.metric for row in summary.rows] == [
        *("certified", "median_eps_out", "median_quantile", "median_normalised")
    ]
    eps_out = [np.inf if row["abstained"] else row["eps_out"] for row in rows]
    assert summary.rows[1].value == np.median(eps_out)


def check_radii(rows, summary):
    assert all(lower_bound(row["count"], row["n"], RANDOMIZED) == row["lower"] for row in rows)
    assert [row["label"] for row in rows] == list(range(8))  # the images are the classes
    accuracy = {r.radius: r.value for r in summary.rows if r.metric == "certified_accuracy"}
    assert list(accuracy) == [0.0, 0.1, 0.25, 0.5, 0.75, 0.9]
    for radius, value in accuracy.items():
        correct = [r["predicted"] == r["label"] and not r["abstained"] for r in rows]
        hits = [hit and row["radius"] >= radius for hit, row in zip(correct, rows)]
        assert value == np.mean(hits)
    [mean] = [r for r in summary.rows if r.metric == "average_certified_radius"]
    radii = np.array([row["radius"] for row in rows])
    np.testing.assert_allclose(mean.value, np.mean(np.where(correct, radii, 0)))


@pytest.mark.filterwarnings("ignore:.*broken")
def test_another_number_of_hosts_goes_on_and_progress_counts_images(photos, tmp_path):
    job, seen = make(photos, **NEAREST).opened(), []

    def progress(items, description, total):
        seen.append([description, total, 0])
        for item in items:
            seen[-1][-1] += 1
            yield item

    alone = job.run(tmp_path / "alone", progress=quiet)
    resumed = runs.open_run(tmp_path / "resumed", job.identity)
    job.compute(Session(resumed, host=1, num_hosts=2, progress=progress))
    job.compute(Session(resumed, progress=progress))
    # The second of two hosts has 4 images; then all are done but for one that is unreadable.
    assert [each for each in seen if each[0] == "certificates"] == [
        ["certificates", 4, 4],
        ["certificates", 9, 8],
    ]
    assert repr(job.merge(Session(resumed)).rows) == repr(alone.rows)
    tables = [tmp_path / out / "certificates.parquet" for out in ("alone", "resumed")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_who_watches_sees_how_far_it_is(photos, tmp_path, capsys):
    make(save(tmp_path / "few", number=2), num_images=2, **NEAREST).run(progress=watched)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"certificates: 2/2, \d certified, [\d,]+ samples/s, 0 s left", said)


# --- labels ---


def trained(names, seed=3):
    kernel = np.random.default_rng(seed).standard_normal((6, len(names))).astype(np.float32)
    return Classifier(ENCODER, jnp.asarray(kernel), jnp.zeros(len(names)), tuple(names))


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_part_in_the_middle_brings_no_row_twice(tmp_path, monkeypatch):
    job = make(save(tmp_path / "photos"), num_images=8, config=RANDOMIZED, probe="nearest")
    monkeypatch.setattr(certify_parts, "_FLUSH_SECONDS", -1.0)  # a part of each image
    job.run(tmp_path / "out", progress=quiet, plots=False)
    whole = (tmp_path / "out" / "certificates.parquet").read_bytes()
    parts = sorted((tmp_path / "out" / "parts" / "certificates-0").glob("*.npz"))
    assert len(parts) > 4
    parts[2].write_bytes(parts[2].read_bytes()[:100])
    (tmp_path / "out" / "summary.json").unlink()
    # All that are hidden behind it are written into the one part.
    monkeypatch.setattr(certify_parts, "_FLUSH_SECONDS", 1e9)
    job.run(tmp_path / "out", progress=quiet, plots=False)
    assert (tmp_path / "out" / "certificates.parquet").read_bytes() == whole


def save_as(path, probe):
    weights = {"kernel": np.asarray(probe.kernel), "bias": np.asarray(probe.bias)}
    save_probe(path, weights, ENCODER, {"class_names": list(probe.class_names)})
    return str(path)


def test_labels_are_compared_by_name(tmp_path):
    """A folder with two of the probe's four classes, in another order: the same accuracy."""
    probe = trained(["d", "b", "c", "a"])
    images = save(tmp_path / "some", classes="ab")
    where = save_as(tmp_path / "probe", probe)
    summary = make(images, num_images=8, config=RANDOMIZED, probe=where).run(
        tmp_path / "out", progress=quiet
    )
    rows = certificates(tmp_path / "out")
    assert [row["label"] for row in rows] == [3] * 4 + [1] * 4
    correct = [row["predicted"] == row["label"] and not row["abstained"] for row in rows]
    values = {(r.metric, r.radius): r.value for r in summary.rows}
    assert values["certified_accuracy", 0.0] == np.mean(correct) > 0
    # A live one, of a notebook, and a class by another name.
    renamed = save(tmp_path / "renamed", classes=["a", "bee"])
    job = make(renamed, num_images=8, config=RANDOMIZED, probe=probe, class_map=("bee=b",), seed=0)
    assert repr(job.run(progress=quiet).rows) == repr(summary.rows)
    requires = make(images, config=RANDOMIZED, probe=where).opened().identity["requires"]
    assert requires == job.opened().identity["requires"] and len(requires) == 2


@pytest.mark.parametrize(
    "classes, message",
    [("abx", "class of the probe 'x'.*Expected one of: a, b, c, d"), (["a", "b"], None)],
)
def test_unknown_classes_and_pictures_without_one_are_refused(tmp_path, classes, message):
    images = save(tmp_path / "photos", classes=classes)
    if message is None:
        Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "stray.png")
        message = "stray.png"
    job = make(images, num_images=8, config=RANDOMIZED, probe=trained("abcd"))
    with pytest.raises(UserError, match=message):
        job.run(tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out").exists()


def test_images_without_any_classes_have_shares_of_certified_ones(tmp_path):
    for i in range(4):
        (tmp_path / "plain").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (60 * i, 0, 0)).save(tmp_path / "plain" / f"{i}.png")
    job = make(f"folder:{tmp_path / 'plain'}", num_images=4, config=RANDOMIZED, probe=trained("ab"))
    rows = job.run(progress=quiet).rows
    assert [(r.metric, r.radius) for r in rows] == [
        *(("certified", radius) for radius in (None, 0.1, 0.25, 0.5, 0.75, 0.9)),
        ("mean_radius", None),
    ]


def test_a_probe_under_other_noise_is_warned_of(tmp_path):
    probe, where = trained("ab"), tmp_path / "probe"
    weights = {"kernel": np.asarray(probe.kernel), "bias": np.asarray(probe.bias)}
    views = {"kind": "noisy", "sigma": 0.5}
    save_probe(where, weights, ENCODER, {"class_names": ["a", "b"], "training": {"views": views}})
    images = save(tmp_path / "photos")
    job = make(images, num_images=2, config=RANDOMIZED, probe=str(where))
    with pytest.warns(UserWarning, match="noise of sigma 0.5 and classifies under 0.25"):
        job.opened()


# --- what is refused, and what is said ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": RANDOMIZED}, "Expected --probe with --method randomized"),
        ({"config": RANDOMIZED, "probe": "no/where"}, "no probe at no/where"),
        ({"config": CENTER, "probe": "nearest"}, "Expected no probe .*'center'"),
        ({"config": CENTER, "method": "randomized"}, "RandomizedConfig .*got CenterConfig"),
        ({"config": ENCODER}, "settings of a certificate .*got Encoder"),
        ({"method": "centre"}, "did you mean 'center'"),
        ({"config": CENTER, "batch_size": 0}, "batch_size >= 1"),
        ({"config": CENTER, "num_images": 0}, "num_images >= 1, got 0"),
        ({"config": CENTER, "num_images": 2.5}, "num_images to be an integer, got 2.5"),
        ({"config": CENTER, "num_images": 99}, "99 samples of a listing of 8"),
        ({"config": CENTER, "num_distribution": 1}, "num_distribution >= 2"),
        ({"config": CENTER, "seed": -1}, "seed >= 0"),
        ({**NEAREST, "num_images": 1}, "at least 2 images"),
        ({**NEAREST, "class_map": ("a=b",)}, "no class map"),
    ],
)
def test_bad_settings_are_one_line_and_make_no_folder(tmp_path, changes, message):
    job = lambda: make(save(tmp_path / "photos"), **{"num_images": 4, **changes})
    with pytest.raises(UserError, match=message):
        job().run(tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_not_finite_name_the_image(tmp_path):
    encoder = from_fn(nan_where_bright, jnp.ones(3), input_size=(4, 4))
    images = save(tmp_path / "photos", number=4)
    bright = tmp_path / "photos" / "a" / "0.png"
    Image.fromarray(np.full((4, 4, 3), 250, np.uint8)).save(bright)
    probe = Classifier(encoder, jnp.ones((3, 2)), jnp.zeros(2), ("a", "b"))
    job = make(images, encoder=encoder, num_images=4, config=RANDOMIZED, probe=probe)
    with pytest.warns(UserWarning, match="0.png: .* not certified"):
        job.run(tmp_path / "out", progress=quiet)
    first = certificates(tmp_path / "out")[0]
    assert first["abstained"] and first["num_bad"] > 0


def nan_where_bright(params, images):
    return jnp.where(images.mean((1, 2, 3))[:, None] > 0.7, jnp.nan, images.mean((1, 2)) * params)


# --- the command line ---


def parse(*words):
    command = cli.find("certify")
    return cli.parse(command, ["--encoder", "x", "--images", "y", "--out", "z", *words]).job


def test_presets_and_flags():
    paper = parse("--preset", "paper")
    assert paper.certificate == "center" and paper.smoothing == CenterConfig(bound="hoeffding")
    assert paper.center.n == 100_000 and paper.num_images == 200
    assert paper.randomized == RandomizedConfig()
    words = ("--method", "randomized", "--randomized.radii", "0.1", "0.25", "--seed", "3")
    adaptive = parse(*words, "--probe", "nearest")
    assert adaptive.smoothing == RandomizedConfig(bound="union", radii=(0.1, 0.25))
    assert adaptive.settings["settings"] == adaptive.smoothing and adaptive.seed == 3
    assert "num_distribution" not in adaptive.settings
    quick = parse("--preset", "quick")
    assert (quick.num_images, quick.num_distribution) == (16, 512)
    assert quick.smoothing == CenterConfig(bound="union", n0=1000, n=10_000)
    # A notebook's object is the same.
    mine = Certify(encoder="x", images="y", config=quick.smoothing, num_images=16)
    mine = dataclasses.replace(mine, num_distribution=512)
    assert mine.settings == quick.settings and Certify().smoothing == parse().smoothing


TOY = """
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.certify import CERTIFICATES, CertificateKind
from ur_jax.certify.sampling import sample_outputs
from ur_jax.devices import data_mesh
from ur_jax.metrics import METRICS, Column, Metric
from ur_jax.runs import Row
from ur_jax.stats.intervals import mean_interval
from ur_jax.types import Curve


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    sigma: float = 0.5
    n: int = 8


class Spread(NamedTuple):
    spread: float
    abstained: bool
    num_drawn: int
    num_bad: int


def represent(encoder, images):
    return encoder(images)


def certify(model, images, key, *, config, indices, mesh=None, batch_size=8, on_progress=None):
    for image, index in zip(images, indices):
        found = sample_outputs(
            represent, model, jnp.asarray(image), key, jnp.int32(index), jnp.int32(0),
            n=config.n, sigma=config.sigma, clip=False, mesh=mesh or data_mesh(),
            batch_size=batch_size,
        )
        yield index, Spread(float(np.std(found)), False, config.n, 0)


def rows(columns, config):
    yield Row.of("test_toy_spread", mean_interval(columns["spread"]))


def curves(columns):
    spread = np.sort(columns["spread"])
    share = np.arange(len(spread)) / len(spread)
    yield Curve("toy", "toy", "spread", "share of images", "A toy.", spread, share, kind="step")


METRICS.register(
    "test_toy_spread",
    Metric("mean", "low", "Spread of a toy.", columns=(Column("certify", "the toy's spread"),)),
)
CERTIFICATES.register(
    "test-toy",
    CertificateKind(ToyConfig, "encoder", certify, lambda config: config.n, rows, curves=curves),
)
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy_certificate_for_a_test.py"
    path.write_text(TOY)
    yield path
    sys.modules.pop(path.stem, None)
    for registry, name in ((CERTIFICATES, "test-toy"), (METRICS, "test_toy_spread")):
        registry._items.pop(name, None)


def test_a_certificate_from_outside_is_on_the_command_line_in_the_table_and_in_the_page(
    toy, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(os, "cpu_count", jax.device_count)  # as many devices as there are already
    (tmp_path / "own.py").write_text(
        "import jax.numpy as jnp\nfrom ur_jax import from_fn\n\n\n"
        "def mean(params, images):\n    return images.mean((1, 2)) * params\n\n\n"
        "def make():\n    return from_fn(mean, jnp.ones(3), input_size=(4, 4))\n"
    )
    out = tmp_path / "workdir" / "own" / "certified-toy"
    words = [
        "--encoder", f"{tmp_path / 'own.py'}:make", "--images", save(tmp_path / "photos"),
        "--num-images", "4", "--method", "test-toy", "--test-toy.n", "16", "--out", str(out),
    ]  # fmt: skip
    assert cli.run("certify", words) == 2  # not known without the plugin
    words += ["--plugin", str(toy)]
    with pytest.raises(SystemExit):
        cli.run("certify", [*words, "--help"])
    said = capfd.readouterr()
    assert "test-toy" in said.out and "--test-toy.sigma" in said.out
    assert cli.run("certify", words) == 0
    assert "test_toy_spread" in capfd.readouterr().out
    summary = runs.Summary.read(out / "summary.json")
    assert summary.identity["method"] == "test-toy" and summary.identity["settings"]["n"] == 16
    [curve] = Certify.curves(out, summary, {})
    assert len(curve.x) == 4 and (out / "curves.png").stat().st_size > 1000
    workdir = tmp_path / "workdir"
    assert cli.run("report", [str(workdir), "--plugin", str(toy)]) == 0
    assert ",test_toy_spread," in (workdir / "RESULTS.csv").read_text()
    page = (workdir / "report.html").read_text()
    assert "the toy&#39;s spread" in page and "A toy." in page
    assert (workdir / "figures" / "toy.png").exists()


def test_a_certificate_whose_settings_would_shadow_a_flag_is_refused():
    with CERTIFICATES.replaced("images", CERTIFICATES["center"]):
        with pytest.raises(UserError, match="another name for the certificate 'images'"):
            cli.find("certify")
