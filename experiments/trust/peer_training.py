"""Each activation trained by us and by SAELens' own trainer, on the same batches for as many steps: FVE at the same L0.

    pip install -e ".[test]" && python -m experiments.trust.peer_training --out=experiments/trust/peer_training.csv

Data of `configs/synthetic.py` at gamma 0 (256 true features in 64 dimensions), n 256, 4,000 steps of 128 at 1e-3 with a
decay over the last fifth. Both let decoder rows have any norm, from 0.1 on, as SAELens ships; `unit` in the table is
ours with rows of unit norm. What SAELens saves for inference is read and run by our reader, on the same 20,000 held-out
tokens. It ranks pre-activations by the norms of decoder rows, which we do not. Of JumpReLU and ReLU the weight of our
penalty is sought that gives SAELens' L0. Then, in turns, the seconds of a step of each at a larger size (n 8192, d 768,
a batch of 2048), as the median of pairs: on an idle machine. About 30 minutes on 2 CPU cores.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

warnings.filterwarnings("ignore")  # the peer's own

from experiments.death import architectures  # noqa: E402
from sae_jax.config import base  # noqa: E402
from sae_jax.exchange import features, registry, sharing  # noqa: E402
from sae_jax.models import sources  # noqa: E402
from sae_jax.reports import tables  # noqa: E402
from sae_jax.training import step as step_lib  # noqa: E402

N, D, BATCH, K = 8192, 768, 2048, 64  # of the steps that are timed
PEERS: dict[str, tuple[str, dict[str, Any], str]] = {  # SAELens' name, its settings, our preset of AuxK
    "topk": ("topk", {}, "saelens"),
    "batch_topk": ("batchtopk", {}, "saelens"),
    "matryoshka": ("matryoshka_batchtopk", {}, "saelens"),
    "jumprelu": ("jumprelu", {"l0_coefficient": 1.0}, "none"),
    "relu": ("standard", {"l1_coefficient": 2.5}, "none"),
}


def peer(name: str, n: int, d: int, k: int) -> Any:
    """A fresh SAE of SAELens, with the settings that it ships."""
    import torch
    from sae_lens.registry import get_sae_training_class

    architecture, own, _ = PEERS[name]
    kind, config = get_sae_training_class(architecture)
    counted = {"k": k} if "topk" in architecture else {}
    nested = {"matryoshka_widths": [n // 4, n]} if name == "matryoshka" else {}
    torch.manual_seed(0)
    return kind(config(d_in=d, d_sae=n, **counted, **nested, **own))


def trainer(sae: Any, batches: Iterator[Any], steps: int, batch: int) -> Any:
    """SAELens' own, with our schedule."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        total_training_samples=steps * batch, train_batch_size_samples=batch, lr=1e-3, lr_end=0.0,
        lr_decay_steps=steps // 5, dead_feature_window=max(1, steps // 20),
    )  # fmt: skip
    return SAETrainer(config, sae, batches)


def found(opened: Any, x: np.ndarray) -> dict[str, float]:
    """FVE, L0 and what is dead, of an SAE on these tokens."""
    kept = features.features(opened, x)
    error = x - features.reconstruct(opened, x)
    fired = np.unique(kept.indices[kept.values > 0])
    return {
        "fve": float(1 - np.sum(error**2) / np.sum((x - x.mean(axis=0)) ** 2)),
        "l0": float((kept.values > 0).sum() / len(x)),
        "dead": 1 - len(fired) / opened.encoder.W_enc.shape[0],
    }


def trained(name: str, workdir: Path) -> dict[str, Any]:
    """Both, at the same L0."""
    import torch

    c = architectures.settings("synthetic", "cpu", name, "baseline")
    c.data.gamma, c.auxk.preset, steps, batch = 0.0, PEERS[name][2], c.train.steps, c.train.batch_size
    source = sources.open_source(c)
    make = jax.jit(lambda split, given, rows: source.tokens(split, given, rows), static_argnums=0)
    data = source.train(0)
    rows = jnp.arange(batch)
    batches = (torch.tensor(np.asarray(make("train", jnp.asarray(next(data)), rows))) for _ in range(steps))
    held_out = np.concatenate([
        np.asarray(make("eval", jnp.asarray(given), jnp.arange(len(valid))))[valid]
        for given, valid in source.held_out()
    ])  # fmt: skip
    saved = epath.Path(workdir / f"{name}_saelens")
    if not saved.exists():
        its = trainer(peer(name, c.sae.n_features, c.data.d_model, c.sae.k or 8), batches, steps, batch).fit()
        its.save_inference_model(saved)
    them = found(registry.read(saved), held_out)
    row: dict[str, Any] = {f"saelens_{key}": value for key, value in them.items()}
    for kind, own in (("", {"sae.unit_decoder": False, "sae.init_norm": 0.1}), ("unit_", {})):
        here, weight = c.copy_and_resolve_references(), None
        here.update_from_flattened_dict(own)
        if c.sparsity.preset != "none":
            folder = workdir / f"{name}_{kind}weights"
            known = architectures.looked(here, architectures.grid(here, ["gamma 0"]), folder, (0,))
            weight = architectures.matched(here, known, them["l0"], folder, (0,))["gamma 0"]
        run = workdir / f"{name}_{kind}ours"
        architectures.trained(here, {"one": architectures.member("gamma 0", 0, weight)}, run)
        row |= {f"{kind}{key}": value for key, value in found(sharing.opened(str(run)), held_out).items()}
    return row


def timed(name: str, rounds: int) -> dict[str, float]:
    """Median seconds of a step of both, and of the quotients of pairs."""
    import torch

    x = np.random.default_rng(0).normal(size=(BATCH, D)).astype(np.float32)
    own = {key: value for key, value in architectures.ARCHITECTURES[name].items() if key != "sae.groups"}
    groups = {"sae.groups": f"{N // 4},{N}"} if name == "matryoshka" else {}
    c = base({"data.signal": "gaussian", "sae.n_features": N, "sae.k": K, "auxk.preset": PEERS[name][2],
              **own, **groups})  # fmt: skip
    static = step_lib.Static.of(c)
    fresh = step_lib.init_state(jax.random.key(0), static, step_lib.hyper(c), jnp.zeros(D))
    state = [jax.tree.map(jnp.array, fresh)]  # encoder and decoder start as one buffer: not to be given away twice
    step = jax.jit(partial(step_lib.train_step, static=static), donate_argnums=0)

    def ours() -> None:
        state[0], metrics = step(state[0], jnp.asarray(x))
        jax.block_until_ready(metrics)

    sae, batch = peer(name, N, D, K), torch.tensor(x)
    its = trainer(sae, iter([batch]), 10**6, BATCH)
    turns: tuple[Callable[[], Any], ...] = (ours, lambda: its._train_step(sae, batch))
    seconds = np.array([[_seconds(turn) for turn in turns] for _ in range(rounds + 1)])[1:]
    mine, theirs = np.median(seconds, axis=0)
    quotient = np.median(seconds[:, 0] / seconds[:, 1])
    return {"step_seconds": float(mine), "saelens_step_seconds": float(theirs), "quotient": float(quotient)}


def _seconds(turn: Callable[[], Any]) -> float:
    started = time.perf_counter()
    turn()
    return time.perf_counter() - started


def main() -> None:
    """All of them; prints, and writes a table if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PEERS), help="which, separated by commas")
    parser.add_argument("--workdir", help="folder for the runs; a temporary one if left out")
    parser.add_argument("--rounds", type=int, default=11, help="pairs of steps that are timed; 0: none")
    parser.add_argument("--untrained", action="store_true", help="time alone")
    parser.add_argument("--out", help="a CSV")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.only.split(","):
            row: dict[str, Any] = {"activation": name}
            row |= {} if args.untrained else trained(name, Path(args.workdir or temporary))
            row |= timed(name, args.rounds) if args.rounds else {}
            rows.append(row)
            print(tables.one_line(row), flush=True)
    if args.out:
        tables.write_csv(args.out, rows)


if __name__ == "__main__":
    main()
