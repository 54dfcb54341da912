"""Figure S7: the two phases on a real layer, Gemma 3 270M after block 9 (gamma about 5), four conditions.

    pip install -e ".[demo]"
    python -m experiments.paper.figS7_real_dynamics --workdir=runs/gemma_dynamics --scale=cpu

Baseline, AuxK, bias frozen at zero, and centred, on the same batches; death by pathway, bias and FVE at steps even in
log. Writes figS7_real_dynamics.csv and .png; `fig6_centering.py` draws from WORKDIR/gemma. Expect the total of the
baseline to start falling with dead-by-ReLU where it was, frozen or not, and nothing dead by ReLU in the centred one.
Five minutes of processor time, once the activations of configs/quickstart.py are in the cache; `smoke` uses synthetic
activations.
"""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import command
from sae_jax import config as config_lib
from sae_jax.reports import figures, tables
from sae_jax.runtime import checkpoint
from sae_jax.training import run as run_lib

# steps, batch, n, k, learning rate, held-out tokens
SCALES = {
    "smoke": (20, 32, 64, 3, 1e-3, 200),
    "cpu": (1000, 256, 1024, 8, 3e-4, 4_000),
    "paper": (200_000, 2048, 8192, 64, 3e-4, 100_000),
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "baseline": {}, "AuxK": {"auxk": {"preset": "dictionary_learning"}}, "frozen bias": {"sae": {"freeze_bias": True}},
    "centred": {"sae": {"center": "geometric_median"}},
}  # fmt: skip
# Drawn in this order: a wide line first, so that those that lie on it are seen.
LOOKS: dict[str, dict[str, Any]] = {
    "baseline": {"color": "#9e9e9e", "lw": 3.0}, "AuxK": {"color": figures.MEMBER_COLOURS[1], "lw": 1.3},
    "frozen bias": {"color": figures.MEMBER_COLOURS[2], "lw": 1.3, "ls": "--"},
    "centred": {"color": figures.MEMBER_COLOURS[3], "lw": 1.6},
}  # fmt: skip


def train(workdir: Path, scale: str) -> list[dict[str, Any]]:
    """The run, or what is left of it; a row for each condition and evaluation."""
    steps, batch, n, k, rate, held_out = SCALES[scale]
    c = config_lib.base()
    c.sae.n_features, c.sae.k = n, k
    if scale == "smoke":
        c.data.update(signal="sparse", gamma=5.0, d_model=16, n_true_features=64, n_active=2, statistics_tokens=1000)
    else:
        c.data.model.update(id="gemma-3-270m", layer=9, n_tokens=120_000 if scale == "cpu" else 100_000_000)
    c.train.update(steps=steps, batch_size=batch, learning_rate=rate, decay_fraction=0.0)
    c.auxk.preset, c.auxk.dead_after_tokens = "none", batch * max(1, steps // 20)
    c.eval.n_tokens, c.eval.points, c.checkpoint.every = held_out, 25, max(1, steps // 10)
    c.members = ConfigDict(CONDITIONS)
    run_lib.train(c, str(workdir))
    keys = ("dead_by_relu", "dead_by_topk", "dead_total", "bias_projection", "fve")
    return [{"condition": name, "step": entry["step"], **{key: entry["members"][name][key] for key in keys}}
            for entry in checkpoint.history(str(workdir)) for name in CONDITIONS]  # fmt: skip


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Each pathway, the bias and the FVE over steps."""
    panels = (("dead_by_topk", "dead by TopK (%)", 100), ("dead_by_relu", "dead by ReLU (%)", 100),
              ("bias_projection", "b·mu / ‖mu‖²", 1), ("fve", "FVE about the mean", 1))  # fmt: skip
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(9.6, 2.7), layout="constrained")
        for axis, (key, label, factor) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for name, look in LOOKS.items():
                mine = [row for row in rows if row["condition"] == name]
                at, values = ([max(row["step"], 0.5) for row in mine], [factor * row[key] for row in mine])
                axis.plot(at, values, label=name, **look)
            axis.set(xscale="log", xlabel="step (0 at the left edge)", title=label)
            if key == "fve":
                axis.set_ylim(-0.05, 1.02)
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def main(workdir: Path, scale: str) -> None:
    """Trains, writes the table and the picture."""
    rows = train(workdir, scale)
    tables.write_csv(workdir / "figS7_real_dynamics.csv", rows)
    (workdir / "figS7_real_dynamics.png").write_bytes(figures.png(picture(rows)))


if __name__ == "__main__":
    command.start(main, "gemma_dynamics")
