"""Fates and firing counts that the autopsy finds, against each library's own `encode`, for every kind of SAE it makes.

    pip install -e ".[test]" && python -m experiments.trust.peer_encode --peers=saelens,sparsify

dictionary_learning wants an environment of its own, as `peer_conformance` says; there all three are compared:

    peers/bin/python -m experiments.trust.peer_encode --out=experiments/trust/peer_encode.csv

Each SAE (d 32, n 128) twice: with random weights, among them features of every fate; and trained for 200 steps by the
library's own trainer, or, where that wants a language model or there is none, with the library's own forward pass and
loss under torch's Adam (sparsify, transcoders). Its folder is written by the library and goes through `sae_jax.dissect`
with 4,000 tokens whose mean is three times as long as they vary. The same tokens go through the `encode` of the library
that opened the folder again, in float32. Compared feature by feature: tokens it fires on, and its fate.

Where a count differs the library runs in float64 with tokens moved by 2^-20 of themselves, eight times. A feature's
firings that come and go then are *ties*: which side of a threshold they are on, float32 cannot tell. A difference of no
more firings than that is one of ties, all else is a fault, and the exit code is then 1.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

warnings.filterwarnings("ignore")  # the peers' own
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # everything here is on the CPU, where triton's kernels do not run

import torch  # noqa: E402

import sae_jax  # noqa: E402
from sae_jax.errors import first_line  # noqa: E402
from sae_jax.reports import tables  # noqa: E402

D, N, K, BATCH, GAMMA = 32, 128, 8, 256, 3.0
NUDGE, TRIES = 2.0**-20, 8
Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # tokens → (activations, positive)


class Case(NamedTuple):
    """One kind of SAE: how it is written to a folder, random or trained, and how the library opens and runs it."""

    library: str
    architecture: str
    options: dict[str, Any]
    write: Callable[[str, torch.Tensor, int], None]  # folder, tokens, steps (0: random)
    open: Callable[[str, torch.dtype], Encode]


def activations(n_tokens: int) -> np.ndarray:
    """Sparse sums of 96 directions, about a mean GAMMA times as long as they vary."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(96, D)) / np.sqrt(D)
    x = (rng.random((n_tokens, 96)) < 0.05) * rng.uniform(0.5, 1.5, (n_tokens, 96)) @ rows
    mean = rng.normal(size=D)
    mean *= GAMMA * np.linalg.norm(x.std(axis=0)) / np.linalg.norm(mean)
    return np.asarray(x - x.mean(axis=0) + mean, np.float32)


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Random weights, whose features are of every fate: some far below zero, some barely above, the others around."""
    rng = np.random.default_rng(1)
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        new = rng.normal(size=tuple(value.shape)) / np.sqrt(D if value.ndim == 2 else 1)
        if name.rpartition(".")[2] in ("b_enc", "b_gate", "gate_bias") or name == "encoder.bias":
            new[: N // 4] -= 20
            new[-4:] += 9
        elif "threshold" in name:
            new = 2 * np.abs(new)
        elif "r_mag" in name:
            new = 0.3 * new
        value.copy_(torch.as_tensor(new, dtype=value.dtype))


def batches(t: torch.Tensor) -> Iterator[torch.Tensor]:
    """Random batches without end."""
    while True:
        yield t[torch.randint(len(t), (BATCH,))]


def fit(module: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], t: torch.Tensor, steps: int) -> None:
    """With torch's Adam."""
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for x in itertools.islice(batches(t), steps):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()


def target(x: torch.Tensor) -> torch.Tensor:
    """What transcoders reconstruct: other activations of the same width."""
    matrix = np.random.default_rng(2).normal(size=(D, D)) / np.sqrt(D)
    return torch.relu(x @ torch.as_tensor(matrix, dtype=x.dtype))


# -- SAELens ---------------------------------------------------------------------------------------------------------

NORMS = ("layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening")


def of_saelens() -> Iterator[Case]:
    """Every architecture that it trains or runs, with each of its options."""
    for name in ("standard", "gated", "jumprelu", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk"):
        counted = "topk" in name
        for applied, rescaled in itertools.product((True, False), (True, False) if counted else (None,)):
            options = {"apply_b_dec_to_input": applied}
            yield _saelens(name, options | ({} if rescaled is None else {"rescale_acts_by_decoder_norm": rescaled}))
        yield from (_saelens(name, {"normalize_activations": norm}) for norm in NORMS)
    for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        yield _saelens(name, {"d_out": D, "apply_b_dec_to_input": False})


def _saelens(name: str, options: dict[str, Any]) -> Case:
    import sae_lens  # noqa: F401
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    transcodes = "transcoder" in name
    sizes = {"d_in": D, "d_sae": N, **({"k": K} if "topk" in name else {})}
    sizes |= {"matryoshka_widths": [N // 4, N // 2, N]} if "matryoshka" in name else {}
    weight = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}

    def write(folder: str, t: torch.Tensor, steps: int) -> None:
        if transcodes:
            cls, config = get_sae_class(name)
            sae: Any = cls(config(**sizes, **options))
            randomise(sae)
            fit(sae, lambda x: ((sae(x) - target(x)) ** 2).mean() + 1e-3 * sae.encode(x).abs().mean(), t, steps)
            sae.save_model(folder)
            return
        cls, config = get_sae_training_class(name)
        sae = cls(config(**sizes, **options, **({weight[name]: 0.1} if name in weight else {})))
        if steps:
            settings = SAETrainerConfig(total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, lr=3e-3,
                                        lr_end=3e-3, n_batches_for_norm_estimate=10)  # fmt: skip
            SAETrainer(settings, sae, batches(t)).fit().save_inference_model(folder)
        else:
            randomise(sae)
            sae.save_inference_model(folder)

    def open_(folder: str, dtype: torch.dtype) -> Encode:
        from sae_lens import SAE

        sae: Any = SAE.load_from_disk(folder, dtype=str(dtype).removeprefix("torch."))

        def encode(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z = sae.process_sae_in(t) @ sae.W_enc + (sae.b_gate if hasattr(sae, "b_gate") else sae.b_enc)
            return sae.encode(t), z != 0 if name == "abstopk" else z > 0

        return encode

    return Case("saelens", name, options, write, open_)


# -- sparsify --------------------------------------------------------------------------------------------------------


def of_sparsify() -> Iterator[Case]:
    """Both activations with each of its options."""
    for activation, skip, transcode in itertools.product(("topk", "groupmax"), (False, True), (False, True)):
        yield _sparsify({"activation": activation, "skip_connection": skip, "transcode": transcode})
    yield _sparsify({"activation": "topk", "multi_topk": True})
    yield _sparsify({"activation": "topk", "normalize_decoder": False})


def _sparsify(options: dict[str, Any]) -> Case:
    from sparsify import SparseCoder, SparseCoderConfig

    def write(folder: str, t: torch.Tensor, steps: int) -> None:
        coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K, **options))
        if not steps:
            randomise(coder)

        def loss(x: torch.Tensor) -> torch.Tensor:
            out = coder(x, target(x) if options.get("transcode") else x)
            found: torch.Tensor = out.fvu + out.multi_topk_fvu / 8
            return found

        fit(coder, loss, t, steps)
        coder.save_to_disk(folder)

    def open_(folder: str, dtype: torch.dtype) -> Encode:
        coder = SparseCoder.load_from_disk(folder).to(dtype)

        def encode(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = coder.encode(t)
            dense = torch.zeros(len(t), N, dtype=dtype).scatter_(1, out.top_indices, out.top_acts)
            return dense, out.pre_acts > 0

        return encode

    return Case("sparsify", options["activation"], {key: v for key, v in options.items() if key != "activation"},
                write, open_)  # fmt: skip


# -- dictionary_learning ---------------------------------------------------------------------------------------------


def of_dictionary_learning() -> Iterator[Case]:
    """Every trainer, and the class that has none of its own."""
    for name in ("StandardTrainer", "StandardTrainerAprilUpdate", "PAnnealTrainer", "GatedSAETrainer",
                 "GatedAnnealTrainer", "JumpReluTrainer", "TopKTrainer", "BatchTopKTrainer",
                 "MatryoshkaBatchTopKTrainer"):  # fmt: skip
        yield _dictionary_learning(name, {})
    yield _dictionary_learning("StandardTrainerAprilUpdate", {"dict_class": "AutoEncoderNew"})


def _dictionary_learning(name: str, options: dict[str, Any]) -> Case:
    from dictionary_learning import dictionary, trainers
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, standard, top_k

    modules = (dictionary, trainers, batch_top_k, matryoshka_batch_top_k, standard, top_k)
    known = {key: value for module in modules for key, value in vars(module).items()}

    def write(folder: str, t: torch.Tensor, steps: int) -> None:
        given = {"steps": max(steps, 200), "activation_dim": D, "dict_size": N, "layer": 0, "lm_name": "none",
                 "lr": 3e-3, "warmup_steps": 10, "seed": 0, "device": "cpu"}  # fmt: skip
        if "TopK" in name:
            given |= {"k": K, "threshold_start_step": 20}
        else:
            given |= {"sparsity_warmup_steps": 50, "decay_start": None}
        given |= {"group_fractions": [0.25, 0.25, 0.5]} if "Matryoshka" in name else {}
        given |= {"anneal_start": 100, "p_end": 0.2} if "Anneal" in name else {}
        trainer = known[name](**given, **{key: known[value] for key, value in options.items()})
        for step, x in enumerate(itertools.islice(batches(t), steps)):
            trainer.update(step, x)
        if not steps:
            randomise(trainer.ae)
        Path(folder).mkdir(parents=True)
        torch.save(trainer.ae.state_dict(), f"{folder}/ae.pt")
        config = trainer.config | {"dict_class": type(trainer.ae).__name__}  # AprilUpdate writes another than it has
        Path(folder, "config.json").write_text(json.dumps({"trainer": config}, default=str))

    def open_(folder: str, dtype: torch.dtype) -> Encode:
        kind = json.loads(Path(folder, "config.json").read_text())["trainer"]["dict_class"]
        state = torch.load(f"{folder}/ae.pt", weights_only=True)
        extra = ([K] if "k" in state else []) + ([state["group_sizes"].tolist()] if "group_sizes" in state else [])
        ae = known[kind](D, N, *extra)
        ae.load_state_dict(state)
        ae = ae.to(dtype)

        def encode(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            bias = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias"}.get(kind, "b_dec")
            bias = 0 if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else getattr(ae, bias)
            z = (t - bias) @ ae.W_enc + ae.b_enc if hasattr(ae, "W_enc") else ae.encoder(t - bias)
            return ae.encode(t), z + (ae.gate_bias if kind == "GatedAutoEncoder" else 0) > 0

        return encode

    return Case("dictionary_learning", name, options, write, open_)


OF = {"saelens": of_saelens, "sparsify": of_sparsify, "dictionary_learning": of_dictionary_learning}


# -- the comparison --------------------------------------------------------------------------------------------------


def fates(n_fired: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Of each feature, as the report calls them."""
    return np.where(n_fired > 0, "alive", np.where(positive, "dead_by_topk", "dead_by_relu"))


def compare(case: Case, folder: str, x: np.ndarray) -> dict[str, Any]:
    """Numbers of one SAE; `faults` are features whose count or fate differs by more than ties."""
    report = sae_jax.dissect(folder, x, n_probes=16)
    ours, our_fates = report.features["n_fired"], report.features["fate"]
    t = torch.from_numpy(x)
    with torch.no_grad():
        acts, positive = case.open(folder, torch.float32)(t)
        theirs = (acts != 0).sum(dim=0).numpy()
        their_fates = fates(theirs, positive.any(dim=0).numpy())
        differ = (ours != theirs) | (our_fates != their_fates)
        ties = np.zeros(N, int)
        if differ.any():
            generator = torch.Generator().manual_seed(0)
            noise = (torch.randn(t.shape, generator=generator) * NUDGE for _ in range(TRIES))
            runs = [case.open(folder, torch.float64)(t.double() * (1 + part)) for part in noise]
            fired, above = (torch.stack([run[i] != 0 for run in runs]) for i in (0, 1))
            ties = ((fired.any(0) & ~fired.all(0)) | (above.any(0) & ~above.all(0))).sum(dim=0).numpy()
    faults = (np.abs(ours - theirs) > ties) | ((our_fates != their_fates) & (ties == 0))
    return {
        "dead_by_relu": int((their_fates == "dead_by_relu").sum()),
        "dead_by_selection": int((their_fates == "dead_by_topk").sum()), "l0": round(float(theirs.sum()) / len(x), 3),
        "read_as": report["architecture"], "features_that_differ": int(differ.sum()),
        "fates_that_differ": int((our_fates != their_fates).sum()),
        "firings_that_differ": int(np.abs(ours - theirs).sum()), "ties": int(ties[differ].sum()),
        "faults": int(faults.sum()),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """A line for each SAE, and a table; the exit code says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(OF))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--only", default="", help="part of the name of an architecture or trainer")
    parser.add_argument("--out", default="")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    x, rows, start = activations(given.tokens), [], time.process_time()
    for case in (case for peer in given.peers.split(",") for case in OF[peer]() if given.only in case.architecture):
        for steps in (0, given.steps):
            torch.manual_seed(0)
            options = " ".join(f"{key}={value}" for key, value in case.options.items())
            row = {"library": case.library, "architecture": case.architecture, "options": options,
                   "weights": f"trained {steps} steps" if steps else "random"}  # fmt: skip
            with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):  # progress bars
                try:
                    case.write(f"{scratch}/sae", torch.from_numpy(x), steps)
                except Exception as error:
                    print(f"{' '.join(row.values())}: the library cannot make it ({first_line(error)})")
                    continue
                rows.append(row | compare(case, f"{scratch}/sae", x))
            print(tables.one_line({key: str(value) for key, value in rows[-1].items()}), flush=True)
    differing, faults = (sum(row[key] > 0 for row in rows) for key in ("features_that_differ", "faults"))
    print(f"{len(rows)} SAEs, {len(rows) - differing} alike in every feature, {differing - faults} but for ties, "
          f"{faults} otherwise; {time.process_time() - start:.0f} s of processor time")  # fmt: skip
    if given.out:
        tables.write_csv(given.out, rows)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
