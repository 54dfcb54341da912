"""SAEs that select otherwise than k a token: BatchTopK, JumpReLU, ReLU; and Matryoshka groups, of TopK as well.

Activations are dense, (B, n), and gradients are autodiff's. The formulae of each stand in `batch_topk`, `jumprelu` and
`relu`. A Matryoshka SAE (arXiv:2503.17547) is trained to reconstruct with each of several prefixes of its features:

    Σ_g ‖x − x̂_g‖²,   x̂_g = b_dec + what the first `groups[g]` features add        SAELens 6.54.12
    the same over G²   for G groups                                               dictionary_learning 0.1.0, as it is
                                                                                  written: weights 1/G, then their mean
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from sae_jax.autoencoder import batch_topk, jumprelu, relu, topk
from sae_jax.autoencoder.kept import largest
from sae_jax.autoencoder.sae import FEATURES, MEMBERS, SAE, AllSum

PENALTIES: dict[str, dict[str, Any]] = {"jumprelu": jumprelu.PENALTIES, "relu": relu.PENALTIES}
ACTIVATIONS = ("topk", "batch_topk", *PENALTIES)


class DenseSAE(SAE):
    """An SAE of another activation than TopK. k is that of BatchTopK, 0 elsewhere.

    z = z_pre where z_pre > threshold, of ReLU where z_pre > 0.
    """

    threshold: Any = None  # JumpReLU: (n,); BatchTopK: ()
    activation: str = struct.field(pytree_node=False, default="relu")

    def spread(self) -> "DenseSAE":
        """As of any SAE."""
        over = None if self.threshold is None else MEMBERS if self.activation == "batch_topk" else FEATURES
        arrays = {"W_enc": FEATURES, "b_enc": FEATURES, "W_dec": FEATURES, "b_dec": MEMBERS, "threshold": over}
        return self.replace(**arrays)


def of(sae: SAE, activation: str, threshold: Float[Array, ""] | float) -> SAE:
    """A fresh SAE with another activation; `threshold` is where that of JumpReLU starts."""
    if activation == "topk":
        return sae
    arrays = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    start = {
        "batch_topk": lambda: jnp.full((), batch_topk.UNSET, sae.b_enc.dtype),
        "jumprelu": lambda: jnp.full_like(sae.b_enc, threshold),
        "relu": lambda: None,
    }[activation]()
    return DenseSAE(**arrays, k=sae.k, threshold=start, activation=activation)


def select(sae: DenseSAE, z: Float[Array, "B n"], n_tokens: Any, allsum: AllSum) -> Float[Array, "B n"]:
    """Activations in use, of pre-activations that are not positive where there is no token; a NaN stays one."""
    acts = jax.nn.relu(z)
    if sae.activation == "relu":
        return acts
    silent = z <= sae.threshold
    if sae.activation == "batch_topk":  # before a threshold is known, the budget of this batch
        silent = jax.lax.cond(
            sae.threshold < 0, lambda: z < batch_topk.bar(z, sae.k * n_tokens, allsum, sae.k), lambda: silent
        )
    return jnp.where(silent, 0.0, acts)


class Loss(NamedTuple):
    """What the loss of one device's share of a batch is made of."""

    square: Any  # Σ ‖x − x̂‖², over the prefixes
    e: Any  # (B, d) x − x̂ of all features
    acts: Any  # (B, n)
    z: Any  # (B, n)
    least: Any  # BatchTopK: the least activation of all devices that is selected in use


def square_error(
    sae: SAE, x: Float[Array, "B d"], groups: tuple[int, ...], n_tokens: Array, allsum: AllSum, bandwidth: float,
    preset: str, lift: Float[Array, "n"] | None,
) -> Loss:  # fmt: skip
    """The reconstruction in training, of `n_tokens` tokens over all devices, with gradients through what is selected.

    `groups` are the widths of the prefixes, of which the last is n; () is (n,). `lift` is what a positive
    pre-activation has more in the selection, and there alone.
    """
    z = topk.preactivations(x, sae.W_enc, sae.b_enc, sae.b_dec)
    fixed = jax.lax.stop_gradient(z)
    ranked = fixed if lift is None else jnp.where(fixed > 0, fixed + lift, fixed)
    acts, least = jax.nn.relu(z), jnp.zeros((), z.dtype)
    if not isinstance(sae, DenseSAE):
        indices = largest(ranked, sae.k)[1]
        rows = jnp.arange(len(x))[:, None]
        acts = jnp.where(jnp.zeros(z.shape, bool).at[rows, indices].set(True), acts, 0.0)
    elif sae.activation == "batch_topk":
        budget = (sae.k * n_tokens).astype(jnp.int32)
        least = batch_topk.bar(ranked, budget, allsum, sae.k)
        acts = jnp.where(ranked < least, 0.0, acts)
        if lift is not None:  # in use nothing is lifted
            least = batch_topk.bar(fixed, budget, allsum, sae.k)
    elif sae.activation == "jumprelu":
        theta = sae.threshold
        acts = jumprelu.jump(z, theta, bandwidth, jumprelu.PENALTIES[preset].to_input)
        if lift is not None:
            opened = (ranked > jax.lax.stop_gradient(theta)) & ~(fixed > jax.lax.stop_gradient(theta))
            acts = acts + jnp.where(opened, jax.nn.relu(z), 0.0)
    ends = groups or (z.shape[1],)
    x_hat, square, e = sae.b_dec, jnp.zeros((), x.dtype), x
    with topk.exact():
        for start, end in zip((0, *ends), ends, strict=False):
            x_hat = x_hat + acts[:, start:end] @ sae.W_dec[start:end]
            e = x - x_hat
            square = square + jnp.sum(e * e)
    return Loss(square, e, acts, z, jax.lax.stop_gradient(least))


def penalty(
    sae: SAE, found: Loss, dead: Bool[Array, "n"], preset: str, *, weight: Array, target: float, bandwidth: float,
    n_tokens: Array, allsum: AllSum,
) -> Float[Array, ""]:  # fmt: skip
    """This device's share of what a preset of JumpReLU or ReLU asks for sparsity."""
    row_norms = jnp.linalg.norm(sae.W_dec, axis=1)
    if isinstance(sae, DenseSAE) and sae.activation == "jumprelu":
        return jumprelu.penalty(
            preset, found.z, found.acts, sae.threshold, row_norms, dead, weight=weight, target=target,
            bandwidth=bandwidth, n_tokens=n_tokens, allsum=allsum,
        )  # fmt: skip
    return relu.penalty(preset, found.acts, row_norms, weight=weight, n_tokens=n_tokens)


def after_step(sae: SAE, least: Any) -> SAE:
    """The SAE with what no gradient trains: BatchTopK's threshold follows, JumpReLU's does not fall below 0."""
    if not isinstance(sae, DenseSAE) or sae.threshold is None:
        return sae
    moved = batch_topk.follow(sae.threshold, least) if sae.activation == "batch_topk" else jnp.maximum(sae.threshold, 0)
    return sae.replace(threshold=moved)


def groups_of(text: str) -> tuple[int, ...]:
    """`sae.groups` as numbers: "64,256,1024"."""
    return tuple(int(part) for part in text.split(",")) if text else ()

