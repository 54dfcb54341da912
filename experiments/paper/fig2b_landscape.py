"""Figure 2b: activation magnitudes over tokens and dimensions on real layers, outlier dimensions marked.

    pip install -e ".[bundled]"
    python -m experiments.paper.fig2b_landscape --workdir=runs/fig2b --scale=cpu

A layer of high gamma (Gemma 3 270M after block 9) above one of low gamma (MiniLM after block 3), each after LayerNorm,
as in the paper. Writes fig2b_landscape.csv, the outlier dimensions, and a .png for each layer. Expect a few dimensions
that stand out on every token of Gemma. About two minutes on 2 CPU cores; `smoke` uses synthetic activations.
"""

from pathlib import Path

import numpy as np

from experiments import command
from sae_jax import config as config_lib
from sae_jax.models import extraction, sources
from sae_jax.outliers import moments as moments_lib
from sae_jax.reports import figures, tables

LAYERS = (("gemma-3-270m", 9), ("minilm-l6", 3))
N_TOKENS = {"smoke": 500, "cpu": 5000, "paper": 100_000}


def tokens(model: str, layer: int, scale: str) -> np.ndarray:
    """(N, d) activations; on the smallest scale synthetic ones with four outlier dimensions."""
    if scale != "smoke":
        return extraction.activations(model, [layer], N_TOKENS[scale])[layer].astype(np.float64)
    config = config_lib.base()
    config.data.update(signal="gaussian", gamma=5.0, d_model=32, mean_direction="few", statistics_tokens=500)
    return np.concatenate(list(sources.open_source(config).statistics())).astype(np.float64)


def main(workdir: Path, scale: str) -> None:
    """Goes through the layers, writes the table and the pictures."""
    rows = []
    for model, layer in LAYERS:
        x = moments_lib.layer_norm(tokens(model, layer, scale))
        found = moments_lib.moments(x)
        share = found.mean**2 / (found.mean @ found.mean)
        ratio = np.abs(found.mean) / found.sigma
        standing = [int(j) for j in np.argsort(-share) if ratio[j] >= moments_lib.OUTLIER]
        marked = [{"dimension": j, "mean_over_sigma": float(ratio[j]), "share_of_mean_square": float(share[j])}
                  for j in standing]  # fmt: skip
        rows += [{"model": model, "layer": layer, "gamma": found.gamma, **o} for o in marked]
        print(f"{model} layer {layer}: gamma {found.gamma:.2f}, {len(marked)} outlier dimensions", flush=True)
        shown = x[np.linspace(0, len(x) - 1, 200).astype(int)]
        workdir.mkdir(parents=True, exist_ok=True)
        picture = figures.png(figures.landscape(shown, marked, len(marked)))
        (workdir / f"fig2b_{model}.png").write_bytes(picture)
    tables.write_csv(workdir / "fig2b_landscape.csv", rows)


if __name__ == "__main__":
    command.start(main, "fig2b")
