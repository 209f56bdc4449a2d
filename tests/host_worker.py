"""What `test_hosts` has one process do, or one of several that it starts and kills.

    python tests/host_worker.py FOLDER WORKDIR HOST NUM_HOSTS PORT DIE_AFTER

FOLDER has a tiny encoder and images, WORKDIR gets the results. The process ends, as if killed,
after writing DIE_AFTER parts (0: never).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path
from unittest import mock

import jax

from ur_jax.devices import hosts, launchers

if __name__ == "__main__":
    folder, workdir = map(Path, sys.argv[1:3])
    host, num_hosts, port, die_after = map(int, sys.argv[3:])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_compilation_cache_dir", f"{folder}/cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    hosts.join(launchers.explicit(f"127.0.0.1:{port}", num_hosts, host))

import numpy as np  # noqa: E402
import tiny_encoder  # noqa: E402

from ur_jax import runs  # noqa: E402
from ur_jax.certify import CenterConfig  # noqa: E402
from ur_jax.data import ViewConfig  # noqa: E402
from ur_jax.encoders import checkpoints  # noqa: E402
from ur_jax.jobs import Job, base, benchmark, matrix  # noqa: E402
from ur_jax.jobs.impersonate import ImpersonationConfig  # noqa: E402
from ur_jax.jobs.label_free import EvaluationConfig  # noqa: E402
from ur_jax.jobs.probe import Probe  # noqa: E402
from ur_jax.probes.linear import ProbeConfig  # noqa: E402
from ur_jax.report import build  # noqa: E402

TRAINING = ProbeConfig(num_epochs=2, learning_rate=0.1, batch_size=8, batch_norm=True)
STAGES = ("distances", "attacks-*", "overlap", "breakaway", "probe-standard",
          "certified-divergence", "impersonation")  # fmt: skip


def work(folder: Path, workdir: Path, host: int = 0) -> int:
    """Runs the benchmark and a training on fresh crops; returns the benchmark's exit status."""
    images = f"folder:{folder}/images"
    config = matrix.Config(
        workdir=workdir,
        encoders=(f"tiny={folder}/encoder",),
        images=images,
        train_images=images,
        only=tuple(f"tiny/{stage}" for stage in STAGES),
        protocol=EvaluationConfig(
            num_images=20, eps=(0.05,), read_at=(1, 2), overlap_steps=1, breakaway_steps=2,
            num_distribution=None, batch_size=4, strong_eps=(),
        ),
        certificates=dataclasses.replace(
            matrix.CertificateSettings(),
            num_images=5,
            center=CenterConfig(bound="union", n0=300, n=512, alpha1=0.05, alpha2=0.05, delta=0.15),
        ),
        probe=matrix.ProbeSettings(cached=True, num_draws=2, training=TRAINING),
        impersonation=ImpersonationConfig(read_at=(1, 2), batch_size=4),
        first_range=None,
        second_range=None,
    )  # fmt: skip
    nothing = lambda *_: None
    with (
        tiny_encoder.stands_for_demo(),
        # Nobody looks at figures, doubts and pages, which take half of the time.
        mock.patch.object(base, "_draw", nothing),
        mock.patch.object(Job, "doubt", lambda _: ()),
        mock.patch.multiple(build, make_page=nothing, page=mock.Mock(render=lambda _: "")),
    ):
        code = benchmark.main(config)

        # The paper's training, on fresh crops in every epoch.
        streamed = workdir / "streamed"
        summary = Probe(
            encoder=f"{folder}/encoder",
            images=images,
            test_images=images,
            training=TRAINING,
            views=ViewConfig(augment=True),
        ).run(streamed)
    trained, _ = checkpoints.restore_encoder(streamed / "probe")
    loss = [row["loss"] for row in summary.details["history"]]
    np.savez(workdir / f"streamed-{host}.npz", loss=loss, **trained)
    return code


if __name__ == "__main__":
    if die_after:
        write_part, left = runs.Run.write_part, itertools.count(die_after, -1)

        def write_or_die(self, *arguments):
            if next(left) == 0:
                os._exit(9)
            write_part(self, *arguments)

        runs.Run.write_part = write_or_die
    sys.exit(work(folder, workdir, host))
