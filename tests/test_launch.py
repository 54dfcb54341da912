"""The launcher of a TPU slice, against a gcloud that runs every command here, as the host it is meant for."""

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
