"""Jobs of a sweep on Ray: on a cluster, or on workers of this machine (extra `ray`).

Nobody here touches JAX's devices: they belong to the workers.
"""

import contextlib
import json
import math
import os
from typing import Any

from ml_collections import ConfigDict

from sae_jax.errors import Preempted, Refused, RunFailed, first_line
from sae_jax.runtime.optional import module
from sae_jax.runtime.stopping import StopRequest
from sae_jax.sweeps import jobs as jobs_lib
from sae_jax.sweeps.combinations import Job

RETRIES = 5  # of jobs whose worker died or was asked to stop; what they had finished stays finished
HERE = "local"  # as Ray calls a cluster of this machine alone


def _work(folder: str, workdir: str, group: list[tuple[str, str]]) -> None:
    with contextlib.suppress(FileNotFoundError):  # a machine without it has no relative paths to find
        os.chdir(folder)
    jobs_lib.run_group(workdir, [Job(name, ConfigDict(json.loads(config))) for name, config in group])


def launcher(address: str | None, cpus: float, gpus: float) -> jobs_lib.Launcher:
    """Connects, and launches jobs that share a forward pass as one Ray task, from the folder that this process is in.

    Args:
      address: of a cluster, whose machines all see the workdir; None: that of RAY_ADDRESS, or workers of this machine.
      cpus, gpus: that a task needs; Ray runs as many at a time as there are.

    Raises:
      Refused: no Ray, no such cluster, or a need that cannot be met.
    """
    for flag, value, least in (("--cpus", cpus, "> 0"), ("--gpus", gpus, "≥ 0")):
        if not (0 <= value < math.inf) or (value == 0 and least == "> 0"):
            raise Refused(flag, value, f"a finite number {least}")
    where = address or os.environ.get("RAY_ADDRESS") or HERE  # left to itself Ray joins any cluster that it finds
    if where == HERE:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # its ports are open to the network: not to everybody on it
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # lines of different jobs look alike to it: it would drop most
    ray = module("ray", "ray")
    try:
        ray.init(where, logging_level="ERROR", **({"include_dashboard": False} if where == HERE else {}))
    except (ValueError, RuntimeError, OSError) as error:
        if where == HERE:
            raise RunFailed(f"Ray does not start ({first_line(error)})") from error
        raise Refused("--address", where, f"a Ray cluster that answers ({first_line(error)})") from error
    there = ray.cluster_resources()
    for flag, value, name in (("--cpus", cpus, "CPU"), ("--gpus", gpus, "GPU")):
        if where == HERE and value > there.get(name, 0):
            raise Refused(flag, value, f"at most {there.get(name, 0):g}, what this machine has")
    try:
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=[Preempted])(_work)
    except ValueError as error:
        raise Refused("--gpus", gpus, first_line(error)) from error

    def launch(workdir: str, groups: list[list[Job]]) -> None:
        try:
            waiting: dict[Any, list[Job]] = {}
            for group in groups:
                plain = [(job.name, json.dumps(job.config.to_dict())) for job in group]
                waiting[task.remote(os.getcwd(), workdir, plain)] = group
            with StopRequest() as stop:
                while waiting:
                    for done in ray.wait(list(waiting), timeout=1)[0]:
                        _settle(ray, workdir, done, waiting.pop(done))
                    if stop.requested():
                        raise stop.stopped("with what is finished kept")
        finally:
            ray.shutdown()

    return launch


def _settle(ray: Any, workdir: str, done: Any, group: list[Job]) -> None:
    """Jobs that have left nothing become rows that say why."""
    error: Exception = RunFailed("done, but nothing is there: all machines have to see the workdir")
    try:
        ray.get(done)
    except ray.exceptions.RayError as raised:  # its worker died more often than it was started again
        error = raised
    for job in group:
        if not jobs_lib.recorded(workdir, job):
            jobs_lib.record(workdir, job, [jobs_lib.failure(job, error)])
