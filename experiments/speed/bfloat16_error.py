"""What rounding the encoder's operands to bfloat16 costs, against gamma, with the bias at the mean and at zero.

    python -m experiments.speed.bfloat16_error --workdir=runs/bfloat16_error --scale=cpu

Normal activations, mean spread over all dimensions, an untrained SAE. For every gamma, start of the bias and precision
(`train.precision`): the root mean square error of the pre-activations against float64, as a share of their standard
deviation over tokens, and how many of the k kept features of a token are others. Writes bfloat16_error.csv; seconds.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command
from sae_jax.autoencoder import topk
from sae_jax.reports import tables

GAMMAS = (0, 1, 5, 20, 100, 1000)
SIZES = {"smoke": (16, 64, 4, 200), "cpu": (768, 8192, 64, 2048), "paper": (4096, 32768, 64, 2048)}  # d, n, k, tokens


def main(workdir: Path, scale: str) -> None:
    """Goes through gammas and starts; writes and prints the table."""
    d, n, k, n_tokens = SIZES[scale]
    rng = np.random.default_rng(0)
    signal, rows = rng.standard_normal((n_tokens, d)), rng.standard_normal((n, d)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = []
    for gamma in GAMMAS:
        mu = np.full(d, gamma, np.float32)
        x = (signal + mu).astype(np.float32)
        for start, b in (("zero", np.zeros_like(mu)), ("mean", mu)):
            exact = (x.astype(np.float64) - b) @ rows.T.astype(np.float64)
            kept = np.sort(np.argpartition(-exact, k, axis=1)[:, :k], axis=1)
            for precision in ("float32", "bfloat16"):
                z = topk.product(jnp.asarray(x) - b, jnp.asarray(rows, precision))
                chosen = np.asarray(jax.lax.top_k(z, k)[1])
                same = np.mean([len(np.intersect1d(a, c)) for a, c in zip(kept, chosen, strict=True)]) / k
                error = np.sqrt(np.mean((np.asarray(z, np.float64) - exact) ** 2)) / exact.std(axis=0).mean()
                found.append({"gamma": gamma, "bias": start, "precision": precision, "error": f"{error:.2e}",
                              "other_features": f"{1 - same:.2e}"})  # fmt: skip
                print(tables.one_line(found[-1]), flush=True)
    tables.write_csv(workdir / "bfloat16_error.csv", found)


if __name__ == "__main__":
    command.start(main, "bfloat16_error")
