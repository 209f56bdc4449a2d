#!/usr/bin/env bash
# The benchmark on a TPU slice of a GKE cluster, by xpk (pip install xpk; it needs docker, gcloud and
# kubectl):
#
#   PROJECT=my-project ZONE=us-west4-a CLUSTER=my-cluster TYPE=v6e-64 BUCKET=my-bucket \
#       experiments/launch/gke_xpk.sh --dry-run \
#       --preset paper --encoders mocov2=gs://my-bucket/mocov2 --images folder:/data/pass
#
# With --dry-run, which stands first, every command is printed and none is run. A cluster that is not
# there is made with MAKE=1 (it costs until it is deleted). Results go to gs://BUCKET/runs; STORAGE
# names a storage that `xpk storage attach` mounts, for images.
set -euo pipefail
dry=0
if [[ "${1:-}" == --dry-run ]]; then dry=1 && shift; fi
fail() { echo "error: $1" >&2 && exit 2; }
for variable in PROJECT ZONE CLUSTER TYPE BUCKET; do
    [[ -n "${!variable:-}" ]] || fail "$variable is not given; see the head of $0"
done
(($#)) || fail "Expected the benchmark's flags, such as --preset quick --encoders demo"
run() { if ((dry)); then printf '%q ' "$@" && echo; else "$@"; fi; }

where=(--cluster "$CLUSTER" --zone "$ZONE" --project "$PROJECT")
if [[ "${MAKE:-0}" == 1 ]]; then
    run xpk cluster create "${where[@]}" --tpu-type "$TYPE" --num-slices 1 --spot
fi
storage=()
if [[ -n "${STORAGE:-}" ]]; then storage=(--storage "$STORAGE"); fi
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# xpk lays the checkout over the image and starts the command in it, on every host of the slice.
run xpk workload create "${where[@]}" --workload "${NAME:-ur-jax}" --tpu-type "$TYPE" \
    --num-slices 1 --max-restarts 20 "${storage[@]}" \
    --base-docker-image "${IMAGE:-python:3.12}" --script-dir "$repository" \
    --command "pip install -q -r requirements-tpu.txt && python experiments/benchmark.py \
--workdir gs://$BUCKET/runs $(printf '%q ' "$@")"
