"""Top-k and the products with what it kept, in every form, by size: what `autoencoder/kept.py` chooses by.

    python -m experiments.speed.bench_forms --out=runs/bench_forms.csv

d 768; 4,096 tokens on a GPU, 2,048 on a CPU. Of top-k: `jax.lax.top_k` and in groups. Of the products, in the forms
that the platform has: the decoder (A @ W_dec), what the gradient of the kept entries is made of (e @ W_decᵀ there),
and both weight gradients (Aᵀ @ x of two A). Medians of ten, everything compiled first; whether a second call gave the
same bits.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.autoencoder import kept, topk
from sae_jax.autoencoder.kept import Kept
from sae_jax.reports import tables

ON_GPU = jax.default_backend() == "gpu"
D, BATCH = 768, 4096 if ON_GPU else 2048
FORMS = ("dense", "sorted") if ON_GPU else ("dense", "rows", "compressed")


class Case(NamedTuple):
    """One thing to time."""

    n: int
    k: int
    what: str
    way: str
    fn: Callable[..., Any]
    given: tuple[Any, ...]


def in_form(form: str, product: Callable[..., Any]) -> Callable[..., Any]:
    """A product, traced in this form."""

    def traced(*given: Any) -> Any:
        with (
            mock.patch.object(kept, "form", return_value=form),
            mock.patch.object(kept, "form_on_gpu", return_value=form), topk.exact(),
        ):  # fmt: skip
            return product(*given)

    return traced


def cases(n: int, k: int) -> list[Case]:
    """Of one size, on standard normal numbers."""
    rng = np.random.default_rng(0)
    x, z, rows = (jnp.asarray(rng.standard_normal(size, np.float32)) for size in ((BATCH, D), (BATCH, n), (n, D)))
    codes = Kept(*jax.jit(jax.lax.top_k, static_argnums=1)(z, k))
    products: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "decode": (kept.combine, (codes, rows)), "pick": (kept.pick, (x, codes, rows)),
        "weight gradients": (lambda c, x: kept.scatter((c.values,) * 2, c.indices, (x, x + 1), n), (codes, x)),
    }  # fmt: skip
    found = [
        Case(n, k, "top-k", "jax.lax.top_k", lambda z: jax.lax.top_k(z, k), (z,)),
        Case(n, k, "top-k", "in groups", partial(kept.in_groups, k=k, size=kept.GROUP if ON_GPU else 16), (z,)),
    ]
    return found + [Case(n, k, what, form, in_form(form, fn), given)
                    for what, (fn, given) in products.items() for form in FORMS]  # fmt: skip


def timed(case: Case, compiled: Callable[..., Any]) -> dict[str, Any]:
    """The median of ten calls."""
    first, taken = jax.block_until_ready(compiled(*case.given)), []
    for _ in range(10):
        began = time.perf_counter()
        last = jax.block_until_ready(compiled(*case.given))
        taken.append(time.perf_counter() - began)
    same = all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True))
    ms = f"{1e3 * float(np.median(taken)):.3g}"
    return {"n": case.n, "k": case.k, "what": case.what, "way": case.way, "ms": ms, "same_bits": int(same)}


def main() -> None:
    """All sizes, into one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_forms.csv"))
    parser.add_argument("--n", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--k", type=int, nargs="*", default=[8, 64, 256])
    given, rows = parser.parse_args(), []
    for n in given.n:
        found = [case for k in given.k for case in cases(n, k)]
        built = [jax.jit(case.fn).trace(*case.given) for case in found]  # one after the other: forms are set in tracing
        with ThreadPoolExecutor(8 if ON_GPU else 1) as pool:
            compiled = list(pool.map(lambda traced: traced.lower().compile(), built))
        for case, program in zip(found, compiled, strict=True):
            rows.append({"device": jax.devices()[0].device_kind, "batch": BATCH, "d": D, **timed(case, program)})
            print(tables.one_line(rows[-1]), flush=True)
        tables.write_csv(given.out, rows)


if __name__ == "__main__":
    main()
