"""What an autopsy costs beside its encoder's matmul: `dissect` of one SAE, against x @ W_encᵀ of the same tokens.

    python -m experiments.speed.bench_autopsy --rules=topk,relu,threshold

n 16,384, d 768, 100,000 tokens with a mean five times as long as they vary, float32, in memory. The matmul is compiled,
2,048 tokens at a time, and nothing else: what it finds is dropped. Both in turn, --repeats times, after one of each
that compiles. Prints the medians of seconds on the clock and of processor seconds, and their ratios; --profile prints
where the time of the last autopsy went. About 2 minutes a rule and repeat on 2 CPU cores.
"""

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import sae_jax
from experiments import command
from sae_jax.exchange.encoders import Encoder, Opened
from sae_jax.models.sources import BATCH

RULES = flags.DEFINE_string("rules", "topk", "topk, relu, threshold, abstopk, gated, with commas between")
TOKENS = flags.DEFINE_integer("tokens", 100_000, "tokens")
REPEATS = flags.DEFINE_integer("repeats", 3, "autopsies of each rule, and as many times the matmul")
N, D, K = (flags.DEFINE_integer(name, value, "of the SAE") for name, value in (("n", 16_384), ("d", 768), ("k", 64)))
PROFILE = flags.DEFINE_boolean("profile", False, "functions of the last autopsy that took longest")


def activations() -> np.ndarray:
    """Tokens whose dimensions vary unequally, with a mean in three of them, gamma 5."""
    rng, d = np.random.default_rng(0), D.value
    scale = np.linspace(1, 0.1, d, dtype=np.float32)
    mu = np.zeros(d, np.float32)
    mu[[7, d // 8, d // 2]] = 5 * np.linalg.norm(scale) * np.array([0.8, 0.5, -0.33])
    x = rng.standard_normal((TOKENS.value, d), np.float32)
    x *= scale
    x += mu
    return x


def encoder(rule: str) -> Encoder:
    """An untrained SAE whose bias has half of the mean, and thresholds that about k features a token pass."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((N.value, D.value), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    zero, b_dec = np.zeros(N.value, np.float32), np.zeros(D.value, np.float32)
    spread = np.float32(0.6)  # of a pre-activation: √ of the mean variance of a dimension
    return Encoder(
        W_enc=rows, b_enc=zero - 2 * spread if rule == "relu" else zero, W_dec=rows, b_dec=b_dec, b_in=b_dec,
        threshold=zero + 2 * spread if rule == "threshold" else None, rule=rule,
        k=K.value if "topk" in rule else None, r_mag=zero if rule == "gated" else None,
        b_mag=zero if rule == "gated" else None,
    )  # fmt: skip


def timed(fn: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of processors."""
    start = time.perf_counter(), time.process_time()
    fn()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def main() -> None:
    """A line for each rule."""
    x = activations()
    product = jax.jit(lambda x, W: x @ W.T)

    def matmul(W: jax.Array) -> None:
        for start in range(0, len(x), BATCH):
            product(jnp.asarray(x[start : start + BATCH]), W).block_until_ready()

    for rule in RULES.value.split(","):
        found = encoder(rule)
        W = jnp.asarray(found.W_enc)
        opened = Opened(found, {}, "bench")
        run = lambda tokens, opened=opened: sae_jax.dissect(opened, tokens)  # noqa: E731
        run(x[:BATCH]), matmul(W)
        profile = cProfile.Profile()
        autopsies, matmuls = [], []
        for repeat in range(REPEATS.value):
            matmuls.append(timed(lambda W=W: matmul(W)))  # type: ignore[misc]
            if PROFILE.value and repeat == REPEATS.value - 1:
                profile.enable()
            autopsies.append(timed(lambda run=run: run(x)))  # type: ignore[misc]
            profile.disable()
        (wall, cpu), (base, base_cpu) = (
            [statistics.median(column) for column in zip(*times, strict=True)] for times in (autopsies, matmuls)
        )
        print(f"{rule}: autopsy {wall:.1f} s, matmul {base:.1f} s, {wall / base:.2f} times; processor seconds "
              f"{cpu:.1f}, {base_cpu:.1f}, {cpu / base_cpu:.2f} times", flush=True)  # fmt: skip
        if PROFILE.value:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    command.run(main)
