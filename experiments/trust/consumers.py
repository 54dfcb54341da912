"""What others' tools make of an exported SAE: a hooked model, SAEBench's core evaluation and SAEDashboard's pages.

    pip install -e ".[test]" && python -m experiments.trust.consumers
    pip install sae-bench==0.6.0 sae-dashboard==0.8.0   # the other two, in an environment of their own

A TopK SAE (n 96, k 4) is trained on the activations of a random transformer of two blocks (d_model 24), exported by
`python -m sae_jax export` and opened by SAELens. Each tool that is installed gets the SAE and the model:

    hooked      HookedSAETransformer (SAELens) runs the model with the SAE in its place; compared value by value with
                `sae_jax.features` and `sae_jax.reconstruct`
    sae_bench   L0 and explained variance, as it defines it, against the same of `sae_jax`
    dashboard   pages of eight features. SAEDashboard folds the decoder's norms, which SAELens refuses for TopK SAEs
                that do not rescale by them; rows of unit length need no folding, so that call is left out

Writes consumers.csv. The exit code is 1 where a number differs by more than 1e-5, or 1e-5 of itself where above 1.
"""

import argparse
import importlib.metadata
import importlib.util
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

warnings.filterwarnings("ignore")  # the tools' own

import torch  # noqa: E402

import sae_jax  # noqa: E402
from sae_jax import cli  # noqa: E402
from sae_jax.reports import tables  # noqa: E402

D, N, K, CONTEXT, HOOK = 24, 96, 4, 32, "blocks.1.hook_resid_pre"
WORDS = 64  # the first four are special
Rows = list[dict[str, Any]]


def hooked_model(folder: Path) -> tuple[Any, torch.Tensor]:
    """A random transformer with a tokenizer of its own, and sequences that begin with its BOS token."""
    from sae_lens import HookedSAETransformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformer_lens import HookedTransformerConfig
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = {word: i for i, word in enumerate([*special.values(), *(f"w{i}" for i in range(WORDS - 4))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder / "tokenizer")
    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=CONTEXT, d_head=12, n_heads=2, d_mlp=48, act_fn="gelu", d_vocab=WORDS, seed=0,
        device="cpu", model_name="tiny",
    )  # fmt: skip
    model = HookedSAETransformer(
        config, tokenizer=PreTrainedTokenizerFast.from_pretrained(str(folder / "tokenizer"))
    ).eval()
    tokens = torch.randint(4, WORDS, (64, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 1
    return model, tokens


def exported(folder: Path, model: Any, tokens: torch.Tensor) -> np.ndarray:
    """Trains on the model's activations and exports to folder/exported. Returns the activations."""
    with torch.no_grad():
        x = model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK].reshape(-1, D).numpy()
    np.save(folder / "activations.npy", x)
    config = sae_jax.base({
        "sae.n_features": N, "sae.k": K, "sae.center": "mean", "data.path": f"{folder}/activations.npy",
        "train.steps": 200, "train.batch_size": 64, "train.devices": 1, "checkpoint.every": 200,
    })  # fmt: skip
    sae_jax.train(config, f"{folder}/run")
    said = ["--model_name=tiny", f"--hook_name={HOOK}", f"--context_size={CONTEXT}", "--prepend_bos"]
    assert cli.main(["export", f"--workdir={folder}/run", f"--out={folder}/exported", *said]) == 0
    return x


def hooked(sae: Any, model: Any, tokens: torch.Tensor, x: np.ndarray, folder: Path) -> Rows:
    """The model run with the SAE in its place."""
    with torch.no_grad():
        _, seen = model.run_with_cache_with_saes(tokens, saes=[sae])
    acts = seen[f"{HOOK}.hook_sae_acts_post"].reshape(-1, N).numpy()
    x_hat = seen[f"{HOOK}.hook_sae_output"].reshape(-1, D).numpy()
    values, indices = sae_jax.features(f"{folder}/exported", x)
    mine = np.zeros_like(acts)
    np.put_along_axis(mine, np.asarray(indices), np.asarray(values), axis=1)
    ours = np.asarray(sae_jax.reconstruct(f"{folder}/exported", x))
    norm = np.linalg.norm
    return [
        {"what": "activations, distance", "there": norm(acts - mine) / norm(mine), "here": 0.0},
        {"what": "x_hat, distance", "there": norm(x_hat - ours) / norm(ours), "here": 0.0},
        {"what": "L0", "there": (acts > 0).sum() / len(x), "here": (mine > 0).sum() / len(x)},
    ]


def sae_bench(sae: Any, model: Any, tokens: torch.Tensor, x: np.ndarray, folder: Path) -> Rows:
    """SAEBench's core evaluation on the same sequences, and the counts of an autopsy."""
    from datasets import Dataset
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils import general_utils
    from sae_lens import ActivationsStore

    _, sae, _ = general_utils.load_and_format_sae("custom", sae, "cpu")
    store = ActivationsStore.from_sae(
        model, sae, dataset=Dataset.from_dict({"tokens": tokens.repeat(8, 1).tolist()}), streaming=False,
        context_size=CONTEXT, store_batch_size_prompts=8, n_batches_in_buffer=8, device="cpu",
    )  # fmt: skip
    found, _ = core.run_evals(sae, store, model, CoreEvalConfig(
        batch_size_prompts=8, n_eval_reconstruction_batches=8, n_eval_sparsity_variance_batches=8, compute_kl=True,
        compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
    ))  # fmt: skip
    mine = sae_jax.dissect(f"{folder}/exported", x)
    error = np.mean(np.sum((x - np.asarray(sae_jax.reconstruct(f"{folder}/exported", x))) ** 2, axis=1))
    variance = np.mean(np.sum(x**2, axis=1)) - np.mean(x**2) ** 2  # so in 0.6.0
    there = found["reconstruction_quality"]["explained_variance"]
    return [
        {"what": "L0", "there": found["sparsity"]["l0"], "here": mine["l0"]},
        {"what": f"explained variance, its formula; FVE {mine['fve']:.3f}", "there": there,
         "here": 1 - error / variance},
    ]  # fmt: skip


def dashboard(sae: Any, model: Any, tokens: torch.Tensor, x: np.ndarray, folder: Path) -> Rows:
    """SAEDashboard's pages of eight features."""
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    sae.fold_W_dec_norm = lambda: None
    config = SaeVisConfig(hook_point=sae.cfg.metadata.hook_name, features=list(range(8)), minibatch_size_tokens=16)
    found = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    save_feature_centric_vis(found, folder / "dashboard.html")
    return [{"what": "features on pages", "there": float(len(found.feature_data_dict)), "here": 8.0}]


TOOLS = {
    "hooked": ("sae-lens", hooked), "sae_bench": ("sae-bench", sae_bench), "dashboard": ("sae-dashboard", dashboard),
}  # fmt: skip


def main(out: str) -> int:
    """Asks every tool that is installed; returns the exit code."""
    from sae_lens import SAE

    rows: Rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tokens = hooked_model(folder)
        x = exported(folder, model, tokens)
        for tool, (package, ask) in TOOLS.items():
            if importlib.util.find_spec(package.replace("-", "_")) is None:
                print(f"{tool}: {package} is not installed")
                continue
            version = importlib.metadata.version(package)
            for row in ask(SAE.load_from_disk(f"{folder}/exported"), model, tokens, x, folder):
                near = abs(row["there"] - row["here"]) <= 1e-5 * max(1.0, abs(row["here"]))
                rows.append({"tool": tool, "version": version, **row, "verdict": "equal" if near else "differs"})
                print(tables.one_line(rows[-1]))
    tables.write_csv(Path(out), rows)
    return int(any(row["verdict"] == "differs" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="consumers.csv")
    sys.exit(main(parser.parse_args().out))
