"""Rivals of centring and balance, each a step in place of the package's own, for a group of members on one device.

What wins becomes a setting of the package; these stay here, written densely and in their simplest form:

    annealed         more features than k, fewer from step to step: dictionary_learning and Llama Scope start at d_model
                     and come down to k within the first tenth
    multi_topk       the loss, and an eighth of that of 4 k kept (Gao et al. arXiv:2406.04093, appendix A; sparsify)
    resampling       every eighth of a run dead features take the direction of tokens that are badly reconstructed
    ghost_gradients  dead features, through an exponential in place of the ReLU, are fitted to the error
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.autoencoder import death, threshold
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import SAE
from sae_jax.training import step as step_lib
from sae_jax.training.step import Static, TrainState, group_step  # by name: race.py puts others in its place

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
# Of one SAE on a batch at a step: what goes down, and the activations (B, n) that count as fired.
Loss = Callable[[SAE, jax.Array, TrainState, Static], tuple[jax.Array, jax.Array]]


def kept(z_pre: jax.Array, k: int | jax.Array) -> jax.Array:
    """The k largest of each token that are positive, zeros elsewhere; k may change from step to step."""
    bar = threshold.kth_largest(jax.lax.stop_gradient(z_pre), k)[:, None]
    return jnp.where((z_pre >= bar) & (z_pre > 0), z_pre, 0.0)


def error(sae: SAE, x: jax.Array, acts: jax.Array) -> jax.Array:
    """x − x̂."""
    return x - acts @ sae.W_dec - sae.b_dec


def mean_square(e: jax.Array) -> jax.Array:
    """Σe² / B, the package's loss."""
    return jnp.sum(e**2) / len(e)


def going_down(loss: Loss) -> Step:
    """The gradient of `loss`; Adam, clipping and unit decoder rows as in the package."""

    def step(state: TrainState, x: jax.Array, *, static: Static, **_: Any) -> tuple[TrainState, dict[str, Any]]:
        def one(s: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
            own = x if s.hyper.before is None else s.hyper.before(x)
            (value, acts), grads = jax.value_and_grad(loss, has_aux=True)(s.sae, own, s, static)
            sae, moments, grad_norm = step_lib.descend(s, grads, static)
            silent = death.count_tokens(s.tokens_since_fired, (acts > 0).any(axis=0), len(x))
            e = error(s.sae, own, acts)
            metrics = {
                "loss": value, "fve": 1 - jnp.sum(e**2) / jnp.sum((own - own.mean(0)) ** 2),
                "l0": (acts > 0).sum() / len(x), "grad_norm": grad_norm,
                "dead": (silent >= s.hyper.dead_after_tokens).mean(dtype=value.dtype),
            }  # fmt: skip
            return s.replace(step=s.step + 1, sae=sae, moments=moments, tokens_since_fired=silent), metrics

        return sae_lib.each_member(one, state)

    return step


def annealed(first: str, share: float) -> Step:
    """Keeps `first` ("d_model", or "4k") at step 0 and k from `share` of the run on, linear between."""

    def loss(sae: SAE, x: jax.Array, s: TrainState, static: Static) -> tuple[jax.Array, jax.Array]:
        most = min(x.shape[1] if first == "d_model" else 4 * static.k, static.n_features)
        k = jnp.round(most + (static.k - most) * jnp.minimum(1.0, s.step / (share * static.steps))).astype(jnp.int32)
        acts = kept(sae_lib.preactivations(sae, x), k)
        return mean_square(error(sae, x, acts)), acts

    begins = going_down(loss)

    def step(state: TrainState, x: jax.Array, *, static: Static, **given: Any) -> tuple[TrainState, Any]:
        return jax.lax.cond(
            state.step[0] < share * static.steps, lambda s: begins(s, x, static=static),
            lambda s: group_step(s, x, static=static, **given), state,
        )  # fmt: skip

    return step


def _multi_topk(sae: SAE, x: jax.Array, s: TrainState, static: Static) -> tuple[jax.Array, jax.Array]:
    z_pre = sae_lib.preactivations(sae, x)
    acts, more = kept(z_pre, static.k), kept(z_pre, min(4 * static.k, static.n_features))
    return mean_square(error(sae, x, acts)) + mean_square(error(sae, x, more)) / 8, acts


multi_topk = going_down(_multi_topk)


def _ghost(sae: SAE, x: jax.Array, s: TrainState, static: Static) -> tuple[jax.Array, jax.Array]:
    """After Jermyn and Templeton, Ghost Grads (Transformer Circuits, January 2024): dead features give exp(z_pre).

    Their reconstruction of each token is scaled to half the length of its error; no gradient goes through either scale.
    The largest z_pre of a token is taken off first, which that scale undoes: exp of what gamma = 20 makes overflows.
    """
    still, dead = jax.lax.stop_gradient, s.tokens_since_fired >= s.hyper.dead_after_tokens
    z_pre = sae_lib.preactivations(sae, x)
    acts = kept(z_pre, static.k)
    e = error(sae, x, acts)
    mine = jnp.where(dead, z_pre, -1e30)
    ghost = jnp.where(dead, jnp.exp(mine - still(mine.max(axis=1, keepdims=True))), 0.0) @ sae.W_dec
    length = jnp.linalg.norm(still(e), axis=1) / (2 * jnp.linalg.norm(still(ghost), axis=1) + 1e-6)
    fit = mean_square(length[:, None] * ghost - still(e))
    share = jnp.where(dead.any(), still(mean_square(e) / (fit + 1e-6)), 0.0)
    return mean_square(e) + share * fit, acts


ghost_gradients = going_down(_ghost)


def resampling(state: TrainState, x: jax.Array, *, static: Static, **given: Any) -> tuple[TrainState, Any]:
    """The package's step, and now and then dead features become normalised errors of random tokens, moments zeroed.

    After Bricken et al., Towards Monosemanticity (2023), without their weighting of tokens by loss; encoder rows get a
    fifth of the mean length of the live ones, as there.
    """
    every, t = max(1, static.steps // 8), state.step[0]

    def one(s: TrainState) -> TrainState:
        sae: SAE = s.sae
        own = x if s.hyper.before is None else s.hyper.before(x)
        dead = s.tokens_since_fired >= s.hyper.dead_after_tokens
        e = own - sae_lib.decode(sae, sae_lib.encode(sae, own))
        picked = jax.random.randint(jax.random.fold_in(jax.random.key(0), t), (static.n_features,), 0, len(x))
        rows = sae_lib.unit_rows(e[picked])
        length = jnp.sum(jnp.where(dead, 0, jnp.linalg.norm(sae.W_enc, axis=1))) / jnp.maximum((~dead).sum(), 1)
        new = sae.replace(
            W_enc=jnp.where(dead[:, None], 0.2 * length * rows, sae.W_enc),
            b_enc=jnp.where(dead, 0.0, sae.b_enc), W_dec=jnp.where(dead[:, None], rows, sae.W_dec),
        )  # fmt: skip

        def cleared(leaf: Any) -> Any:
            mine = getattr(leaf, "shape", ())[:1] == (static.n_features,)
            return jnp.where(dead.reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf) if mine else leaf

        return s.replace(sae=new, moments=jax.tree.map(cleared, s.moments),
                         tokens_since_fired=jnp.where(dead, 0, s.tokens_since_fired))  # fmt: skip

    due = (t % every == every - 1) & (t < 0.9 * static.steps)  # the last ones have time to settle
    state, metrics = group_step(state, x, static=static, **given)
    return jax.lax.cond(due, lambda s: sae_lib.each_member(one, s), lambda s: s, state), metrics
