"""Exported SAEs in the hands of the libraries they are exported to; SAEs that those libraries trained, examined here.

    pip install -e ".[test]" && python -m experiments.trust.peer_conformance --peers=saelens,sparsify

dictionary_learning brings torchvision along, which breaks transformers where torch is another build, so it is examined
in an environment of its own:

    python -m venv peers && peers/bin/pip install -e ".[test]" dictionary-learning==0.1.0
    peers/bin/pip uninstall -y torchvision
    peers/bin/python -m experiments.trust.peer_conformance --out=experiments/trust/peer_conformance.csv

1. For each gamma and condition an SAE is trained, exported, loaded by the peer itself and run there, against our own in
   float64 with the preprocessing run and not folded: error of x̂ as a share of ‖x − mu‖ over tokens with the same
   active features, in three readings: root mean square over root mean square, the worst token over that, the worst
   token over its own ‖x − mu‖. Tokens on which active features differ, only by such as lie within 1e-4 of the
   threshold (ties), and otherwise. The peer runs in float64, which shows what is lost in the export, and in float32, as
   it loads. Beside it: our own float32, not exported, and the exact x̂ rounded to float32, which none can come under.
   With --run=WORKDIR --activations=DATASET --tokens=4000 the same of the SAEs of a run.
2. An SAE trained by the peer's own trainer: death by pathway against a count in NumPy.

Exits with 1 where the root mean square passes 1e-5 (1e-4 behind a norm of each token; in float32 twice our own, where
that is more), active features differ otherwise than by ties, import → export changes a byte, or a count is another.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

warnings.filterwarnings("ignore")  # the peers' own
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # everything here is on the CPU, where triton's kernels do not run

import sae_jax  # noqa: E402
from sae_jax.autoencoder import sae as sae_lib  # noqa: E402
from sae_jax.exchange import formats, sharing  # noqa: E402
from sae_jax.models import sources  # noqa: E402
from sae_jax.outliers import moments as moments_lib  # noqa: E402
from sae_jax.outliers.preprocess import per_token, whitening  # noqa: E402
from sae_jax.reports import tables  # noqa: E402

D, N, K = 64, 512, 8
TOLERANCE, TIE = 1e-5, 1e-4
NORM_TOLERANCE = 1e-4  # SAELens' LayerNorm adds its 1e-5 elsewhere than ours: 1e-5 / deviation · gamma apart


def activations(gamma: float, n_tokens: int) -> np.ndarray:
    """Sparse sums of 256 directions, about a mean gamma times as long as they vary."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(256, D)) / np.sqrt(D)
    x = (rng.random((n_tokens, 256)) < 0.02) * rng.uniform(0.5, 1.5, (n_tokens, 256)) @ rows
    x -= x.mean(axis=0)
    mean = rng.normal(size=D)
    mean *= gamma * np.sqrt(np.square(x).sum(axis=1).mean()) / np.linalg.norm(mean)
    return np.asarray(x + mean, np.float32)


def trained(x: np.ndarray, folder: Path, steps: int) -> str:
    """A run of a baseline and a centred SAE on these activations."""
    np.save(folder.with_suffix(".npy"), x)
    config = sae_jax.base({
        "data.path": str(folder.with_suffix(".npy")), "sae.n_features": N, "sae.k": K, "checkpoint.every": steps,
        "train.steps": steps, "train.batch_size": 256, "train.learning_rate": 1e-3, "train.steps_per_dispatch": 50,
        "train.devices": 1,
    })  # fmt: skip
    config.members = ConfigDict({"baseline": {"sae": {"center": "none"}}, "centred": {"sae": {"center": "mean"}}})
    sae_jax.train(config, str(folder))
    return str(folder)


def conditions(x: Any, folder: Path, steps: int) -> dict[str, formats.Packed]:
    """SAEs trained behind every preprocessing that is exported, each with that preprocessing."""
    folder.mkdir()
    plain = trained(x, folder / "plain", steps)
    found = {name: sharing.packed_of(plain, name) for name in ("baseline", "centred")}
    white = whitening(moments_lib.moments(x, covariance=True))
    packed = sharing.packed_of(trained(np.asarray(white(x), np.float32), folder / "whitened", steps), "centred")
    found["whitened"] = packed._replace(before=white.replace(scale=packed.before.scale))
    normed = trained(np.asarray(per_token(x, "layer_norm_unit"), np.float32), folder / "normed", steps)
    packed = sharing.packed_of(normed, "centred")
    for norm in ("layer_norm_unit", "unit"):  # of the same length, so one SAE serves both
        found[norm] = packed._replace(before=packed.before.replace(norm=norm))
    return found


def ours(packed: formats.Packed, x: np.ndarray, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """(pre-activations, x̂) with the preprocessing run and not folded."""
    with jax.enable_x64(dtype is np.float64):
        sae, before, x = jax.tree.map(lambda a: jnp.asarray(a, dtype), (packed.sae, packed.before, x))
        y = before(x)
        reconstruction = before.invert(sae_lib.decode(sae, sae_lib.encode(sae, y)))
        z = sae_lib.preactivations(sae, y)
    z, reconstruction, x = np.asarray(z), np.asarray(reconstruction), np.asarray(x)
    if before.norm == "layer_norm_unit":
        deviation = np.sqrt(x.shape[1] * (x.var(axis=1, keepdims=True) + moments_lib.LAYER_NORM_EPS))
        reconstruction = reconstruction * deviation + x.mean(axis=1, keepdims=True)
    if before.norm == "unit":
        reconstruction = reconstruction * np.linalg.norm(x, axis=1, keepdims=True)
    return z, reconstruction


def active_features(z: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Which are among the k largest and above 0, and where that begins."""
    threshold = np.maximum(np.partition(z, -k, axis=1)[:, -k, None], 0)
    return (z >= threshold) & (z > 0), threshold


def compare(
    exact: tuple[np.ndarray, np.ndarray], k: int, x: np.ndarray, active: np.ndarray, theirs: np.ndarray
) -> dict[str, float]:
    """What somebody has made of x (active features as (tokens, n) bools, x̂) against `ours` in float64."""
    z, reconstruction = exact
    expected, threshold = active_features(z, k)
    differ = active != expected
    close = np.abs(z - threshold) <= TIE * np.abs(z).max(axis=1, keepdims=True)
    same = ~differ.any(axis=1)
    size = np.linalg.norm(x - x.mean(axis=0, dtype=np.float64), axis=1)[same]
    error, typical = np.linalg.norm(theirs - reconstruction, axis=1)[same], np.sqrt(np.mean(size**2))
    return {
        "rms": float(np.sqrt(np.mean(error**2)) / typical),
        "worst": float(error.max() / typical),
        "worst_own": float((error / size).max()),
        "ties": int((differ.any(axis=1) & ~(differ & ~close).any(axis=1)).sum()),
        "differ": int((differ & ~close).any(axis=1).sum()),
    }


# -- the peers: how each loads a folder and runs it, and trains one ----------------------------------------------------


def run_saelens(folder: str, x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Active features and x̂."""
    import torch
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder, dtype=dtype)
    with torch.no_grad():
        t = torch.from_numpy(x).to(getattr(torch, dtype))
        return sae.encode(t).numpy() > 0, sae(t).numpy()


def run_sparsify(folder: str, x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Active features and x̂."""
    import torch
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder).to(getattr(torch, dtype))
    with torch.no_grad():
        out = sae(torch.from_numpy(x).to(sae.dtype))
        dense = torch.zeros(len(x), sae.num_latents, dtype=sae.dtype).scatter_(1, out.latent_indices, out.latent_acts)
        return dense.numpy() > 0, out.sae_out.numpy()


def run_dictionary_learning(folder: str, x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Active features and x̂."""
    import torch
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    sae = AutoEncoderTopK.from_pretrained(f"{folder}/ae.pt").to(getattr(torch, dtype))
    with torch.no_grad():
        reconstruction, features = sae(torch.from_numpy(x).to(sae.b_dec.dtype), output_features=True)
        return features.numpy() > 0, reconstruction.numpy()


def train_saelens(x: np.ndarray, folder: str, steps: int) -> None:
    """By SAELens' own trainer, as it saves for inference: activations ranked by z · ‖decoder row‖."""
    import torch
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    t = torch.from_numpy(x)
    batches = iter([t[torch.randint(len(t), (256,))] for _ in range(steps + 1)])
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=N, k=K, apply_b_dec_to_input=True))
    config = SAETrainerConfig(total_training_samples=steps * 256, train_batch_size_samples=256, lr=1e-3, lr_end=1e-3)
    SAETrainer(config, sae, batches).fit().save_inference_model(folder)


def train_dictionary_learning(x: np.ndarray, folder: str, steps: int) -> None:
    """By dictionary_learning's own trainer."""
    import torch
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(steps=steps, activation_dim=D, dict_size=N, k=K, layer=0, lm_name="none", lr=1e-3,
                          warmup_steps=10, decay_start=steps // 2, seed=0, device="cpu")  # fmt: skip
    t = torch.from_numpy(x)
    for step in range(steps):
        trainer.update(step, t[torch.randint(len(t), (256,))])
    with torch.no_grad():  # their start at the median leaves hardly any dead: take some of the mean away again
        trainer.ae.b_dec *= 0.5
    Path(folder).mkdir()
    torch.save(trainer.ae.state_dict(), f"{folder}/ae.pt")
    Path(folder, "config.json").write_text(json.dumps({"trainer": trainer.config}))


RUN = {"saelens": run_saelens, "sparsify": run_sparsify, "dictionary_learning": run_dictionary_learning}
TRAIN = {"saelens": train_saelens, "dictionary_learning": train_dictionary_learning}


def counted(peer: str, folder: str, x: np.ndarray) -> dict[str, float]:
    """Deaths by pathway, from what the files hold and NumPy alone."""
    if peer == "saelens":
        from safetensors.numpy import load_file

        w = load_file(f"{folder}/sae_weights.safetensors")
        z = (x.astype(np.float64) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        z *= np.linalg.norm(w["W_dec"], axis=1)
    else:
        import torch

        w = {key: value.double().numpy() for key, value in torch.load(f"{folder}/ae.pt", weights_only=True).items()}
        z = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    fired = np.zeros(N, bool)
    kept = np.argpartition(-z, K - 1, axis=1)[:, :K]
    fired[kept[np.take_along_axis(z, kept, axis=1) > 0]] = True
    relu = (z <= 0).all(axis=0)
    return {"dead_by_relu": relu.mean(), "dead_by_topk": (~relu & ~fired).mean(), "dead_total": (~fired).mean()}


def conformance(peer: str, packed: formats.Packed, folder: str, x: np.ndarray) -> dict[str, Any]:
    """One row of the table, of an SAE exported to `folder`."""
    exact, k = ours(packed, x), packed.sae.k
    z, single = ours(packed, x, np.float32)
    by = {
        "float64": compare(exact, k, x, *RUN[peer](folder, x, "float64")),
        "float32": compare(exact, k, x, *RUN[peer](folder, x, "float32")),
        "our_float32": compare(exact, k, x, active_features(z, k)[0], single),
        "rounded": compare(exact, k, x, active_features(exact[0], k)[0], np.asarray(exact[1], np.float32)),
    }
    again = formats.encode(sharing.packed_of(folder), peer)
    return {
        **{f"{key}_{who}": float(f"{found[key]:.1e}") for key in ("rms", "worst", "worst_own")
           for who, found in by.items()},
        "ties_float64": by["float64"]["ties"], "ties_float32": by["float32"]["ties"],
        "differ": by["float64"]["differ"] + by["float32"]["differ"],
        "identity": all(Path(folder, file).read_bytes() == content for file, content in again.items()),
    }  # fmt: skip


Case = tuple[float, np.ndarray, dict[str, formats.Packed]]  # gamma, activations, SAEs by name


def of_each_gamma(given: argparse.Namespace, scratch: Path) -> Iterator[Case]:
    """SAEs trained here."""
    for gamma in map(float, given.gammas.split(",")):
        x = activations(gamma, given.tokens)
        yield gamma, x, conditions(x, scratch / f"gamma{gamma}", given.steps)


def of_a_run(given: argparse.Namespace) -> Iterator[Case]:
    """Those of a run, on activations of its kind."""
    x = np.concatenate(list(sources.open_tokens(given.activations).batches()))[: given.tokens].astype(np.float32)
    names = [member["name"] for member in json.loads(Path(given.run, "report.json").read_text())["members"]]
    packs = {name: sharing.packed_of(given.run, name) for name in names}
    yield round(packs[names[0]].metadata["gamma_raw"], 2), x, packs


def main(argv: list[str]) -> int:
    """Prints a table of both parts and writes it; the exit code says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(RUN))
    parser.add_argument("--gammas", default="0.5,5,20,100")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--out", default="")
    parser.add_argument("--run", default="", help="look at the SAEs of this run instead")
    parser.add_argument("--activations", default="", help="of which kind they are: a file or a dataset's folder")
    given = parser.parse_args(argv)
    peers = given.peers.split(",")
    rows: list[dict[str, Any]] = []
    fine = True
    with tempfile.TemporaryDirectory() as scratch:
        for gamma, x, packs in of_a_run(given) if given.run else of_each_gamma(given, Path(scratch)):
            for name, packed in packs.items():
                for peer in peers:
                    folder, norm = f"{scratch}/{peer}-{gamma}-{name}", packed.before.norm
                    try:
                        sharing.export(packed, folder, peer)
                    except sae_jax.Refused:
                        fine &= norm != "none" and peer != "saelens"
                        continue
                    row = conformance(peer, packed, folder, x)
                    allowed = TOLERANCE if norm == "none" else NORM_TOLERANCE
                    fine &= row["rms_float64"] <= allowed and row["identity"] and not row["differ"]
                    fine &= row["rms_float32"] <= max(allowed, 2 * row["rms_our_float32"])
                    rows.append({"peer": peer, "gamma": gamma, "condition": name, **row})
                    print(tables.one_line({key: str(value) for key, value in rows[-1].items()}), flush=True)
        for peer in (peer for peer in peers if peer in TRAIN and not given.run):
            x, folder = activations(5.0, given.tokens), f"{scratch}/{peer}-trained"
            TRAIN[peer](x, folder, given.steps)
            found = sae_jax.dissect(folder, x)
            expected = counted(peer, folder, x)
            fine &= all(found[key] == value for key, value in expected.items())
            print(f"trained by {peer}: " + ", ".join(
                f"{key} {100 * found[key]:.2f} % (NumPy {100 * value:.2f})" for key, value in expected.items()))
    if given.out:
        tables.write_csv(given.out, rows)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
