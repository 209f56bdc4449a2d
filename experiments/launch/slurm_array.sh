#!/usr/bin/env bash
#SBATCH --job-name=ur-jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@60
# One encoder per array task, all in one working directory; a task that is requeued, or started again,
# goes on where it was.
#
#   experiments/launch/setup_python.sh -e '.[cuda,report]'
#   ls -d checkpoints/* > encoders.txt
#   sbatch --array=1-$(wc -l < encoders.txt) experiments/launch/slurm_array.sh encoders.txt \
#       --preset paper --images folder:pass --workdir runs/paper
#   .venv/bin/python experiments/report.py runs/paper     # once all have ended
#
# To divide one encoder over several nodes instead, raise --nodes and keep `srun`: the processes find
# one another by SLURM's variables, and all must see the working directory. One task per node takes all
# of its GPUs. With DRY_RUN=1 the command is printed and not run.
set -euo pipefail
fail() { echo "error: $1" >&2 && exit 2; }
[[ -n "${SLURM_ARRAY_TASK_ID:-}" ]] || fail "This is no task of an array: sbatch --array=1-N $0 ..."
[[ -f "${1:-}" ]] || fail "Expected a file with an encoder a line first, got '${1:-}'"
encoder="$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")"
[[ -n "$encoder" ]] || fail "Line $SLURM_ARRAY_TASK_ID of $1, for this task, is empty"
shift
python=.venv/bin/python
[[ -x "$python" || -n "${DRY_RUN:-}" ]] || fail "There is no $PWD/$python: run experiments/launch/setup_python.sh there"
command=(srun "$python" experiments/benchmark.py --encoders "$encoder"
    --num-workers "${SLURM_CPUS_PER_TASK:-4}" "$@")
if [[ -n "${DRY_RUN:-}" ]]; then printf '%q ' "${command[@]}" && echo; else "${command[@]}"; fi
