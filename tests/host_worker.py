"""One process of a run on several hosts; `test_hosts` starts it.

    python tests/host_worker.py FOLDER WORKDIR HOST NUM_HOSTS PORT DIE_AFTER

It runs the benchmark on a tiny encoder and ends, as if killed, after writing DIE_AFTER parts (0:
never). FOLDER has the checkpoint and the images.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path

import jax

folder, workdir, host, num_hosts, port, die_after = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", f"{folder}/cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
if int(num_hosts) > 1:
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address, int(num_hosts), int(host), coordinator_bind_address=address,
        initialization_timeout=60, heartbeat_timeout_seconds=20,
    )  # fmt: skip

import numpy as np  # noqa: E402
import tiny_encoder  # noqa: E402

from ur_jax import runs  # noqa: E402
from ur_jax.certify import CenterConfig, RandomizedConfig  # noqa: E402
from ur_jax.data import ViewConfig  # noqa: E402
from ur_jax.encoders import checkpoints  # noqa: E402
from ur_jax.jobs import benchmark, matrix  # noqa: E402
from ur_jax.jobs.impersonate import Impersonate, ImpersonationConfig  # noqa: E402
from ur_jax.jobs.label_free import EvaluationConfig, LabelFree  # noqa: E402
from ur_jax.jobs.probe import Probe  # noqa: E402
from ur_jax.probes.linear import ProbeConfig  # noqa: E402

for job in (LabelFree, Impersonate):
    job.draw = lambda *_: None  # figures take half of the time
    job.doubt = lambda *_: ()
if int(die_after):
    write_part, left = runs.Run.write_part, itertools.count(int(die_after), -1)

    def write_or_die(self, *arguments):
        if next(left) == 0:
            os._exit(9)
        write_part(self, *arguments)

    runs.Run.write_part = write_or_die

TRAINING = ProbeConfig(num_epochs=2, learning_rate=0.1, batch_size=8, batch_norm=True)
with tiny_encoder.stands_for_demo():
    config = matrix.Config(
        workdir=Path(workdir),
        encoders=(f"tiny={folder}/encoder",),
        images=f"folder:{folder}/images",
        train_images=f"folder:{folder}/images",
        protocol=EvaluationConfig(
            num_images=20, eps=(0.05,), read_at=(1, 2), overlap_steps=1, breakaway_steps=2,
            num_distribution=None, batch_size=4, strong_eps=(),
        ),
        certificates=dataclasses.replace(
            matrix.CertificateSettings(),
            num_images=5,
            center=CenterConfig(bound="union", n0=300, n=512, alpha1=0.05, alpha2=0.05, delta=0.15),
            randomized=RandomizedConfig(n0=16, n=128),
        ),
        probe=matrix.ProbeSettings(cached=True, num_draws=2, training=TRAINING),
        impersonation=ImpersonationConfig(read_at=(1, 2), batch_size=4),
        first_range=None,
        second_range=None,
    )  # fmt: skip
    code = benchmark.main(config)

    # The paper's training, on fresh crops in every epoch.
    streamed = Path(workdir, "streamed")
    summary = Probe(
        encoder=f"{folder}/encoder",
        images=config.images,
        test_images=config.images,
        training=TRAINING,
        views=ViewConfig(augment=True),
    ).run(streamed)
    trained, _ = checkpoints.restore_encoder(streamed / "probe")
loss = [row["loss"] for row in summary.details["history"]]
np.savez(Path(workdir, f"streamed-{host}.npz"), loss=loss, **trained)
sys.exit(code)
