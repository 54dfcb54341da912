#!/usr/bin/env bash
# Runs this project on all hosts of a Cloud TPU slice; each host has a clone of it in ~/sae_jax.
#
#   experiments/speed/launch_tpu_pod.sh NAME ZONE sweep --config=configs/sweep.py --workdir=gs://BUCKET/sweep [more flags]
#   experiments/speed/launch_tpu_pod.sh NAME ZONE train --config=configs/default.py --workdir=gs://BUCKET/run [more flags]
#
# sweep: each host takes its shard on its own chips (CHIPS, 2,2,1 unless set: four a host), then the first merges the
# table. train: all hosts are one run, joined by jax.distributed. Run it again after a preemption: it goes on.
# Not run on a TPU yet: tests/test_launch.py holds it to the commands that it should send.
set -euo pipefail

if [ $# -lt 4 ] || { [ "$3" != sweep ] && [ "$3" != train ]; }; then
  sed -n '2,10p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 verb=$3
shift 3
arguments=$(printf ' %q' "$verb" "$@")
prepare='cd ~/sae_jax && python3 -m venv ~/env && . ~/env/bin/activate && pip install -q "jax[tpu]" -e ".[models]"'

on() { # WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

if [ "$verb" = train ]; then
  on all "$prepare && python -c 'import sys, jax; jax.distributed.initialize(); from sae_jax.cli import main; sys.exit(main(sys.argv[1:]))'$arguments"
  exit
fi
hosts=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(networkEndpoints.length())')
alone="TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=${CHIPS:-2,2,1}"
on all "$prepare"
waiting=()
for ((i = 0; i < hosts; i++)); do
  on "$i" "cd ~/sae_jax && . ~/env/bin/activate && $alone python -m sae_jax$arguments --shard=$i/$hosts" &
  waiting+=($!)
done
code=0
for pid in "${waiting[@]}"; do wait "$pid" || code=$?; done
[ "$code" -eq 0 ] || [ "$code" -eq 4 ] || exit "$code"
on 0 "cd ~/sae_jax && . ~/env/bin/activate && JAX_PLATFORMS=cpu python -m sae_jax$arguments --merge"
