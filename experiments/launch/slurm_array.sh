#!/usr/bin/env bash
#SBATCH --job-name=ur-jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@60
# One encoder per array task, all in one working directory; a requeued task goes on where it was.
#
#   ls -d checkpoints/* > encoders.txt
#   sbatch --array=1-$(wc -l < encoders.txt) experiments/launch/slurm_array.sh encoders.txt \
#       --preset paper --images folder:pass --workdir runs/paper
#   python experiments/report.py runs/paper     # once all have ended
#
# To divide one encoder over several nodes instead, raise --nodes and keep `srun`: the processes find
# one another by SLURM's variables, and all must see the working directory.
set -euo pipefail
encoder="$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")"
shift
srun .venv/bin/python experiments/benchmark.py --encoders "$encoder" --num-workers 12 "$@"
