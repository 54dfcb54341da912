"""How fast a training step is: ours, naive JAX, SAELens, dictionary_learning and sparsify, and the floors, in one run.

dictionary_learning wants a torchvision that breaks transformers where torch is another build: an environment of its
own,

    python -m venv peers && peers/bin/pip install -e ".[bench]" && peers/bin/pip uninstall -y torchvision
    peers/bin/python -m experiments.speed.bench_step --out=experiments/speed/bench_step.csv

Whole steps: forward, backward, clip, Adam, unit decoder rows where the library keeps them, dead features tracked, AuxK
enabled with nothing dead; then with half of the dictionary dead (bias at −1000) and AuxK at work. In turns, round by
round, so that all meet the same machine; medians. The floors are what a step cannot do without: the encoder's matmul,
`lax.top_k` of its result, reading and writing parameters and moments in Adam's update (ours, alone). Peak memory is
that of a process that does nothing but three such steps. Without a peer installed its rows are left out. Deaths at
initialisation are counted beside the matmuls that this takes. About 12 minutes on 2 CPU cores; on an idle machine.
--auxk times our step alone, with more and more of the dictionary dead; five minutes.

Where JAX has a GPU, larger SAEs and batches, without small ones and peak memory; torch runs on the same GPU, sparsify
with its Triton kernels and in bfloat16 as its trainer has it, the other two in float32 and with their autocast.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

warnings.filterwarnings("ignore")  # the peers' own

from sae_jax import config as config_lib  # noqa: E402
from sae_jax.autoencoder import death, kept, optimizer  # noqa: E402
from sae_jax.autoencoder import sae as sae_lib  # noqa: E402
from sae_jax.reports import tables  # noqa: E402
from sae_jax.training import step as step_lib  # noqa: E402


class Shape(NamedTuple):
    """Of one comparison."""

    d: int
    n: int
    k: int
    batch: int
    members: int = 1


ON_GPU = jax.default_backend() == "gpu"
LARGE = (Shape(768, 8192, 64, 2048), Shape(768, 32768, 64, 2048))
if ON_GPU:
    LARGE = tuple(Shape(768, n, 64, 4096) for n in (8192, 32768, 131072))
SMALL = () if ON_GPU else (Shape(64, 1024, 8, 128), Shape(32, 256, 2, 64, 8))
NEVER, LOW = 10**9, -1000.0
INNER = 50  # steps of a small SAE in one compiled call, as they are trained
Step = Callable[[], Any]  # does a turn, one step or INNER of them, and waits for it


def inner(shape: Shape) -> int:
    """Steps a turn."""
    return 1 if shape in LARGE else INNER


def looped(shape: Shape, fn: Callable[..., Any], start: Any, *given: Any) -> Step:
    """A turn of state → fn(number, state, *given), compiled, the state's buffers given up."""

    def turn(state: Any, *given: Any) -> Any:
        if shape in LARGE:
            return fn(0, state, *given)
        return jax.lax.fori_loop(0, INNER, lambda i, state: fn(i, state, *given), state)

    compiled = jax.jit(turn, donate_argnums=0)
    held = [compiled(start, *given)]

    def run() -> None:
        held[0] = compiled(held[0], *given)
        jax.block_until_ready(held[0])

    return run


def data(shape: Shape) -> np.ndarray:
    """Standard normal tokens."""
    return np.random.default_rng(0).standard_normal((shape.batch, shape.d), np.float32)


# -- ours ------------------------------------------------------------------------------------------------------------


def ours(
    shape: Shape, half_dead: bool, precision: str = "float32", balance: bool = False, dead: float = 0.5
) -> Step:
    """`training.group_step`, AuxK enabled; `dead` is the share of the dictionary that `half_dead` says is dead."""
    n_dead = int(shape.n * dead)
    config = config_lib.base()
    config.sae.n_features, config.sae.k, config.sae.balance, config.data.signal = shape.n, shape.k, balance, "gaussian"
    config.train.update(steps=10**6, batch_size=shape.batch, precision=precision)
    config.auxk.dead_after_tokens = NEVER
    state = step_lib.init_group([config] * shape.members, jnp.zeros((shape.members, shape.d)))
    if half_dead:
        state = state.replace(
            sae=state.sae.replace(b_enc=state.sae.b_enc.at[:, :n_dead].set(LOW)),
            tokens_since_fired=state.tokens_since_fired.at[:, :n_dead].set(NEVER),
        )
    static, x = step_lib.Static.of(config), jnp.asarray(data(shape))
    return looped(shape, lambda _, s, x: step_lib.group_step(s, x, static=static, allsum=lambda t: t)[0], state, x)


# -- the same by the book --------------------------------------------------------------------------------------------


def naive(shape: Shape, half_dead: bool) -> Step:
    """Autodiff through dense codes, optax's Adam with its clip, counters from a dense mask: no AuxK, so half_dead is
    only a bias."""
    rows = jax.random.normal(jax.random.key(0), (shape.members, shape.n, shape.d))
    rows = rows / jnp.linalg.norm(rows, axis=2, keepdims=True)
    b_enc = jnp.zeros((shape.members, shape.n)).at[:, : shape.n // 2 * half_dead].set(LOW)
    params = {"W_enc": rows, "b_enc": b_enc, "W_dec": rows + 0, "b_dec": jnp.zeros((shape.members, shape.d))}
    adam, x = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4)), jnp.asarray(data(shape))

    def loss(p: Any) -> Any:
        z = jax.nn.relu(jnp.matmul(x - p["b_dec"], p["W_enc"].T, precision="highest") + p["b_enc"])
        values, indices = jax.lax.top_k(z, shape.k)
        codes = jnp.zeros_like(z).at[jnp.arange(len(x))[:, None], indices].set(values)
        x_hat = jnp.matmul(codes, p["W_dec"], precision="highest") + p["b_dec"]
        return jnp.sum((x - x_hat) ** 2) / len(x), codes

    def one(p: Any, moments: Any, silent: Any) -> Any:
        (_, codes), grads = jax.value_and_grad(loss, has_aux=True)(p)
        w = p["W_dec"]
        grads["W_dec"] -= jnp.sum(grads["W_dec"] * w, axis=1, keepdims=True) * w
        updates, moments = adam.update(grads, moments, p)
        p = optax.apply_updates(p, updates)
        p["W_dec"] /= jnp.linalg.norm(p["W_dec"], axis=1, keepdims=True)
        return p, moments, jnp.where((codes > 0).any(0), 0, silent + len(x))

    start = params, jax.vmap(adam.init)(params), jnp.zeros((shape.members, shape.n), jnp.int32)
    return looped(shape, lambda _, state: jax.vmap(one)(*state), start)


# -- the peers -------------------------------------------------------------------------------------------------------


def there(shape: Shape) -> tuple[Any, str]:
    """The tokens on torch's device, and that device."""
    import torch

    device = "cuda" if ON_GPU else "cpu"
    return torch.from_numpy(data(shape)).to(device), device


def waited(step: Step) -> Step:
    """A step of torch, done."""
    import torch

    def run() -> None:
        step()
        if ON_GPU:
            torch.cuda.synchronize()

    return run


def saelens(shape: Shape, half_dead: bool, autocast: bool = False) -> Step:
    """One step of SAELens' own trainer."""
    import torch
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x, device = there(shape)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=shape.d, d_sae=shape.n, k=shape.k, apply_b_dec_to_input=True, device=device)
    )
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=shape.batch, lr=3e-4, lr_end=3e-4,
        dead_feature_window=1000, device=device, autocast=autocast,
    )  # fmt: skip
    trainer = SAETrainer(config, sae, iter([x]))
    if half_dead:
        with torch.no_grad():
            sae.b_enc[: shape.n // 2] = LOW
        trainer.n_forward_passes_since_fired[: shape.n // 2] = NEVER
    return waited(lambda: trainer._train_step(sae, x))


def dictionary_learning(shape: Shape, half_dead: bool, autocast: bool = False) -> Step:
    """One step of dictionary_learning's own trainer."""
    import torch
    from dictionary_learning.trainers.top_k import TopKTrainer

    x, device = there(shape)
    trainer = TopKTrainer(steps=10**6, activation_dim=shape.d, dict_size=shape.n, k=shape.k, layer=0, lm_name="none",
                          warmup_steps=0, seed=0, device=device)  # fmt: skip
    count = iter(range(1, 10**6))  # its first step starts the bias at the median
    trainer.update(0, x)
    if half_dead:
        with torch.no_grad():
            trainer.ae.encoder.bias[: shape.n // 2] = LOW
        trainer.num_tokens_since_fired[: shape.n // 2] = NEVER
    cast = torch.autocast(device, dtype=torch.bfloat16, enabled=autocast)

    def step() -> None:
        with cast:
            trainer.update(next(count), x)

    return waited(step)


def sparsify(shape: Shape, half_dead: bool) -> Step:
    """One step as its trainer takes it with Adam, whose loop wants a model: TF32, and bfloat16 on a GPU."""
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    x, device = there(shape)
    torch.manual_seed(0)
    sae = SparseCoder(shape.d, SparseCoderConfig(num_latents=shape.n, k=shape.k), device, torch.float32)
    adam = torch.optim.Adam(sae.parameters(), lr=3e-4)
    silent = torch.zeros(shape.n, dtype=torch.long, device=device)
    if half_dead:
        with torch.no_grad():
            sae.encoder.bias[: shape.n // 2] = LOW
        silent[: shape.n // 2] = NEVER

    def step() -> None:
        torch.set_float32_matmul_precision("high")
        fired = torch.zeros(shape.n, dtype=torch.bool, device=device)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=silent >= NEVER)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        silent.add_(shape.batch)
        silent[fired] = 0
        torch.set_float32_matmul_precision("highest")

    return waited(step)


def in_bfloat16(shape: Shape, half_dead: bool) -> Step:
    """Ours, the encoder's operands rounded."""
    return ours(shape, half_dead, "bfloat16")


def balanced(shape: Shape, half_dead: bool) -> Step:
    """Ours, with balanced selection."""
    return ours(shape, half_dead, balance=True)


STEPS = {
    "ours": ours, "ours, bfloat16 encode": in_bfloat16, "ours, balanced": balanced, "naive JAX": naive,
    "SAELens": saelens, "dictionary_learning": dictionary_learning,
}  # fmt: skip
if ON_GPU:
    STEPS |= {
        "SAELens, autocast": partial(saelens, autocast=True),
        "dictionary_learning, autocast": partial(dictionary_learning, autocast=True),
        "sparsify (bfloat16)": sparsify,
    }
PACKAGES = {"SAELens": "sae_lens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}


def peer(name: str) -> str | None:
    """The package that takes such a step, if it is a peer's."""
    return PACKAGES.get(name.partition(",")[0].partition(" (")[0])


# -- floors ----------------------------------------------------------------------------------------------------------


def floors(shape: Shape) -> dict[str, Step]:
    """The encoder's matmul, top-k of its result, the update; of all members."""
    config = config_lib.base()
    config.sae.n_features, config.sae.k = shape.n, shape.k
    state = step_lib.init_group([config] * shape.members, jnp.zeros((shape.members, shape.d)))
    x, W_enc = jnp.asarray(data(shape)), state.sae.W_enc + 0
    # As one plain matmul: a batched one is slower.
    product = lambda x, w: jnp.matmul(x, w.reshape(-1, shape.d).T, precision="highest")  # noqa: E731
    z = product(x, W_enc).reshape(-1, shape.n)
    grads = jax.tree.map(lambda a: 0.01 * a + 0.001, state.sae)
    sae, valid = jax.tree.map(lambda a: a[0] + 0, state.sae), jnp.ones(shape.batch, bool)
    seen = death.sight(sae, x, valid)[0]

    def update(_: Any, held: Any, grads: Any) -> Any:
        def one(trees: Any) -> Any:
            return optimizer.update(
                *trees, count=jnp.int32(5), rate=jnp.float32(1e-3), betas=(0.9, 0.999), clip_norm=1.0, unit_decoder=True
            )[:2]

        return sae_lib.each_member(one, (*held, grads))

    # What is multiplied hangs on the number of the step, or the compiler would do it once for all.
    return {
        "encode matmul": looped(shape, lambda i, _, w, x: product(x + i, w), product(x, W_enc), W_enc, x),
        "six matmuls": looped(
            shape, lambda i, _, w, x: [product(x + 6 * i + j, w) for j in range(6)],
            [product(x, W_enc) + j for j in range(6)], W_enc, x,
        ),
        "lax.top_k": looped(shape, lambda i, _, z: jax.lax.top_k(z + i, shape.k), jax.lax.top_k(z, shape.k), z),
        "its largest": looped(shape, lambda i, _, z: kept.largest(z + i, shape.k), kept.largest(z, shape.k), z),
        "update": looped(shape, update, (state.sae, state.moments), grads),
        "deaths counted": looped(shape, lambda i, _, sae, x: death.sight(sae, x + i, valid)[0], seen, sae, x),
    }


# -- measuring -------------------------------------------------------------------------------------------------------


def measured(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Medians over rounds in which all take turns."""
    runs: dict[tuple[str, bool], Step] = {(name, False): run for name, run in floors(shape).items()}
    wanted = [
        (name, half_dead) for name in STEPS for half_dead in (False, True)
        if not (half_dead and name == "naive JAX")
        and ((package := peer(name)) is None or (shape.members == 1 and importlib.util.find_spec(package)))
    ]  # fmt: skip
    # Most of a GPU's time here would be compilation, one program after the other.
    with ThreadPoolExecutor(8 if ON_GPU else 1) as pool:
        ours_and_naive = [key for key in wanted if peer(key[0]) is None]
        built = pool.map(lambda key: STEPS[key[0]](shape, key[1]), ours_and_naive)
        runs |= dict(zip(ours_and_naive, built, strict=True))
    runs |= {key: STEPS[key[0]](shape, key[1]) for key in wanted if peer(key[0]) is not None}
    turns = {key: (run, inner(shape) if peer(key[0]) else 1) for key, run in runs.items()}
    times = {key: [seconds / inner(shape) for seconds in found] for key, found in in_turns(turns, rounds).items()}
    median = {key: float(np.median(found)) for key, found in times.items()}
    parts = sum(median[name, False] for name in ("encode matmul", "its largest", "update"))
    rows = []
    for (name, half_dead), seconds in median.items():
        ours_in_state = median["ours", half_dead]
        rows.append({
            **shape._asdict(), "what": name, "half_dead": int(half_dead), "ms": f"{1e3 * seconds:.4g}",
            "fastest_ms": f"{1e3 * min(times[name, half_dead]):.4g}",
            "of_encode_matmul": f"{seconds / median['encode matmul', False]:.3f}",
            "of_encode_topk_update": f"{seconds / parts:.3f}",
            "six_matmuls_over_it": f"{median['six matmuls', False] / seconds:.3f}",
            "ours_over_it": f"{ours_in_state / seconds:.3f}",
            "tokens_per_second": round(shape.batch * shape.members / seconds),
            "steps_per_second": round(shape.members / seconds, 1),
            "peak_mb": peak(name, shape) if name in STEPS and not half_dead and shape in LARGE and not ON_GPU else "",
        })  # fmt: skip
        print(tables.one_line(rows[-1]), flush=True)
    return rows


def in_turns(turns: dict[Any, tuple[Step, int]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each turn in each round, a step or several; the first round compiles and warms up."""
    times: dict[Any, list[float]] = {key: [] for key in turns}
    for number in range(rounds + 1):
        for key, (step, count) in turns.items():
            began = time.perf_counter()
            for _ in range(count):
                step()
            if number:
                times[key].append(time.perf_counter() - began)
    return times


def of_auxk(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Medians of our step with AuxK at work, in turns with one in which nothing is dead."""
    turns = {dead: (ours(shape, dead > 0, dead=dead), 1) for dead in (0.0, 0.05, 0.125, 0.25, 0.5, 0.9)}
    times = in_turns(turns, rounds)
    asleep = float(np.median(times[0.0]))
    return [{**shape._asdict(), "dead": f"{dead:g}", "ms": f"{1e3 * np.median(found):.4g}",
             "fastest_ms": f"{1e3 * min(found):.4g}", "of_asleep": f"{np.median(found) / asleep:.2f}"}
            for dead, found in times.items()]  # fmt: skip


def peak(name: str, shape: Shape) -> int:
    """Largest resident memory of a process that does three steps, in MB."""
    text = ",".join(map(str, shape))
    argv = [sys.executable, "-m", "experiments.speed.bench_step", f"--alone={name}:{text}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """All shapes, into one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the table; not given: runs/bench_step.csv, or bench_auxk.csv")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--n", type=int, nargs="*", default=[], help="only these dictionary sizes")
    parser.add_argument("--auxk", action="store_true", help="only our step, by how much of the dictionary is dead")
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        name, text = given.alone.split(":")
        step = STEPS[name](Shape(*map(int, text.split(","))), False)
        for _ in range(3):
            step()
        # Not ru_maxrss, which a process inherits from the one that started it.
        held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(int(held.split()[1]) // 1000)
        return
    out = given.out or Path("runs") / ("bench_auxk.csv" if given.auxk else "bench_step.csv")
    rows = []
    for shape in [s for s in (*LARGE, *(() if given.auxk else SMALL)) if not given.n or s.n in given.n]:
        rows += of_auxk(shape, given.rounds) if given.auxk else measured(shape, given.rounds)
        tables.write_csv(out, rows)


if __name__ == "__main__":
    main()
