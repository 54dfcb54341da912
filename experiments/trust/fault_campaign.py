"""Everything that may befall a run, many times, at random moments: is anything lost, is the end the same?

    python -m experiments.trust.fault_campaign --workdir=runs/faults            # about 1 h on 2 CPU cores; goes on
    python -m experiments.trust.fault_campaign --workdir=runs/smoke --tries=1   # two minutes

Every activity (train, extract, sweep, export) is first done undisturbed. Then it is killed with SIGKILL or SIGTERM at
moments drawn uniformly over the time it takes or over its work, started again, killed again, `KILLS` times, and left to
end. After each kill every visible file has to be whole; the end has to be the undisturbed one bit by bit. Other faults
follow: full disks, read-only folders, damage, two runs in one workdir, one of two processes killed.

A try is a row of fault_campaign.csv in the workdir, and is not done again; the moments follow from --seed.
"""

from experiments.trust.faults import (
    ACTIVITIES,
    SETTINGS,
    Child,
    Ended,
    all_rows,
    damage,
    in_child,
    make_model,
    not_whole,
    steps,
)

# isort: split
# What faults.py sets in the environment has to be there before these are imported.
import argparse
import ast
import csv
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from sae_jax import cli
from sae_jax.activations import store, stored
from sae_jax.errors import Preempted
from sae_jax.reports import tables
from sae_jax.runtime import checkpoint, disk, optional, stopping

KILLS = 5  # of one try
Row = dict[str, Any]

# -- killed ----------------------------------------------------------------------------------------------------------


def killed_at_random(argv: list[str], log: Path, name: str, folder: Path, by: int, whole: Ended, rng: Any) -> Row:
    """One try: kills, restarts, the end. Moments are uniform in what is left to do, or in time, by turns."""
    row: Row = {"kills": 0, "saved_first": 0, "too_late": 0, "half_visible": 0, "lost": 0, "slowest_stop": 0.0}
    while row["kills"] < KILLS and row["too_late"] < KILLS:
        kept, moment = ACTIVITIES[name].kept(folder) if folder.exists() else 0, float(rng.random())
        if row["kills"] % 2 == 0 and whole.reached:
            ended = Child(argv, log).end(at=kept + moment * (whole.reached - kept), by=by)
        else:
            ended = Child(argv, log).end(after=moment * whole.seconds, by=by)
        half = not_whole(folder) if folder.exists() else []
        row["half_visible"] += len(half)
        row["said"] = row.get("said", "") + "; ".join(half)
        if ended.code == 0:  # it was done before the signal: from the beginning
            row["too_late"] += 1
            shutil.rmtree(folder)
        elif ended.code == (Preempted.exit_code if by == signal.SIGTERM else -by):
            row["kills"] += 1
            row["saved_first"] += "stopped on request;" not in ended.said and by == signal.SIGTERM
            kept = ACTIVITIES[name].kept(folder) if folder.exists() else 0
            row["lost"] = max(row["lost"], ended.reached - kept)
            row["slowest_stop"] = max(row["slowest_stop"], round(ended.dying, 2))
        else:
            raise SystemExit(f"{argv}: exit {ended.code}\n{ended.said}")
    last = Child(argv, log).end()
    return row | {"resumed": int(last.code == 0), "exits": last.code}


# -- other faults: (root, number of the try, random numbers) → its rows ----------------------------------------------


def full_disk(root: Path, attempt: int, rng: Any) -> list[Row]:
    """Training on a file system that fills up at another point each time, then has room again."""
    place = root / "small"
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={rng.integers(150, 900)}k", "tmpfs", place]).returncode:
        return []
    argv = ACTIVITIES["train"].argv(root, place / "w")
    met = Child(argv, root / "log").end()
    half = not_whole(place / "w")
    subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
    row = _row("full disk", met, Child(argv, root / "log").end(), half, root, place / "w")
    subprocess.run(["umount", place], check=True)
    return [row]


def read_only(root: Path, attempt: int, rng: Any) -> list[Row]:
    """Commands on a file system that may not be written; one try of each is enough."""
    place = root / "small"
    place.mkdir(exist_ok=True)
    if attempt or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place]).returncode:
        return []
    rows = [_row(f"read-only: {name}", Child(activity.argv(root, place / "w"), root / "log").end())
            for name, activity in ACTIVITIES.items() if name in cli.VERBS]  # fmt: skip
    subprocess.run(["umount", place], check=True)
    return rows


def damaged(root: Path, attempt: int, rng: Any) -> list[Row]:
    """A file of the newest checkpoint, of both, the settings, the report, the dataset: a bit flipped, or cut short."""
    rows, folder = [], root / "work" / "damaged"
    for what in ("newest checkpoint", "all checkpoints", checkpoint.CONFIG, "report.json"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "undisturbed" / "train", folder)
        every = checkpoint.steps(epath.Path(folder / checkpoint.FOLDER))
        chosen = {"newest checkpoint": every[-1:], "all checkpoints": every}.get(what, [])
        for place in [folder / checkpoint.FOLDER / str(step) for step in chosen] or [folder / what]:
            damage(place, rng)
        met = Child(ACTIVITIES["train"].argv(root, folder), root / "log").end()
        rows.append(_row(f"damaged: {what}", met, met, not_whole(folder) if met.code == 0 else [], root, folder))
    shutil.rmtree(folder)
    shutil.copytree(root / "undisturbed" / "extract", folder)
    dataset = next(folder.glob(f"{store.NAME}/*/{store.VERSION}"))
    shard = stored.template(epath.Path(dataset)).sharded_filepath(shard_index=int(rng.integers(3)), num_shards=None)
    damage(Path(shard) if attempt % 2 else dataset / store.MANIFEST, rng)
    argv = ["train", f"--config={root}/c.py", f"--config.data.path={dataset}", f"--workdir={folder}/w"]
    met = Child(argv, root / "log").end()
    row = _row("damaged: dataset", met)
    if met.code == 0:  # then it has to be in bytes that mean nothing, as those between blocks
        whole = next((root / "undisturbed" / "extract").glob(f"{store.NAME}/*/{store.VERSION}"))
        found = [in_child(lambda place=place: all_rows(place), root / "digest") for place in (dataset, whole)]
        row |= {"resumed": 1, "identical": int(found[0] == found[1])}
    return [*rows, row]


def two_runs(root: Path, attempt: int, rng: Any) -> list[Row]:
    """A second run in a workdir that is in use."""
    folder = root / "work" / "shared"
    shutil.rmtree(folder, ignore_errors=True)
    first = Child(ACTIVITIES["train"].argv(root, folder), root / "log")
    while not (folder / disk.LOCK).exists() or not (folder / disk.LOCK).read_text():
        time.sleep(0.01)
    met = Child(ACTIVITIES["train"].argv(root, folder), root / "log2").end()
    return [_row("two runs in one workdir", met, first.end(), not_whole(folder), root, folder)]


def one_of_two(root: Path, attempt: int, rng: Any) -> list[Row]:
    """One process of two is killed: the other one has to stop by itself, and both go on from the last checkpoint."""
    plain, folder, victim = root / "undisturbed" / "pair", root / "work" / "pair", attempt % 2
    if not plain.exists():
        shutil.rmtree(folder, ignore_errors=True)
        for process in _pair(root, folder):
            process.end()
        folder.rename(plain)
    shutil.rmtree(folder, ignore_errors=True)
    processes = _pair(root, folder)
    while not steps(folder):
        time.sleep(0.01)
    processes[victim].end(after=float(rng.uniform(0, 1)))
    other = processes[1 - victim].end(after=120)
    half = not_whole(folder)
    last = [process.end() for process in _pair(root, folder)]
    row = _row(f"process {victim} of two killed", other, last[0], half)
    return [row | compared(root, folder, plain) | {"slowest_stop": round(other.seconds, 2)}]


def _pair(root: Path, folder: Path) -> list[Child]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Child(ACTIVITIES["train"].argv(root, folder), root / f"log{i}", (port, 2, i)) for i in range(2)]


OTHERS = {"full disk": full_disk, "read-only": read_only, "damage": damaged, "two runs": two_runs, "pair": one_of_two}


def _row(
    what: str, first: Ended, last: Ended | None = None, half: list[str] | None = None, root: Path | None = None,
    folder: Path | None = None,
) -> Row:  # fmt: skip
    """What the fault led to: exit code and line of the process that met it, and how the one after it ended."""
    row: Row = {"what": what, "exits": first.code, "half_visible": len(half or [])}
    lines = [line for line in first.said.splitlines() if line.startswith("sae_jax: ")]
    row |= {"lines": len(lines), "tracebacks": first.said.count("Traceback"), "said": lines[0][:200] if lines else ""}
    if last and last.code == 0:
        row["resumed"] = 1
        if root and folder:
            row |= compared(root, folder, root / "undisturbed" / "train")
    return row


def compared(root: Path, ours: Path, theirs: Path, name: str = "train") -> Row:
    """Whether two ends are the same bit by bit, and what is not."""
    def read(folder: Path) -> dict[str, str]:
        return ast.literal_eval(in_child(lambda: ACTIVITIES[name].end(folder), root / "digest"))

    a, b = read(ours), read(theirs)
    differs = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    return {"identical": int(not differs), "differs": ", ".join(differs)[:200]}


# -- the campaign ------------------------------------------------------------------------------------------------------

COLUMNS = ("what", "try", "kills", "saved_first", "too_late", "exits", "resumed", "identical", "differs",
           "half_visible", "lost", "slowest_stop", "lines", "tracebacks", "said")  # fmt: skip


def main() -> None:
    """Does the tries that are not in the table yet, then prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tries", type=int, default=6, help="of every activity and signal, and of every other fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[*ACTIVITIES, *OTHERS], help="activities and other faults to do")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, stopping.end)  # children have it from their first moment
    root: Path = given.workdir.absolute()
    (root / "work").mkdir(parents=True, exist_ok=True)
    (root / "c.py").write_text(SETTINGS)
    (root / "text.txt").write_text(" ".join(str(number) for number in np.random.default_rng(0).integers(0, 60, 40_000)))
    jax.config.update("jax_compilation_cache_dir", str(root / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    needed = ["train", "extract"] if {"extract", "damage", "read-only"} & set(given.only) else ["train"]
    if "extract" in needed:
        for name in ("torch", "transformers"):
            optional.module(name, "hf")  # once, for all children
        if not (root / "model").exists():
            in_child(lambda: make_model(root / "model"), root / "digest")
    table = root / "fault_campaign.csv"
    rows = list(csv.DictReader(table.open())) if table.exists() else []

    def note(new: list[Row]) -> None:
        rows.extend({column: str(row.get(column, "")) for column in COLUMNS} for row in new)
        tables.write_csv(table, rows)
        for row in new:
            print(tables.one_line({key: str(value) for key, value in row.items()}), flush=True)

    for name in needed:
        if not (root / "undisturbed" / name).exists():
            undisturbed(root, name, times=1)
    known = {(row["what"], row["try"]) for row in rows}
    for number, (name, activity) in enumerate(ACTIVITIES.items()):
        if name not in cli.VERBS or name not in given.only:
            continue
        plain, whole = root / "undisturbed" / name, undisturbed(root, name)
        for by in (signal.SIGTERM, signal.SIGKILL):
            for attempt in range(given.tries):
                what = f"{name}: {by.name}"
                if (what, str(attempt)) in known:
                    continue
                folder = root / "work" / f"{name}{by.name}{attempt}"
                shutil.rmtree(folder, ignore_errors=True)
                rng = np.random.default_rng([given.seed, number, by, attempt])
                row = killed_at_random(activity.argv(root, folder), root / "log", name, folder, by, whole, rng)
                note([{"what": what, "try": attempt, **row, **compared(root, folder, plain, name)}])
                shutil.rmtree(folder)
    for number, (name, fault) in enumerate(OTHERS.items()):
        for attempt in range(given.tries):
            label = f"{name} {attempt}"
            if name in given.only and label not in {row["try"] for row in rows}:
                rng = np.random.default_rng([given.seed, 100 + number, attempt])
                note([{**row, "try": label} for row in fault(root, attempt, rng)])
    print(summary(rows))


def undisturbed(root: Path, name: str, times: int = 2) -> Ended:
    """Does an activity without a fault, twice: once to compile, once to take the time."""
    plain = root / "undisturbed" / name
    for _ in range(times):
        shutil.rmtree(plain, ignore_errors=True)
        plain.parent.mkdir(exist_ok=True)
        ended = Child(ACTIVITIES[name].argv(root, plain), root / "log").end()
        if ended.code:
            raise SystemExit(f"{name}: exit {ended.code}\n{ended.said}")
    return ended


def summary(rows: list[dict[str, str]]) -> str:
    """A line for every fault, in Markdown."""
    sums = ("kills", "saved_first", "resumed", "identical", "half_visible", "tracebacks")
    columns = ["fault", "tries", *sums, "most lost", "slowest stop, s", "exits"]
    lines = [f"| {' | '.join(columns)} |".replace("_", " "), "| --- " * len(columns) + "|"]
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        total = " | ".join(str(sum(int(row[key] or 0) for row in mine)) for key in sums)
        most = {key: max(float(row[key] or 0) for row in mine) for key in ("lost", "slowest_stop")}
        exits = ", ".join(sorted({row["exits"] for row in mine}))
        lines.append(f"| {what} | {len(mine)} | {total} | {most['lost']:.0f} | {most['slowest_stop']:.1f} | {exits} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
