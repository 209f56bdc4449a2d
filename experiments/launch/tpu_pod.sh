#!/usr/bin/env bash
# The benchmark on a TPU pod slice: makes the slice, runs the same command on every host, deletes it.
#
#   BUCKET=my-bucket ZONE=us-west4-a TYPE=v5litepod-64 experiments/launch/tpu_pod.sh --dry-run \
#       --preset paper --encoders mocov2=/data/mocov2 --images folder:/data/pass --num-workers 16
#
# With --dry-run, which stands first, every command is printed and none is run. The bucket holds the
# encoders and images and is mounted at /data on every host; results go to /data/runs. A preempted
# slice loses the parts in flight: the same command goes on.
#
#   NAME     of the slice; ur-jax if not given
#   SPOT     1 (if not given) or 0: on demand
#   QUEUED   1: wait in the queue of v5e, v5p and v6e, 0: ask for it at once; by TYPE if not given
#   RUNTIME  of the hosts; by TYPE if not given
#   UV       a file, if the hosts reach no registry: the uv program
#   KEEP     1: do not delete the slice at the end
set -euo pipefail
dry=0
if [[ "${1:-}" == --dry-run ]]; then dry=1 && shift; fi
fail() { echo "error: $1" >&2 && exit 2; }
for variable in BUCKET ZONE TYPE; do
    [[ -n "${!variable:-}" ]] || fail "$variable is not given; see the head of $0"
done
(($#)) || fail "Expected the benchmark's flags, such as --preset quick --encoders demo"
name="${NAME:-ur-jax}"
case "$TYPE" in
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base queued=0 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite queued=1 ;;
    v5p-*) runtime=v2-alpha-tpuv5 queued=1 ;;
    v6e-*) runtime=v2-alpha-tpuv6e queued=1 ;;
    *) [[ -n "${RUNTIME:-}" ]] || fail "Expected TYPE as v4-8, v5litepod-64, v5p-8 or v6e-8, got $TYPE; of another kind give RUNTIME too"
        queued=1 ;;
esac
runtime="${RUNTIME:-$runtime}" queued="${QUEUED:-$queued}"
spot=()
if [[ "${SPOT:-1}" == 1 ]]; then spot=(--spot); fi

repository="$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel 2>&1)" ||
    fail "Expected a git checkout, whose last commit goes to the hosts: $repository"
if [[ -n "$(git -C "$repository" status --porcelain --untracked-files=no)" ]]; then
    echo "warning: what is not committed does not go to the hosts" >&2
fi

show() { printf '%q ' "$@" && echo; }
run() { if ((dry)); then show "$@"; else "$@"; fi; }
vm() { run gcloud compute tpus tpu-vm "$1" "${@:2}" --zone "$ZONE"; }
queue() { run gcloud compute tpus queued-resources "$1" "$name" --zone "$ZONE" "${@:2}"; }
everywhere() { vm ssh "$name" --worker=all --batch-size=all --command "$1"; }

# Nobody's slice but the one that is made here is ever deleted.
if ((queued)); then
    if queue describe --format='value(state.state)' >/dev/null 2>&1 && ! ((dry)); then
        fail "There is a request $name in $ZONE already; delete it, or give another NAME"
    fi
elif vm describe "$name" >/dev/null 2>&1 && ! ((dry)); then
    fail "There is a slice $name in $ZONE already; delete it, or give another NAME"
fi
archive="$(mktemp --suffix=.tar.gz)"
delete() {
    rm -f "$archive"
    if [[ "${KEEP:-0}" == 1 ]]; then return; fi
    if ((queued)); then queue delete --force --quiet; else vm delete "$name" --quiet; fi
}
trap delete EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if ((queued)); then
    queue create --node-id "$name" --accelerator-type "$TYPE" --runtime-version "$runtime" "${spot[@]}"
    while true; do
        state="$(queue describe --format='value(state.state)')"
        if ((dry)); then echo "$state   # until it says ACTIVE" && break; fi
        echo "$(date +%H:%M) $name is $state"
        case "$state" in
            ACTIVE) break ;;
            FAILED | SUSPENDED | SUSPENDING) fail "The request for $TYPE in $ZONE is $state" ;;
        esac
        sleep "${POLL_SECONDS:-30}"
    done
else
    vm create "$name" --accelerator-type "$TYPE" --version "$runtime" "${spot[@]}"
fi

run git -C "$repository" archive --prefix=ur_jax/ -o "$archive" HEAD
vm scp "$archive" "$name:ur_jax.tar.gz" --worker=all
everywhere "tar xzf ur_jax.tar.gz"
if [[ -n "${UV:-}" ]]; then vm scp "$UV" "$name:ur_jax/uv" --worker=all; fi
everywhere "cd ur_jax && bash experiments/launch/setup_python.sh -r requirements-tpu.txt"
# Renames must be seen at once by all hosts: no caching of what is in a folder.
everywhere "command -v gcsfuse >/dev/null || sudo apt-get install -qy -o DPkg::Lock::Timeout=300 gcsfuse; \
sudo mkdir -p /data && sudo chmod 777 /data && { mountpoint -q /data || gcsfuse --implicit-dirs \
--kernel-list-cache-ttl-secs 0 --metadata-cache-ttl-secs 0 $(printf %q "$BUCKET") /data; }"
everywhere "cd ur_jax && .venv/bin/python experiments/benchmark.py --workdir /data/runs $(printf '%q ' "$@")"
