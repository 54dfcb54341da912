"""The launcher of a TPU slice, against a gcloud that runs every command here, as the host it is meant for."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
GCLOUD = """#!/usr/bin/env bash
if [ "$4" = describe ]; then echo 3; exit; fi
for argument in "$@"; do case $argument in
  --worker=*) worker=${argument#--worker=};; --command=*) command=${argument#--command=};;
esac; done
echo "$worker: $command" >> "$LOG"
"""


def launch(tmp_path, *argv):
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    log = tmp_path / "log"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    launcher = ROOT / "experiments/speed/launch_tpu_pod.sh"
    done = subprocess.run([launcher, *argv], env=env, capture_output=True, text=True)
    return done, log.read_text().splitlines() if log.exists() else []


def test_a_sweep_is_sharded_over_the_hosts_and_merged_by_the_first(tmp_path):
    done, lines = launch(tmp_path, "pod", "zone", "sweep", "--config=configs/sweep.py", "--workdir=gs://b/x y")
    assert done.returncode == 0, done.stderr
    assert lines[0].startswith("all: cd ~/sae_jax && python3 -m venv")
    shards = sorted(lines[1:4])
    for i, line in enumerate(shards):
        assert line.startswith(f"{i}: ")
        assert line.endswith(rf"python -m sae_jax sweep --config=configs/sweep.py --workdir=gs://b/x\ y --shard={i}/3")
    assert lines[4].startswith("0: ")
    assert lines[4].endswith("--merge")
    assert len(lines) == 5


def test_training_is_one_run_of_all_hosts(tmp_path):
    done, lines = launch(tmp_path, "pod", "zone", "train", "--config=configs/default.py", "--workdir=gs://b/run")
    assert done.returncode == 0, done.stderr
    assert len(lines) == 1
    assert lines[0].startswith("all: ")
    assert "jax.distributed.initialize()" in lines[0]


def test_wrong_arguments_show_how(tmp_path):
    done, lines = launch(tmp_path, "pod", "zone", "export")
    assert done.returncode == 2
    assert "launch_tpu_pod.sh NAME ZONE sweep" in done.stderr
    assert not lines


SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID=$RANDOM SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=2
for number in 0 1; do SLURM_PROCID=$number "$@" & waiting+=($!); done
for pid in "${waiting[@]}"; do wait "$pid" || code=$?; done
exit "${code:-0}"
"""


def slurm(tmp_path, *argv):
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    launcher = ROOT / "experiments/speed/launch_slurm.sh"
    return subprocess.run([launcher, *argv], env=env, capture_output=True, text=True, cwd=tmp_path)


def test_a_slurm_job_is_one_run_of_all_its_processes(tmp_path, tiny):
    """Each with two devices; the features go over all four."""
    tiny.train.steps, tiny.train.devices, tiny.members = 4, 0, {}
    config = f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({tiny.to_dict()!r})\n"
    (tmp_path / "short.py").write_text(config)
    done = slurm(tmp_path, "train", "--config=short.py", "--config.train.mesh=feature=4", "--workdir=run")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert (report["step"], report["devices"]) == (4, 4)


def test_slurm_is_for_training(tmp_path):
    done = slurm(tmp_path, "sweep")
    assert done.returncode == 2
    assert "launch_slurm.sh train" in done.stderr
