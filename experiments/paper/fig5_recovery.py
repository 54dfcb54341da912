"""Figure 5: two phases of recovery and the bias that crawls, over gamma and four conditions.

    python -m experiments.paper.fig5_recovery --workdir=runs/fig5 --scale=cpu

Sparse signal with its mean in one dimension; gamma 1, 5, 20, 40, each with the bias learned and frozen at zero, without
AuxK and with it: sixteen SAEs that see the same signal, 2M steps each. The half with AuxK trains in a process of its
own beside the other; killed, either goes on from its last checkpoint. Writes fig5_recovery.csv, fig5_transitions.csv
(what became of features, from the ledger of fates), fig5_claims.csv (the numbers behind the claims) and
fig5_recovery.png. Expect dead-by-TopK to fall early whatever the condition, dead-by-ReLU only as b comes to mu, later
the larger gamma. About 40 minutes on 2 CPU cores.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import command
from sae_jax import config as config_lib
from sae_jax.reports import figures, tables
from sae_jax.runtime import checkpoint
from sae_jax.training import fates
from sae_jax.training import run as run_lib

GAMMAS = (1.0, 5.0, 20.0, 40.0)
# steps, d, true features, active, n, k, batch, held-out tokens, learning rate
SCALES = {
    "smoke": (200, 16, 64, 2, 64, 3, 32, 500, 1e-3),
    "cpu": (2_000_000, 32, 128, 2, 128, 3, 32, 20_000, 3e-4),
    "paper": (2_000_000, 256, 1024, 16, 8192, 64, 2048, 100_000, 3e-4),
}
PRESETS = {"plain": "none", "auxk": "dictionary_learning"}
CONDITIONS = ("baseline", "AuxK", "frozen bias", "AuxK, frozen bias")
KEYS = ("dead_by_relu", "dead_by_topk", "dead_total", "bias_projection", "bias_relative_error", "fve", "mmcs",
        "mmcs_alive")  # fmt: skip


def config(scale: str, half: str) -> ConfigDict:
    """The members of one preset: every gamma, with the bias learned and frozen, on the same signal."""
    steps, d, n_true, active, n, k, batch, held_out, rate = SCALES[scale]
    c = config_lib.base()
    c.sae.n_features, c.sae.k = n, k
    c.data.update(signal="sparse", gamma=1.0, d_model=d, n_true_features=n_true, n_active=active,
                  mean_direction="one", statistics_tokens=min(20_000, 20 * steps))  # fmt: skip
    c.train.update(steps=steps, batch_size=batch, learning_rate=rate, decay_fraction=0.0)
    c.train.steps_per_dispatch = min(2000, steps // 10)
    c.auxk.preset = PRESETS[half]
    c.auxk.dead_after_tokens = batch * min(5000, steps // 10)  # as 10M tokens are at a batch of 2,048
    c.eval.n_tokens, c.eval.points = held_out, 60
    c.checkpoint.every = max(50, steps // 100)
    c.members = ConfigDict({
        f"{gamma:g}{' frozen' if frozen else ''}": {"data": {"gamma": gamma}, "sae": {"freeze_bias": frozen}}
        for gamma in GAMMAS for frozen in (False, True)
    })  # fmt: skip
    return c


Curves = dict[tuple[str, float], tuple[list[dict[str, Any]], fates.Ledger]]


def curves(workdir: Path) -> Curves:
    """(condition, gamma) → its evaluations and its ledger."""
    found: Curves = {}
    for half in PRESETS:
        history = checkpoint.history(str(workdir / half))
        for gamma in GAMMAS:
            for suffix, names in (("", CONDITIONS[:2]), (" frozen", CONDITIONS[2:])):
                name = f"{gamma:g}{suffix}"
                entries = [{"step": entry["step"], **entry["members"][name]} for entry in history]
                found[names[half == "auxk"], gamma] = entries, fates.ledger(history, name)
    return found


def at(entries: list[dict[str, Any]], step: float, key: str) -> float:
    """The value at the last evaluation up to a step."""
    return float([entry[key] for entry in entries if entry["step"] <= step][-1])


def first(entries: list[dict[str, Any]], key: str, level: float, down: bool = False) -> int | None:
    """The step of the first evaluation at which a value has come to a level from below, or from above."""
    return next((e["step"] for e in entries if (e[key] <= level if down else e[key] >= level)), None)


def claims(found: Curves) -> list[dict[str, Any]]:
    """The numbers behind the paper's four claims: percent dead at the start, after a tenth, and at the end; steps."""
    end = min(entries[-1]["step"] for entries, _ in found.values())
    rows = []
    for gamma in GAMMAS:
        for condition in CONDITIONS:
            entries, _ = found[condition, gamma]
            begin, low = at(entries, 0, "dead_by_topk"), min(e["dead_by_topk"] for e in entries)
            rows.append({
                "gamma": f"{gamma:g}", "condition": condition,
                **{key: " → ".join(f"{100 * at(entries, step, key):.0f}" for step in (0, end / 10, end))
                   for key in ("dead_by_topk", "dead_by_relu")},
                "half": str(first(entries, "dead_by_topk", (begin + low) / 2, down=True) or ""),
                "bias_projection": f"{at(entries, end, 'bias_projection'):.2f}",
                **{f"steps_{share}": str(first(entries, "bias_projection", share / 100) or "") for share in (50, 90)},
                "mmcs": f"{at(entries, end, 'mmcs'):.3f}",
            })  # fmt: skip
    return rows


def transitions(found: Curves) -> list[dict[str, Any]]:
    """What became of features over the first tenth of the run and over the rest; fractions of all n."""
    end = min(entries[-1]["step"] for entries, _ in found.values())
    rows = []
    for (condition, gamma), (_, ledger) in found.items():
        marks = [int(np.flatnonzero(ledger.steps <= step)[-1]) for step in (0, end / 10, end)]
        for phase, (a, b) in (("early", marks[:2]), ("late", marks[1:]), ("whole", marks[::2])):
            changed = fates.transitions(ledger.fates[a], ledger.fates[b])
            rows.append({"gamma": gamma, "condition": condition, "phase": phase, "from_step": int(ledger.steps[a]),
                         "to_step": int(ledger.steps[b]), **changed})  # fmt: skip
    return rows


def picture(found: Curves) -> Figure:
    """a, b, c: baseline over gamma; d, e, f: each pathway across the conditions."""
    colours = dict(zip(GAMMAS, ("#4393c3", "#1b7837", "#e69f00", "#67001f"), strict=True))
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDE, 5.4), layout="constrained")
        axes = figure.subplots(2, 3)
        top = (("dead_total", "dead in total (%)", 100),
               ("bias_projection", "b·mu / ‖mu‖²", 1), ("mmcs", "MMCS", 1))  # fmt: skip
        for axis, (key, title, factor) in zip(axes[0], top, strict=True):
            for gamma, colour in colours.items():
                entries, _ = found["baseline", gamma]
                axis.plot([e["step"] for e in entries[1:]], [factor * e[key] for e in entries[1:]], color=colour,
                          lw=1.4, label=f"gamma {gamma:g}")  # fmt: skip
            axis.set(title="baseline", ylabel=title)
        looks = dict(zip(CONDITIONS, figures.MEMBER_COLOURS, strict=False))
        bottom = (("dead_by_topk", 20.0, "dead by TopK"), ("dead_by_relu", 20.0, "dead by ReLU"),
                  ("dead_by_relu", 5.0, "dead by ReLU"))  # fmt: skip
        for axis, (key, gamma, title) in zip(axes[1], bottom, strict=True):
            for condition, colour in looks.items():
                entries, _ = found[condition, gamma]
                axis.plot([e["step"] for e in entries[1:]], [100 * e[key] for e in entries[1:]], color=colour, lw=1.4,
                          ls="--" if "frozen" in condition else "-", label=condition)  # fmt: skip
            axis.set(title=f"gamma {gamma:g}", ylabel=f"{title} (%)", xlabel="step", ylim=(-2, None))
        upper, lower = (row[0].get_legend_handles_labels() for row in axes)
        figure.legend(*upper, loc="outside upper center", ncols=4)
        figure.legend(*lower, loc="outside lower center", ncols=4)
        end = max(entries[-1]["step"] for entries, _ in found.values())
        for axis, letter in zip(axes.ravel(), "abcdef", strict=True):
            axis.set_title(letter, loc="left", weight="bold")
            axis.set(xscale="log", xlim=(min(100, end / 10), end))  # nothing moves before
    return figure


def main(workdir: Path, scale: str, half: str = "") -> None:
    """Trains the two halves side by side, each in a process of its own; then the tables and the picture."""
    if half:
        run_lib.train(config(scale, half), str(workdir / half))
        return
    go = [sys.executable, "-m", "experiments.paper.fig5_recovery", f"--workdir={workdir}", f"--scale={scale}"]
    processes = [subprocess.Popen([*go, f"--half={half}"]) for half in PRESETS]
    if any([process.wait() for process in processes]):
        sys.exit(1)
    summarise(workdir)


def sparser(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations that lie at least 5 % of their step behind the one before, and the last."""
    kept = entries[:1]
    for entry in entries[1:]:
        if entry["step"] >= 1.05 * kept[-1]["step"] or entry is entries[-1]:
            kept.append(entry)
    return kept


def summarise(workdir: Path) -> None:
    """The tables and the picture of what is trained so far."""
    found = curves(workdir)
    rows = [{"condition": condition, "gamma": gamma, "step": e["step"], **{key: f"{e[key]:.4g}" for key in KEYS}}
            for (condition, gamma), (entries, _) in found.items() for e in sparser(entries)]  # fmt: skip
    tables.write_csv(workdir / "fig5_recovery.csv", rows)
    tables.write_csv(workdir / "fig5_transitions.csv", transitions(found))
    (workdir / "fig5_recovery.png").write_bytes(figures.png(picture(found)))
    tables.write_csv(workdir / "fig5_claims.csv", claims(found))
    for row in claims(found):
        print(tables.one_line(row))


if __name__ == "__main__":
    command.start(main, "fig5", half=tuple(PRESETS))
