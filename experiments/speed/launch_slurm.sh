#!/usr/bin/env bash
# One run on all nodes of a Slurm job, a process each with all of its GPUs; the working folder and the workdir are shared.
#
#   sbatch experiments/speed/launch_slurm.sh train --config=configs/default.py --workdir=/shared/run [more flags]
#
# Slurm asks it to stop two minutes before its time is up, and when it is preempted: all processes save in the same turn.
# Submit it again and it goes on. Options of sbatch, as --nodes=8, go before the name of this file.
# Not run on a cluster yet: tests/test_launch.py runs it on two processes of one machine.
#SBATCH --job-name=sae_jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ "${1:-}" != train ]; then
  sed -n '2,8p' "$0" >&2
  exit 2
fi
# Left to itself JAX takes one GPU a process under Slurm.
join='import os, sys, jax
gpus = list(range(int(os.environ.get("SLURM_GPUS_ON_NODE", 0))))
jax.distributed.initialize(local_device_ids=gpus or None)
from sae_jax.cli import main
sys.exit(main(sys.argv[1:]))'
exec srun --kill-on-bad-exit=1 python -c "$join" "$@"
