"""Does gamma cause death? The mean of real layers scaled up and down, everything else left alone.

    pip install -e ".[bundled]"
    python -m experiments.death.causal_gamma --workdir=runs/causal_gamma

x' = x − mu + g·mu for g from 0 to 8, on two layers of low gamma (MiniLM, AntiBERTy) and two of Gemma 3 270M, one of
them the layer whose mean is made by a few tokens of very large norm. 30,000 tokens, n 4096, k 32. Writes
causal_gamma.csv and causal_gamma.png. Expect death to follow g both ways; about five minutes on 2 CPU cores.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import command
from sae_jax.diagnosis import diagnosis, remedies, survey
from sae_jax.models import extraction, sources
from sae_jax.outliers.preprocess import Preprocessing
from sae_jax.reports import figures, tables

LAYERS = (("minilm-l6", 3), ("antiberty", 4), ("gemma-3-270m", 9), ("gemma-3-270m", 1))
SCALES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
N, SIZE, K = 30_000, 4096, 32


def layer_rows(model: str, layer: int) -> list[dict[str, Any]]:
    """Deaths counted, forecast by probes and by the spectrum law, at every scale of the mean."""
    x = extraction.activations(model, [layer], N)[layer].astype(np.float64)
    mu = x.mean(axis=0)
    plain = {"none": Preprocessing(shift=jnp.zeros(x.shape[1], jnp.float32))}
    rows = []
    for g in SCALES:
        tokens = sources.open_tokens((x + (g - 1) * mu).astype(np.float32))
        severity, sample, _ = survey.first_pass(tokens)
        found = remedies.measured_deaths(tokens, plain, SIZE, K, seed=1)["none"]
        probe = remedies.forecast(tokens, plain, severity.raw.mean, 512, seed=0)["none"].deaths(SIZE, K)
        law = diagnosis.predictions(severity, sample, SIZE, K)["spectrum"]
        rows.append({
            "model": model, "layer": layer, "g": g, **severity.gammas(),
            "dead_by_relu": found["dead_by_relu"], "dead_total": found["dead_total"],
            "probe_relu": probe["dead_by_relu"], "probe_total": probe["dead_total"],
            "spectrum_relu": law["dead_by_relu"], "spectrum_total": law["dead_total"],
        })  # fmt: skip
        print(tables.one_line(rows[-1]), flush=True)
    return rows


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Death by pathway against the scale of the mean, one panel a layer."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(8.6, 2.7), layout="constrained")
        axes = figure.subplots(1, len(LAYERS), sharey=True)
        at = np.arange(len(SCALES))
        for axis, (model, layer) in zip(axes, LAYERS, strict=True):
            mine = [r for r in rows if (r["model"], r["layer"]) == (model, layer)]
            relu, total = (100 * np.array([r[key] for r in mine]) for key in ("dead_by_relu", "dead_total"))
            axis.stackplot(at, relu, total - relu, colors=(figures.RELU, figures.TOPK), lw=0,
                           labels=("dead by ReLU", "dead by TopK"))  # fmt: skip
            axis.plot(at, [100 * r["probe_total"] for r in mine], "o", ms=4, mfc="none", color="black", label="probes")
            axis.plot(at, [100 * r["spectrum_total"] for r in mine], "x", ms=4.5, color="black", label="spectrum law")
            own = mine[SCALES.index(1.0)]["gamma_direction"]
            axis.axvline(SCALES.index(1.0), color="black", lw=0.6, ls=":")
            axis.set(title=f"{model}, layer {layer}\ngamma {own:.2f} at g = 1", xlabel="g, times the mean",
                     ylim=(0, 102), xlim=(-0.15, len(SCALES) - 0.85))  # fmt: skip
            axis.set_xticks(at, ["0", "⅛", "¼", "½", "1", "2", "4", "8"])
        axes[0].set_ylabel("dead at initialisation (%)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def main(workdir: Path) -> None:
    """Goes through the layers; writes the table and the figure."""
    rows = [row for model, layer in LAYERS for row in layer_rows(model, layer)]
    tables.write_csv(workdir / "causal_gamma.csv", rows)
    (workdir / "causal_gamma.png").write_bytes(figures.png(picture(rows)))


if __name__ == "__main__":
    command.run(main, "runs/causal_gamma")
