"""How fast activations reach training where the model runs beside it: forward pass, step, and both at once.

    python -m experiments.speed.bench_streaming --workdir=runs/bench_streaming

A model of Gemma 3 270M's shape with random weights, made on the spot, for machines that cannot fetch one; the text is
the built-in one. Of each backend: how far the rows of a layer are apart, tokens/s of extraction to the host and of
`data.model.stream`, of the training step alone (n 16,384, k 64, batch 4,080, AuxK off), and of both together, whose
time between that of the longer and the sum says how much of the shorter is hidden. Medians of `--rounds` passes over
the training tokens, after a first one that compiles. Writes bench_streaming.csv. Needs the extra torchax.
"""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import command
from sae_jax import config as config_lib
from sae_jax.models import adapters, extraction, inputs, sources
from sae_jax.reports import tables
from sae_jax.training import step as step_lib

SMALL = flags.DEFINE_bool("small", False, "a small model and SAE, to see whether it runs")
ROUNDS = flags.DEFINE_integer("rounds", 3, "passes timed")
TOKENS = 255  # of a sequence: its first position is special
PRECISION = flags.DEFINE_string("precision", "float32", "of the training step")


def made(folder: Path) -> str:
    """A model and a tokenizer for it, on disk."""
    import tokenizers
    import torch
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, special_tokens=["<pad>", "<bos>"], show_progress=False)
    bpe.train_from_iterator(islice(inputs.read("text", ""), 200), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>")
    tokenizer.save_pretrained(folder)
    small = SMALL.value
    shape = transformers.Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=64 if small else 640, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16 if small else 256, intermediate_size=128 if small else 2048,
        pad_token_id=0, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModel.from_config(shape).save_pretrained(folder)
    return str(folder)


def a_turn(work: Callable[[], Any], turns: int) -> float:
    """Seconds of one: the median over stretches of so many, each waited for."""
    found = []
    for _ in range(ROUNDS.value + 1):
        began = time.perf_counter()
        for _ in range(turns):
            last = work()
        jax.block_until_ready(last)
        found.append((time.perf_counter() - began) / turns)
    return float(np.median(found[1:]))


def configured(id: str, backend: str) -> Any:
    """Of a streamed run."""
    config = config_lib.base({"data.model.id": id, "data.model.layer": 9, "data.model.backend": backend})
    # A batch is a quarter of a forward pass, and a pass over the tokens whole batches: a stretch is as good as another.
    sequences = 8 if SMALL.value else 64
    config.data.model.update(stream=True, batch_size=sequences, n_tokens=20 * sequences * TOKENS)
    config.sae.n_features, config.sae.k = (512, 8) if SMALL.value else (16_384, 64)
    config.train.batch_size, config.train.precision = sequences * TOKENS // 4, PRECISION.value
    config.auxk.preset = "none"
    return config


def measured(id: str, backend: str) -> dict[str, Any]:
    """Of one backend."""
    config = configured(id, backend)
    model = config.data.model
    network = adapters.load(model)
    batch = next(network.batches())
    rows = lambda: extraction.forward(network, model, batch, 0, [model.layer])[model.layer].x  # noqa: E731
    ours[backend] = rows()
    extracting = a_turn(rows, 10) / len(ours[backend])
    source = sources.open_source(config)
    stream, static = source.train(0), step_lib.Static.of(config)
    step = jax.jit(
        lambda state, x: step_lib.group_step(state, x, static=static, allsum=lambda t: t), donate_argnums=0
    )
    held = [step_lib.init_group([config], jnp.zeros((1, source.d_model)))]

    def trained(x: Any) -> Any:
        held[0], metrics = step(held[0], x)
        return metrics

    fixed = jnp.asarray(next(stream))
    assert source.n_train_tokens is not None
    turns, left = divmod(source.n_train_tokens, config.train.batch_size)
    assert not left
    seconds = {
        "stream": a_turn(lambda: next(stream), turns), "step": a_turn(lambda: trained(fixed), turns),
        "both": a_turn(lambda: trained(jnp.asarray(next(stream))), turns),
    }  # fmt: skip
    hidden = (seconds["stream"] + seconds["step"] - seconds["both"]) / min(seconds["stream"], seconds["step"])
    per_second = {f"{name}_tokens_per_second": round(config.train.batch_size / s) for name, s in seconds.items()}
    return {
        "backend": backend, "device": jax.devices()[0].device_kind, "precision": PRECISION.value,
        "extracted_tokens_per_second": round(1 / extracting), **per_second, "hidden_share": round(hidden, 2),
    }  # fmt: skip


ours: dict[str, np.ndarray] = {}


def main(workdir: Path) -> None:
    """Both backends."""
    id, found = made(workdir / "model"), []
    for backend in ("torch", "jax"):
        found.append(measured(id, backend))
        print(found[-1], flush=True)
    apart = np.max(np.abs(ours["torch"] - ours["jax"]) / ours["torch"].std(axis=0))
    for row in found:
        row["largest_difference"] = f"{apart:.1e}"
    print(f"largest difference {apart:.1e} deviations")
    tables.write_csv(workdir / "bench_streaming.csv", found)


if __name__ == "__main__":
    command.run(main, "runs/bench_streaming")
