"""A working directory as the benchmark leaves it, with made-up numbers and real row counts.

    python tests/simulated.py DIR      # the paper's matrix: 15 encoders, 1,000 images

No number in it is a measurement.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ur_jax import runs
from ur_jax.runs import Row, Summary
from ur_jax.stats.intervals import Estimate, median_interval, proportion_interval

ENCODERS = (
    *("amdim", "mae", "moco_nonsem", "mocov2", "mocov2_loss", "mocov2_targeted"),
    *("mocov2_untargeted", "mocov3", "mocov3_loss", "mocov3_targeted", "mocov3_untargeted"),
    *("pixpro", "resnet50", "simclrv2", "simsiam"),
)
DIVERGENCES = ("l1", "l2", "linf")
READ_AT = (5, 10, 30, 50)


def make(
    workdir: Path,
    encoders=ENCODERS,
    num_images: int = 1000,
    num_steps: int = 51,
    num_certified: int = 200,
    num_test: int = 50_000,
    pictures: bool = True,
) -> None:
    """Fills a working directory."""
    for place, encoder in enumerate(encoders):
        rng = np.random.default_rng(place)
        _Encoder(workdir / encoder, rng, (place + 1) / (len(encoders) + 1)).fill(
            num_images, num_steps, num_certified, num_test, pictures
        )
    stages = sorted(path.parent.name for path in (workdir / encoders[0]).glob("*/summary.json"))
    planned: dict = {"command": "ur-jax benchmark"}
    planned["stages"] = dict.fromkeys(stages, "")
    for encoder in encoders:
        runs.write_json(workdir / encoder / "plan.json", planned)


class _Encoder:
    """One encoder's folder; `weakness` in (0,1) moves all its numbers."""

    def __init__(self, folder: Path, rng, weakness: float):
        self.folder, self.rng, self.weakness = folder, rng, weakness

    def fill(self, num_images, num_steps, num_certified, num_test, pictures) -> None:
        scale = 1.0 + 9.0 * self.rng.random()
        clean = [
            Row.of("median_clean_distance", Estimate(scale, np.nan, np.nan, 100_000), divergence=d)
            for d in DIVERGENCES
        ]
        levels = np.arange(1, 1000) / 1000
        columns = {"level": levels} | {f"dist_{d}": scale * (0.5 + levels) for d in DIVERGENCES}
        runs.write_table(self.folder / "distances" / "distances.parquet", columns)
        self.summary("distances", clean, "evaluate", stages=["distances"])
        for eps in (0.05, 0.1):
            self.attacks(eps, scale, num_images, num_steps)
        self.overlap(scale, num_images)
        self.breakaway(num_images, pictures)
        accuracy = 0.75 - 0.3 * self.weakness
        for kind, loss in (("standard", 0.0), ("noisy", 0.1), ("low_pass", 0.2)):
            hits = self.rng.random(num_test) < accuracy - loss * self.rng.random()
            rows = {
                "index": np.arange(num_test), "label": np.zeros(num_test, np.int32),
                "predicted": np.where(hits, 0, 1), "rank": np.where(hits, 0, 7),
            }  # fmt: skip
            runs.write_table(self.folder / f"probe-{kind}" / "predictions.parquet", rows)
            estimate = proportion_interval(int(hits.sum()), num_test)
            row = Row.of("top_1_accuracy", estimate, images=kind)
            self.summary(f"probe-{kind}", [row], "probe", views={"kind": kind})
        self.certificates(scale, num_certified)
        rate = proportion_interval(int(500 * self.weakness), 1000)
        for representation in ("impersonation",):
            rows = [
                Row.of("impersonation_success", rate, eps=0.1, step=step, images=images)
                for step in (3, 50)
                for images in ("cat -> dog", "dog -> cat", "both")
            ]
            self.summary(representation, rows, "impersonate")
            if pictures:
                self.picture(representation, "impersonations.png")

    def attacks(self, eps, scale, num_images, num_steps) -> None:
        stage = f"attacks-{eps:g}"
        steps = np.arange(num_steps)
        size = self.rng.lognormal(0.0, 0.3, (num_images, 1)) * self.weakness * eps * 20
        moved = scale * size * (1 - np.exp(-steps / 10.0))
        near = scale * (1 - 0.6 * self.weakness * (1 - np.exp(-steps / 15.0)) * size.clip(0, 1))
        rows, tables = [], []
        for mode, distances in (("untargeted", moved), ("targeted", near)):
            columns = {
                "image": np.repeat(np.arange(num_images), num_steps),
                "mode": np.full(num_images * num_steps, mode),
                "eps": np.full(num_images * num_steps, eps),
                "step": np.tile(steps, num_images),
            }
            for d in DIVERGENCES:
                columns[f"dist_{d}"] = distances.ravel().astype(np.float32)
                columns[f"universal_quantile_{d}"] = columns[f"dist_{d}"] / scale
            columns["cosine_similarity"] = columns["dist_l2"]
            for name in DIVERGENCES:
                columns[f"perturb_{name}"] = columns["dist_l2"]
            tables.append(columns)
            suffix = "" if mode == "untargeted" else "_targeted"
            names = [f"universal_quantile{suffix}"]
            names += ["normalised_distance" if mode == "untargeted" else "relative_quantile"]
            for name in names:
                for d in DIVERGENCES:
                    for step in (s for s in READ_AT if s < num_steps):
                        values = np.clip(distances[:, step] / scale, 0, 1)
                        estimate = median_interval(values)
                        row = Row.of(name, estimate, divergence=d, eps=eps, step=step)
                        rows.append(row)
        joined = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
        runs.write_table(self.folder / stage / "attacks.parquet", joined)
        protocol = {"eps": [eps], "read_at": [step for step in READ_AT if step < num_steps]}
        self.summary(stage, rows, "evaluate", stages=["attacks"], protocol=protocol)

    def overlap(self, scale, num_images) -> None:
        margin = self.rng.normal(0.8 - self.weakness, 0.2, num_images)
        clean = scale * self.rng.lognormal(0, 0.3, num_images)
        columns = {"first": np.arange(num_images), "second": np.arange(num_images)}
        for d in DIVERGENCES:
            columns |= {f"margin_{d}": margin, f"clean_dist_{d}": clean}
        runs.write_table(self.folder / "overlap" / "pairs.parquet", columns)
        risk = proportion_interval(int((margin < 0).sum()), num_images)
        at = {"divergence": "l2", "eps": 0.05, "step": 10}
        rows = [Row.of("adversarial_margin", median_interval(margin), **at)]
        rows.append(Row.of("overlap_risk", risk, **at))
        self.summary("overlap", rows, "evaluate", stages=["overlap"])

    def breakaway(self, num_images, pictures) -> None:
        rank = self.rng.geometric(1.0 - 0.9 * self.weakness, num_images) - 1
        columns = {"image": np.arange(num_images), "rank": rank}
        runs.write_table(self.folder / "breakaway" / "neighbours.parquet", columns)
        at = {"divergence": "l2", "eps": 0.05, "step": 25}
        share = rank.mean() / 1000
        rows = [Row.of("breakaway_risk", Estimate(share, 0.9 * share, 1.1 * share, 1000), **at)]
        for k in (1, 5):
            estimate = proportion_interval(int((rank < k).sum()), num_images)
            rows.append(Row.of(f"top_{k}_accuracy", estimate, **at))
        self.summary("breakaway", rows, "evaluate", stages=["breakaway"])
        if pictures:
            self.picture("breakaway", "gallery.png")

    def certificates(self, scale, number) -> None:
        abstained = self.rng.random(number) < 0.1 * self.weakness
        quantile = np.clip(self.rng.normal(self.weakness, 0.1, number), 0.01, 1.0)
        quantile = np.where(abstained, 1.0, quantile)
        columns = {
            "index": np.arange(number), "abstained": abstained, "quantile": quantile,
            "normalised": np.where(abstained, np.inf, quantile * 2),
            "distances": list(self.rng.random((number, 50))),
        }  # fmt: skip
        path = self.folder / "certified-divergence"
        runs.write_table(path / "certificates.parquet", columns)
        rows = [Row.of("median_quantile", median_interval(quantile))]
        certified = proportion_interval(int((~abstained).sum()), number)
        rows.append(Row.of("certified", certified))
        self.summary("certified-divergence", rows, "certify", method="center")

        radius = np.clip(self.rng.normal(0.6 - 0.5 * self.weakness, 0.2, number), 0, 0.9)
        label = np.zeros(number, np.int32)
        predicted = (self.rng.random(number) < 0.4).astype(np.int32)
        columns = {
            "index": np.arange(number), "abstained": radius == 0, "radius": radius,
            "label": label, "predicted": predicted,
        }  # fmt: skip
        path = self.folder / "certified-accuracy"
        runs.write_table(path / "certificates.parquet", columns)
        rows = []
        for at in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9):
            hits = int(((radius >= at) & (radius > 0) & (predicted == label)).sum())
            estimate = proportion_interval(hits, number)
            rows.append(Row.of("certified_accuracy", estimate, radius=at))
        counted = np.where(predicted == label, radius, 0)
        rows.append(Row.of("average_certified_radius", median_interval(counted)))
        self.summary("certified-accuracy", rows, "certify", method="randomized")

    def picture(self, stage, name) -> None:
        path = self.folder / stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        small = self.rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)
        large = Image.fromarray(small).resize((1560, 1260), Image.Resampling.BICUBIC)
        large.save(path, compress_level=1)

    def summary(self, stage: str, rows: list[Row], job: str, **settings) -> None:
        """Writes the summary and the plan's record of a stage."""
        identity = {"encoder": self.folder.name, "weights_sha256": "0" * 64, **settings}
        made = Summary(job, f"{job}: {self.folder.name} on nothing, made up", identity, tuple(rows))
        (self.folder / stage).mkdir(parents=True, exist_ok=True)
        made.write(self.folder / stage)
        record = {"fingerprint": "0" * 16, "finished": True, "sessions": 1, "seconds": 12.5}
        record |= {"hosts": 1, "device": "made up", "work": None, "samples": 1}
        runs.write_json(self.folder / f"{stage}.json", record)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
