"""Models in JAX against the same in torch: what they hold at every layer, who dies of it, and how long it takes.

    python -m experiments.speed.bench_backends --workdir=runs/bench_backends

Of each bundled model, on the same batches: the largest difference at any layer, token and dimension, in deviations of
that dimension; how far each is from torch in float64, likewise; of how many features of an untrained SAE (n 1024, k 8,
nothing subtracted) the fate is another; and the time from the inputs of a batch to the rows of one layer, compiled, in
pairs that take turns (`--pairs=0` leaves it out). Writes bench_backends.csv. Needs the extras bundled and torchax;
about seven minutes on 2 CPU cores.
"""

import time
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import command
from sae_jax import config as config_lib
from sae_jax.activations import store
from sae_jax.autoencoder import death
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.models import adapters, extraction
from sae_jax.reports import tables

PAIRS = flags.DEFINE_integer("pairs", 7, "timed, of each model")
MODELS = {"gemma-3-270m": 9, "minilm-l6": 3, "antiberty": 4, "efficientnet-lite0": 8}  # and the layer that is timed
BATCHES, N, K = 2, 1024, 8


def fates(x: np.ndarray) -> np.ndarray:
    """Alive, dead by TopK or dead by ReLU, of every feature."""
    sae = sae_lib.init(jax.random.key(0), N, K, jnp.zeros(x.shape[1], jnp.float32))
    seen, _ = jax.jit(death.sight)(sae, jnp.asarray(x), jnp.ones(len(x), bool))
    return np.where(seen.fired, 0, np.where(seen.positive, 1, 2))


def compared(name: str) -> dict[str, object]:
    """One model through both."""
    model = config_lib.base({"data.model.id": name, "data.model.layer": MODELS[name]}).data.model
    networks = {}
    for backend in ("torch", "jax"):
        model.backend = backend
        networks[backend] = adapters.load(model)
    batches = list(islice(networks["torch"].batches(), BATCHES))
    lowest = 0 if isinstance(networks["torch"].width, int) else 1
    layers = range(lowest, len(networks["torch"].blocks) + 1)

    def rows(backend: str, batch: int, layers: list[int]) -> dict[int, store.Rows]:
        return extraction.forward(networks[backend], model, batches[batch], batch * model.batch_size, layers)

    found = {backend: [rows(backend, i, list(layers)) for i in range(BATCHES)] for backend in networks}
    seconds: dict[str, list[float]] = {"torch": [], "jax": []}
    rows("jax", 0, [MODELS[name]])  # compiled
    for _ in range(PAIRS.value):
        for backend, taken in seconds.items():
            began = time.perf_counter()
            rows(backend, 0, [MODELS[name]])
            taken.append(time.perf_counter() - began)
    timed: dict[str, object] = {}
    if PAIRS.value:
        ratio = np.median(np.array(seconds["torch"]) / np.array(seconds["jax"]))
        timed = {
            "torch_seconds": round(float(np.median(seconds["torch"])), 3),
            "jax_seconds": round(float(np.median(seconds["jax"])), 3), "torch_over_jax": round(float(ratio), 2),
        }  # fmt: skip
    networks["float64"] = networks["torch"]._replace(run=networks["torch"].run.double())  # in place: nothing after it
    batches = [
        batch._replace(inputs={key: x.double() if x.is_floating_point() else x for key, x in batch.inputs.items()})
        for batch in batches
    ]
    found["float64"] = [rows("float64", i, list(layers)) for i in range(BATCHES)]
    apart, differ = dict.fromkeys((("torch", "jax"), ("torch", "float64"), ("jax", "float64")), 0.0), 0
    for layer in layers:
        x = {backend: np.concatenate([part[layer].x for part in parts]) for backend, parts in found.items()}
        deviation = np.maximum(x["torch"].std(axis=0, dtype=np.float64), 1e-12)
        for one, other in apart:
            worst = float(np.max(np.abs(x[one] - x[other]) / deviation))
            apart[one, other] = max(apart[one, other], worst)
        differ += int(np.sum(fates(x["torch"]) != fates(x["jax"])))
    return {
        "model": name, "layers": len(layers), "tokens": sum(int(batch.real.sum()) for batch in batches),
        "largest_difference": f"{apart['torch', 'jax']:.1e}", "torch_error": f"{apart['torch', 'float64']:.1e}",
        "jax_error": f"{apart['jax', 'float64']:.1e}", "fates_that_differ": differ, "fates": N * len(layers),
        "timed_layer": MODELS[name], **timed,
    }  # fmt: skip


def main(workdir: Path) -> None:
    """All of them."""
    found = []
    for name in MODELS:
        found.append(compared(name))
        print(found[-1], flush=True)
        tables.write_csv(workdir / "bench_backends.csv", found)


if __name__ == "__main__":
    command.run(main, "runs/bench_backends")
