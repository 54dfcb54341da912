"""What the SAEs of a run are worth to the model: its loss with their reconstruction in place of the residual stream.

    python -m sae_jax train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m experiments.trust.ce_recovered --run=runs/quickstart --workdir=runs/ce_recovered

Mean of −log p(next token) in nats over sequences that lie behind the text which the run was extracted from, evenly
spaced over the rest: clean; with the stream of that layer at zero, at the mean of the training tokens; and with each
member's reconstruction. BOS is left as it is and predicts nothing that counts. Intervals are 95 % over sequences drawn
again. Writes ce_recovered.csv; about a minute of processor time a stream for 48 sequences of 256 tokens.

Several runs on one layer are compared on the same sequences: --run=A --run=B. A run on activations from a file does not
know their text: --text=FILE names it, of which its data.model.n_tokens tokens were extracted.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import command
from sae_jax import config as config_lib
from sae_jax.activations.chunks import CHUNK
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused
from sae_jax.exchange import formats, sharing
from sae_jax.exchange.formats import Packed
from sae_jax.models import adapters, extraction, splicing
from sae_jax.models.network import Batch, Network
from sae_jax.reports import tables
from sae_jax.runtime import checkpoint

RUNS = flags.DEFINE_multi_string("run", ["runs/quickstart"], "a run on a decoder of text, or several")
TEXT = flags.DEFINE_string("text", "", "the text that the activations are of, where the run does not say")
ABLATED = ("mean", "zero")
SEQUENCES = flags.DEFINE_integer("sequences", 48, "of the model's context each")


def reconstruction(sae: SAE) -> splicing.Replace:
    """From rows of activations to x̂, a fixed number of rows at a time."""
    run = jax.jit(lambda x: sae_lib.decode(sae, sae_lib.encode(sae, x)))

    def replace(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((0, -len(x) % 256), (0, 0)))
        return np.asarray(run(jnp.asarray(padded)))[: len(x)]

    return replace


def runs() -> tuple[ConfigDict, dict[str, Packed]]:
    """The model that all runs are on, and their SAEs by RUN/MEMBER, or by member where there is one run and none is
    called clean, mean or zero.

    Its `n_tokens` is that of the run that may have seen the most.

    Raises:
      Refused: a run is on something else than the first.
    """
    packed: dict[str, Packed] = {}
    model: ConfigDict | None = None
    for run in RUNS.value:
        config = config_lib.from_identity(checkpoint.saved(run).identity)
        own = config.data.model
        if not own.id:
            raise Refused("--run", run, "a run whose data.model.id names the decoder of its text")
        model = own if model is None else model
        for key in ("id", "layer", "hook", "context", *(() if TEXT.value else ("text",))):
            if own[key] != model[key]:
                raise Refused("--run", f"{run} (data.model.{key} {own[key]!r})", f"{model[key]!r}, as of the first run")
        model.n_tokens = max(model.n_tokens, own.n_tokens)
        names = list(config_lib.members(config))
        plain = len(RUNS.value) == 1 and not {"clean", *ABLATED} & set(names)
        named = {name: name if plain else f"{Path(os.path.abspath(run)).name}/{name}" for name in names}
        if packed.keys() & set(named.values()):
            raise Refused("--run", run, "runs in folders of different names, as the table names them so")
        packed |= {named[name]: sharing.packed_of(run, name) for name in names}
    assert model is not None
    model.text = TEXT.value or model.text
    return model, packed


def unseen(network: Network, model: ConfigDict, start: int, count: int) -> list[Batch]:
    """Sequences behind the first `start` tokens, evenly spaced over what is left."""
    seen, left = 0, []
    for batch in network.batches():
        if seen >= start:
            left.append(batch)
        seen += int(extraction.kept(model, batch).sum())
    if not left:
        raise Refused("--text", TEXT.value, f"a text of more than the {start:,} tokens that the run may have seen")
    return [left[i] for i in np.linspace(0, len(left) - 1, min(count, len(left))).astype(int)]


def main(workdir: Path) -> None:
    """Loads, splices, counts."""
    model, packed = runs()
    start = model.n_tokens + CHUNK + model.batch_size * model.context  # extraction ends with a whole batch
    model.batch_size = 1  # the logits of one sequence are 270 MB
    network = adapters.load(model, head=True)
    mean = np.asarray(next(iter(packed.values())).metadata["mu"], np.float32)
    streams: dict[str, splicing.Replace | None] = {
        "clean": None, "zero": np.zeros_like, "mean": lambda x: np.broadcast_to(mean, x.shape),
        **{name: reconstruction(jax.tree.map(jnp.asarray, formats.folded(one))) for name, one in packed.items()},
    }  # fmt: skip
    batches = unseen(network, model, start, SEQUENCES.value)
    sums, tokens = {name: np.zeros(len(batches)) for name in streams}, np.zeros(len(batches))
    for i, batch in enumerate(batches):
        for name, replace in streams.items():
            found = splicing.losses(network, model, batch, replace)
            sums[name][i], tokens[i] = found.sum(dtype=np.float64), len(found)
        so_far = {name: float(total.sum() / tokens.sum()) for name, total in sums.items()}
        print(i, tables.one_line(so_far), flush=True)

    draws = [np.arange(len(batches)), *np.random.default_rng(0).integers(0, len(batches), (2000, len(batches)))]
    ce = {name: [total[at].sum() / tokens[at].sum() for at in draws] for name, total in sums.items()}
    rows = []
    for name in streams:
        row: dict[str, Any] = {"stream": name, "tokens": int(tokens.sum()), "ce": float(ce[name][0])}
        for ablated in ABLATED:
            shares = [splicing.recovered(*of_draw) for of_draw in zip(ce["clean"], ce[ablated], ce[name], strict=True)]
            low, high = np.quantile(np.asarray(shares[1:], float), (0.025, 0.975))
            row |= {f"over_{ablated}": shares[0], f"over_{ablated}_low": low, f"over_{ablated}_high": high}
        final = packed[name].metadata["final"] if name in packed else {}
        print(tables.one_line(row), flush=True)
        rows.append(row | {key: final.get(key) for key in ("fve", "dead_total")})
    tables.write_csv(workdir / "ce_recovered.csv", rows)


if __name__ == "__main__":
    command.run(main, "runs/ce_recovered")
