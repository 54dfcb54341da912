"""`sweep`: combinations → jobs → one table, results.csv, a row a combination and condition.

A job is finished or absent: it leaves one file, WORKDIR/jobs/NAME.json, which nobody sees half written. With
`train.steps` = 0 it counts deaths at initialisation under every remedy; otherwise it trains the members of its
configuration. Jobs that agree on `data.model` but for the layer share one forward pass. What fails becomes a row with
its error, is tried again by the next run, and keeps nobody else from going on.
"""

import contextlib
import csv
import gc
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sae_jax.activations import files, tokens
from sae_jax.diagnosis import diagnosis, remedies
from sae_jax.errors import Preempted, Refused, RunFailed
from sae_jax.models import extraction, facts
from sae_jax.outliers import statistics
from sae_jax.reports import tables
from sae_jax.runtime import disk
from sae_jax.sweeps.combinations import Job, grouped
from sae_jax.training import footprint
from sae_jax.training import run as run_lib

COLUMNS = (
    "name", "model", "layer", "domain", "hook", "d_model", "n_features", "k", "seed", "n_tokens", "gamma", "gamma_raw",
    "gamma_direction", "effective_rank", "condition", "steps", "dead_by_relu", "dead_by_topk", "dead_total",
    "forecast_total", "fve", "l0", "bias_projection", "status", "error", "data", "config_hash", "versions",
)  # fmt: skip
TEXTS = ("name", "model", "domain", "hook", "condition", "status", "error", "data", "config_hash", "versions")
KINDS = dict.fromkeys(COLUMNS, float) | dict.fromkeys(TEXTS, str) | dict.fromkeys(
    ("layer", "d_model", "n_features", "k", "seed", "n_tokens", "steps"), int
)  # fmt: skip
Launcher = Callable[[str, list[list[Job]]], None]  # of a workdir and of groups that share a forward pass
JOBS, IDENTITY, RESULTS = "jobs", "sweep.json", "results.csv"


# -- doing them ------------------------------------------------------------------------------------------------------


def check_workdir(workdir: str, every: list[Job], begun: bool = False) -> None:
    """Refuses the workdir of another sweep, and a new one if it is to have `begun`; else writes which sweep this is."""
    path = epath.Path(workdir) / IDENTITY
    mine = {job.name: job.hash for job in every}
    if path.exists():
        theirs = disk.read_json("--workdir", path)
        if theirs != mine:
            other = next(name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name))
            raise Refused("--workdir", workdir, f"a folder of this sweep: it holds another (first difference: {other})")
        return
    if begun:
        raise Refused("--workdir", workdir, "the folder of a sweep that has begun; there is none here to merge")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(path, json.dumps(mine, indent=1) + "\n")
    except OSError as error:
        raise disk.unwritable("--workdir", workdir, error) from error


def check_memory(workdir: str, found: list[Job]) -> None:
    """Refuses combinations that do not fit here, where the width of their activations is known; done ones have fitted.

    What other machines are to do is not for this one to say.
    """
    for job in found:
        if finished(workdir, job):
            continue
        width = facts.width(job.config.data.model) if job.config.data.model.id else job.config.data.d_model
        if job.config.data.path:
            width = None
            with contextlib.suppress(Refused):  # what is no file fails in its turn, and the others do not
                width = files.open_chunks(job.config.data.path).d_model
        if width is None:
            continue
        try:
            if job.config.train.steps:
                footprint.check_run(job.config, width)
            else:
                sae = job.config.sae
                remedies.check_memory(width, n_features=sae.n_features, n_probes=diagnosis.N_PROBES, measure=True)
        except Refused as error:
            raise Refused(error.field, error.value, f"{error.allowed} (combination {job.name})") from error


def run(workdir: str, found: list[Job], launch: Launcher, lock: str = "all") -> None:
    """Everything that is not finished; `lock` names what is shared out here, so that nobody else does it too."""
    mine = epath.Path(workdir) / "shards" / lock
    mine.mkdir(parents=True, exist_ok=True)
    with disk.sole_user(mine, "--workdir"):
        unfinished = [job for job in found if not finished(workdir, job)]
        launch(workdir, grouped(unfinished))


def local(workdir: str, groups: list[list[Job]]) -> None:
    """One after another, in this process, on all its devices."""
    for group in groups:
        run_group(workdir, group)


def run_group(workdir: str, group: list[Job]) -> None:
    """Jobs that share a forward pass: their activations, then each."""
    group = [job for job in group if not finished(workdir, job)]
    layers = sorted({job.config.data.model.layer for job in group})
    folders: dict[int, str] = {}
    try:
        if group and group[0].config.data.model.id and not group[0].config.data.path:
            model = group[0].config.data.model
            folders = extraction.extract(model, layers, str(epath.Path(model.cache or "~/.cache/sae_jax").expanduser()))
    except Preempted:
        raise
    except Exception as error:  # whatever it is, the other models go on
        if isinstance(error, RunFailed) and len(layers) > 1:  # it may be one layer's: each by itself
            for layer in layers:
                run_group(workdir, [job for job in group if job.config.data.model.layer == layer])
            return
        for job in group:
            record(workdir, job, [failure(job, error)])
            print(f"{job.name}: {error}", flush=True)
        return
    for job in group:
        started = time.perf_counter()
        try:
            rows = results(workdir, job, folders.get(job.config.data.model.layer, job.config.data.path))
        except Preempted:
            raise
        except Exception as error:
            rows = [failure(job, error)]
        gc.collect()  # a run points at itself, and with it all that it had on the devices
        record(workdir, job, rows)
        print(f"{job.name}: {_short(rows)} ({time.perf_counter() - started:.0f} s)", flush=True)


def results(workdir: str, job: Job, path: str) -> list[dict[str, Any]]:
    """The rows of one job, from the activations at `path`."""
    config = ConfigDict(job.config.to_dict())
    base: dict[str, Any] = {"status": "done", "versions": _versions()}
    if path:
        config.data.path = path
        base["data"] = files.open_chunks(path).identity.get("sha256", path)
    if config.train.steps:
        found = run_lib.train(config, str(epath.Path(workdir) / JOBS / job.name))
        base |= {key: found[key] for key in ("gamma", "gamma_raw", "gamma_direction", "d_model")}
        base["n_tokens"] = found["n_eval_tokens"]
        return [
            row(job, **base, condition=member["name"], steps=steps, **{
                key: member[when].get(key)
                for key in ("dead_by_relu", "dead_by_topk", "dead_total", "fve", "l0", "bias_projection")
            })
            for member in found["members"] for when, steps in (("init", 0), ("final", config.train.steps))
        ]  # fmt: skip
    limit = config.data.model.n_tokens if config.data.model.id else config.data.statistics_tokens
    found = diagnosis.diagnose(
        tokens.first(files.open_array(path), limit) if path else config, n_features=config.sae.n_features,
        k=config.sae.k or 1, selection=config.sae.activation, measure=True, seed=config.seed,
        n_probes=diagnosis.N_PROBES,  # the count beside it is the number
    )  # fmt: skip
    base |= {key: found[key] for key in
             ("gamma", "gamma_raw", "gamma_direction", "effective_rank", "d_model", "n_tokens")}  # fmt: skip
    rows = []
    for name, remedy in found["remedies"].items():
        deaths = remedy["measured"]
        rows.append(row(
            job, **base, condition=name, steps=0, dead_by_relu=deaths["dead_by_relu"], dead_total=deaths["dead_total"],
            dead_by_topk=deaths["dead_total"] - deaths["dead_by_relu"], forecast_total=remedy["probe"]["dead_total"],
        ))  # fmt: skip
    return rows


def row(job: Job, **values: Any) -> dict[str, Any]:
    """A row of the table; what is not known is empty."""
    config, known = job.config, job.known
    return dict.fromkeys(COLUMNS, None) | {
        "name": job.name, "model": job.model, "layer": config.data.model.layer,
        "domain": known.domain if known else None, "hook": config.data.model.hook, "n_features": config.sae.n_features,
        "k": config.sae.k, "seed": config.seed, "config_hash": job.hash,
    } | values  # fmt: skip


def failure(job: Job, error: BaseException) -> dict[str, Any]:
    """The row of a combination that could not be had."""
    said = " ".join(str(error).split())[:500]
    return row(job, status="failed", versions=_versions(), error=f"{type(error).__name__}: {said}")


def _short(rows: list[dict[str, Any]]) -> str:
    if rows[0]["status"] == "failed":
        return str(rows[0]["error"])
    last = {r["condition"]: r["dead_total"] for r in rows}
    return f"gamma {rows[0]['gamma']:.2f}, dead " + ", ".join(f"{name} {100 * x:.1f} %" for name, x in last.items())


def _versions() -> str:
    return " ".join(f"{name}={version}" for name, version in tables.versions().items())


# -- the table -------------------------------------------------------------------------------------------------------


def _file(workdir: str, job: Job) -> epath.Path:
    return epath.Path(workdir) / JOBS / f"{job.name}.json"


def record(workdir: str, job: Job, rows: list[dict[str, Any]]) -> None:
    """Finishes a job."""
    path = _file(workdir, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_text(path, json.dumps({"hash": job.hash, "rows": rows}, indent=1) + "\n")


def recorded(workdir: str, job: Job) -> list[dict[str, Any]]:
    """The rows that a job has left; none if it was not done, or as another configuration."""
    path = _file(workdir, job)
    found = disk.read_json("--workdir", path, ("hash", "rows")) if path.exists() else {"hash": None, "rows": []}
    return list(found["rows"]) if found["hash"] == job.hash else []


def finished(workdir: str, job: Job) -> bool:
    """Done, and not to be tried again."""
    rows = recorded(workdir, job)
    return bool(rows) and all(r["status"] == "done" for r in rows)


def merge(workdir: str, every: list[Job]) -> list[dict[str, Any]]:
    """results.csv from all that the jobs have left, in their order. Returns its rows.

    Seven digits: those behind hang on how many threads a process had to add with.
    """
    rows = [
        {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in r.items()}
        for job in every for r in recorded(workdir, job)
    ]  # fmt: skip
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    disk.write_text(epath.Path(workdir) / RESULTS, text.getvalue())
    return rows


def summary(workdir: str, found: list[Job]) -> str:
    """How many are done, what failed, and gamma against death at initialisation."""
    left = {job.name: recorded(workdir, job) for job in found}
    rows = [r for rows in left.values() for r in rows]
    failed = [r for r in rows if r["status"] == "failed"]
    lines = [f"failed: {', '.join(r['name'] for r in failed)} (why: column `error`)"] if failed else []
    absent = sum(not rows for rows in left.values())
    plain = [r for r in rows if r["condition"] == "none" and r["steps"] == 0]
    if len(plain) > 2:
        column = {key: np.array([r[key] for r in plain]) for key in ("gamma", "dead_total", "dead_by_relu", "model")}
        for key, what in (("dead_total", "dead in total"), ("dead_by_relu", "dead by ReLU")):
            found_rho = statistics.correlation(column["gamma"], column[key], column["model"])
            lines.append(f"gamma and features {what} at initialisation: {found_rho}")
    done = len(found) - absent - len(failed)
    lines.append(f"{done} of {len(found)} combinations done, {len(failed)} failed, {absent} not yet")
    return "\n".join(lines)


def read_table(
    path: str | Path, what: str = "a line or more", wanted: Callable[[dict[str, Any]], Any] = bool
) -> list[dict[str, Any]]:
    """The rows of a results.csv that are wanted, numbers as numbers, what is empty as None.

    Raises:
      Refused: it is no such table, or has none of `what`.
    """
    rows = [row for row in disk.read_csv("--table", path, KINDS) if wanted(row)]
    if not rows:
        raise Refused("--table", str(path), f"results.csv of a sweep, with {what}")
    return rows
