#!/usr/bin/env bash
# The benchmark on a TPU pod slice: makes the slice, runs the same command on every host, deletes it.
#
#   BUCKET=my-bucket ZONE=us-west4-a TYPE=v5litepod-64 experiments/launch/tpu_pod.sh \
#       --preset paper --encoders mocov2=/data/mocov2 --images folder:/data/pass \
#       --protocol.batch-size 512 --num-workers 16
#
# The bucket holds the encoders and images and is mounted at /data on every host; results go to
# /data/runs. A preempted slice loses the parts in flight: start the same command again.
set -euo pipefail
name="${NAME:-ur-jax}" zone="${ZONE:?}" type="${TYPE:?}" bucket="${BUCKET:?}"
repository="$(git rev-parse --show-toplevel)"

gcloud compute tpus tpu-vm create "$name" --zone "$zone" --accelerator-type "$type" \
    --version "${IMAGE:-tpu-ubuntu2204-base}" --spot
trap 'gcloud compute tpus tpu-vm delete "$name" --zone "$zone" --quiet' EXIT
everywhere() { gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"; }

git -C "$repository" archive --prefix=ur_jax/ -o /tmp/ur_jax.tar.gz HEAD
gcloud compute tpus tpu-vm scp /tmp/ur_jax.tar.gz "$name:" --zone "$zone" --worker=all
everywhere "tar xzf ur_jax.tar.gz && cd ur_jax && python3 -m venv .venv \
    && .venv/bin/pip install -q -r requirements-tpu.txt"
# Renames must be seen at once by all hosts: no caching of what is in a folder.
everywhere "sudo mkdir -p /data && sudo chmod 777 /data && gcsfuse --implicit-dirs \
    --kernel-list-cache-ttl-secs 0 --metadata-cache-ttl-secs 0 $bucket /data"
everywhere "cd ur_jax && .venv/bin/python experiments/benchmark.py --workdir /data/runs \
    $(printf '%q ' "$@")"
