"""The figures of a run and its page, at its end."""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import AllSum
from sae_jax.outliers import moments as moments_lib
from sae_jax.reports import page
from sae_jax.training import evaluation
from sae_jax.training import step as step_lib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_jax.training.run import Run


def draw(
    run: "Run", kept: list[dict[str, Any]], result: dict[str, Any], first_states: tuple[step_lib.TrainState, ...]
) -> None:
    """The figures, and the page that shows them: computed by all processes, drawn by the first."""
    shifts = _shifts(run, first_states, result["pathway"])
    if jax.process_index() != 0:
        return
    from sae_jax.reports import figures  # and with it matplotlib, half a second, at the end alone

    names = list(run.ensemble.members)[: page.DRAWN]
    kept = [{**entry, "members": {name: entry["members"][name] for name in names}} for entry in kept]
    given, valid = next(run.source.held_out())
    tokens = jax.jit(lambda given: run.tokens("eval", given, jnp.int32(0), len(valid)))(given)
    normed = moments_lib.layer_norm(np.asarray(tokens, np.float64)[valid])
    standing = moments_lib.moments(normed)
    draw: dict[str, Callable[..., Figure]] = {
        "deaths": partial(figures.deaths, kept, pathway=result["pathway"]),
        "bias": partial(figures.bias_convergence, kept),
        "shifts": partial(figures.shifts, {name: shifts[name] for name in names}),
        "curves": partial(figures.curves, kept),
        "comparison": partial(
            figures.comparison, result["members"][: page.DRAWN], pathway=result["pathway"]
        ),
        "landscape": partial(
            figures.landscape, normed[:200], moments_lib.standing_out(standing), len(standing.outlier_dimensions)
        ),
    }
    pictures = {
        name: page.Picture(figures.png(one()), figures.png(one(narrow=True))) for name, one in draw.items()
    }
    page.write(run.workdir, result, pictures)


def _shifts(
    run: "Run", first_states: tuple[step_lib.TrainState, ...], pathway: str
) -> dict[str, list[tuple[str, evaluation.Shift]]]:
    """Every member's pre-activations, before training and after it."""

    def one_batch(allsum: AllSum, device: Int[Array, ""], groups: Any, given: Any, valid: Any) -> Any:
        x = run.tokens("eval", given, device, run.config.eval.batch_size // run.devices.shares)
        return evaluation.shift_batch(groups, x, valid, allsum, run.devices.shards)

    compiled = run.devices.compile(
        one_batch, split=(None, run.source.split_axis, 0), out=lambda *_: sae_lib.FEATURES
    )  # fmt: skip
    n_tokens = min(run.source.n_eval_tokens, evaluation.SHIFT_BATCHES * run.config.eval.batch_size)
    shifts: dict[str, list[tuple[str, evaluation.Shift]]] = {name: [] for name in run.ensemble.members}
    for when, states in (("at init", first_states), (f"step {run.step}", run.states)):
        batches = islice(run.source.held_out(), evaluation.SHIFT_BATCHES)
        found = evaluation.shifts(compiled, tuple(map(step_lib.in_shared_frame, states)), batches, n_tokens)
        for group, members in zip(run.groups, found, strict=True):
            for name, shift in zip(group.names, members, strict=True):
                shifts[name].append((when, shift._replace(pathway=pathway)))
    return shifts
