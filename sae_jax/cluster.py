"""Jobs of a sweep on Ray: on a cluster, or on workers of this machine (extra `ray`)."""

import json
from typing import Any

from ml_collections import ConfigDict

from sae_jax import sweeping
from sae_jax.activations.optional import module
from sae_jax.combinations import Job

RETRIES = 5  # of jobs whose worker died; what they had finished stays finished


def _work(workdir: str, group: list[tuple[str, str]]) -> None:
    jobs = [Job(name, ConfigDict(json.loads(config))) for name, config in group]
    sweeping.run_group(workdir, jobs)


def launcher(address: str | None, cpus: float, gpus: float) -> sweeping.Launcher:
    """Launches jobs that share a forward pass as one Ray task; workers reach the workdir by its path.

    Args:
      address: of a cluster; None starts one on this machine.
      cpus, gpus: that a task needs; Ray runs as many at a time as there are.
    """

    def launch(workdir: str, groups: list[list[Job]]) -> None:
        ray = module("ray", "ray")
        ray.init(address=address, include_dashboard=False, logging_level="ERROR", ignore_reinit_error=True)
        try:
            task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_work)
            waiting: dict[Any, list[Job]] = {}
            for group in groups:
                plain = [(job.name, json.dumps(job.config.to_dict())) for job in group]
                waiting[task.remote(workdir, plain)] = group
            while waiting:
                for done in ray.wait(list(waiting))[0]:
                    _settle(ray, workdir, done, waiting.pop(done))
        finally:
            ray.shutdown()

    return launch


def _settle(ray: Any, workdir: str, done: Any, group: list[Job]) -> None:
    try:
        ray.get(done)
    except ray.exceptions.RayError as error:  # its worker died more often than it was started again
        for job in group:
            if not sweeping.recorded(workdir, job):
                sweeping.record(workdir, job, [sweeping.failure(job, error)])
