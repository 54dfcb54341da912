"""One encoder for all: what every SAE library does to a token, as arrays and a rule. Beside the SAE that is trained.

    u     = W_enc (norm(x) − b_in)         b_in: b_dec where the library subtracts it, else 0
    z_pre = u + b_enc
    acts  = what the rule selects of z_pre
    x̂     = W_decᵀ acts + b_dec [+ W_skip x]

    rule       acts                                                              source
    topk       ReLU of the k largest of z_pre · ranked_by of each token           arXiv:2406.04093; SAELens topk,
                                                                                  dictionary_learning, sparsify, OpenAI
    abstopk    the k largest of |z_pre · ranked_by|, with their sign              arXiv:2510.00404; SAELens abstopk,
                                                                                  sparsify `signed`
    groupmax   ReLU of the largest in each of k groups of neighbours              sparsify 1.3
    threshold  s = z_pre · ranked_by where s > threshold and s > 0                JumpReLU arXiv:2407.14435, each its
                                                                                  own; BatchTopK arXiv:2412.06410 in
                                                                                  use, one for all; Matryoshka
                                                                                  arXiv:2503.17547, whose groups nest in
                                                                                  the loss alone
    relu       ReLU(z_pre)                                                        arXiv:2309.08600; `standard`
    gated      ReLU(exp(r_mag) u + b_mag) where z_pre > 0, b_enc being b_gate     arXiv:2404.16014

`ranked_by` is ‖decoder row‖ where SAELens rescales by it (`rescale_acts_by_decoder_norm`), and acts are divided by it
again before they are decoded. A transcoder reconstructs other activations than it reads.

Fates are those of `autoencoder.death`, in words that fit every rule. *Dead by ReLU*: z_pre never positive (gated: the
gate never opens; abstopk: z_pre never other than 0). *Dead by selection*: positive, never selected with a value other
than 0. Reports keep the key `dead_by_topk` for the second.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from sae_jax.autoencoder import death, topk
from sae_jax.autoencoder.dense import DenseSAE
from sae_jax.autoencoder.kept import Kept, by_platform, combine, is_large, largest
from sae_jax.autoencoder.sae import SAE
from sae_jax.outliers import preprocess
from sae_jax.outliers.moments import LAYER_NORM_EPS

COUNTED = ("topk", "abstopk", "groupmax")  # rules that keep k a token
NAMES = {"topk": "TopK", "abstopk": "AbsTopK", "groupmax": "GroupMax", "threshold": "JumpReLU", "relu": "ReLU",
         "gated": "gated"}  # fmt: skip


class Encoder(struct.PyTreeNode):
    """Anybody's SAE or transcoder. Rows are features, in the encoder as in the decoder; arrays are float32."""

    W_enc: Any  # (n, d)
    b_enc: Any  # (n,); of a gated SAE that of the gate
    W_dec: Any  # (n, d_out)
    b_dec: Any  # (d_out,)
    b_in: Any  # (d,)
    threshold: Any = None  # (n,)
    ranked_by: Any = None  # (n,)
    r_mag: Any = None  # (n,)
    b_mag: Any = None  # (n,)
    W_skip: Any = None  # (d_out, d)
    rule: str = struct.field(pytree_node=False, default="topk")
    k: int | None = struct.field(pytree_node=False, default=None)
    norm: str = struct.field(pytree_node=False, default="none")  # of NORMS
    transcodes: bool = struct.field(pytree_node=False, default=False)

    @property
    def subtracts(self) -> bool:
        """Whether b_dec is subtracted from the input."""
        return not self.transcodes and bool(np.array_equal(self.b_in, self.b_dec))

    @property
    def name(self) -> str:
        """What people call it."""
        kind = " transcoder" if self.transcodes else ""
        return NAMES[self.rule] + (" skip" if kind and self.W_skip is not None else "") + kind

    @property
    def pathway(self) -> str:
        """By what a feature dies that is positive somewhere."""
        return death.pathway(self.rule)

    def in_units(self, scale: float) -> "Encoder":
        """The encoder of scale · x that does what this one does of x; exact for powers of two."""
        of = lambda a: None if a is None else a * np.float32(scale)  # noqa: E731
        return self.replace(
            b_enc=of(self.b_enc), b_dec=of(self.b_dec), b_in=of(self.b_in), threshold=of(self.threshold),
            b_mag=of(self.b_mag),
        )  # fmt: skip


class Opened(NamedTuple):
    """An encoder that was read from somewhere, and what comes with it.

    Metadata is plain JSON: `model_name`, `hook_name`, `layer`, `context_size` where known, and whatever else there is.
    """

    encoder: Encoder
    metadata: dict[str, Any]
    library: str  # whose arithmetic it is
    notes: tuple[str, ...] = ()  # what a reader of the report has to know
    stays: str = ""  # why the formats that are written cannot hold it, where the encoder alone does not tell
    tokens_since_fired: Any = None  # (n,), in training, where it is known


def of_sae(sae: SAE, norm: str = "none") -> Encoder:
    """Our own SAE, whose b_dec is subtracted. Of BatchTopK whose threshold was never set all fires that is positive."""
    arrays: Any = {name: np.asarray(getattr(sae, name), np.float32) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if not isinstance(sae, DenseSAE):
        return Encoder(**arrays, b_in=arrays["b_dec"], k=sae.k, norm=norm)
    rule = "relu" if sae.threshold is None else "threshold"
    if rule == "threshold":
        arrays["threshold"] = np.full(len(arrays["b_enc"]), np.maximum(sae.threshold, 0), np.float32)
    return Encoder(**arrays, b_in=arrays["b_dec"], rule=rule, norm=norm)


# -- norms of each token ---------------------------------------------------------------------------------------------


def _sample_layer_norm(x: Float[Array, "B d"]) -> Array:
    """(x − mean) / (deviation + 1e-5), the deviation with ddof 1: SAELens' `layer_norm`, OpenAI's `LN`."""
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / (jnp.std(centred, axis=1, ddof=1, keepdims=True) + 1e-5)


def _root_d(x: Float[Array, "B d"]) -> Array:
    """√d x / ‖x‖: SAELens' `constant_norm_rescale`. A token that is zero stays zero, where theirs is nan."""
    length = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x * (x.shape[1] ** 0.5 / jnp.where(length > 0, length, 1))


# Those of `preprocess.per_token` are our own; the other two are the libraries'.
NORMS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    **{name: partial(preprocess.per_token, norm=name) for name in ("layer_norm", "layer_norm_unit", "unit")},
    "sample_layer_norm": _sample_layer_norm,
    "constant_norm_rescale": _root_d,
}


def undone(x: Float[Array, "B d"], norm: str) -> tuple[Array, Array]:
    """What a norm takes from each token, as its library puts it back: x ≈ offset + size · norm(x). Both (B, 1)."""
    mean = x.mean(axis=1, keepdims=True)
    length = jnp.linalg.norm(x, axis=1, keepdims=True)
    root = x.shape[1] ** 0.5
    if norm == "sample_layer_norm":
        return mean, jnp.std(x, axis=1, ddof=1, keepdims=True)
    if norm in ("layer_norm", "layer_norm_unit"):
        deviation = jnp.sqrt(jnp.mean((x - mean) ** 2, axis=1, keepdims=True) + LAYER_NORM_EPS)
        return mean, deviation if norm == "layer_norm" else deviation * root
    size = {"none": jnp.ones_like(length), "unit": length, "constant_norm_rescale": length / root}[norm]
    return jnp.zeros_like(length), size


# -- encode and decode -----------------------------------------------------------------------------------------------


class Acts(NamedTuple):
    """What is selected of a batch: `kept` where the rule keeps k a token, else `dense` (B, n)."""

    kept: Kept | None
    dense: Array | None


def select(encoder: Encoder, z_pre: Float[Array, "B n"], b_mag: Any) -> tuple[Bool[Array, "B n"], Acts]:
    """Which features are positive on which token, and what the rule selects; `b_mag` as `magnitude_bias` has it."""
    positive = z_pre > 0
    if encoder.rule == "relu":
        return positive, Acts(None, jax.nn.relu(z_pre))
    if encoder.rule == "gated":
        return positive, Acts(None, jnp.where(positive, jax.nn.relu(jnp.exp(encoder.r_mag) * z_pre + b_mag), 0.0))
    ranked = z_pre if encoder.ranked_by is None else z_pre * encoder.ranked_by
    if encoder.rule == "threshold":
        return positive, Acts(None, jnp.where(ranked > encoder.threshold, jax.nn.relu(ranked), 0.0))
    assert encoder.k is not None
    if encoder.rule == "abstopk":
        indices = largest(jnp.abs(ranked), encoder.k)[1]
        return z_pre != 0, Acts(Kept(jnp.take_along_axis(ranked, indices, axis=1), indices), None)
    if encoder.rule == "groupmax":
        groups = ranked.reshape(len(z_pre), encoder.k, -1)
        indices = groups.argmax(axis=2) + groups.shape[2] * jnp.arange(encoder.k)
        return positive, Acts(Kept(jax.nn.relu(groups.max(axis=2)), indices), None)
    return positive, Acts(topk.top_k(ranked, encoder.k), None)


def encode(encoder: Encoder, x: Float[Array, "B d"]) -> Float[Array, "B n"]:
    """The activations of all features, dense, as the library's own `encode` gives them."""
    kept, dense = selected(encoder, x)
    if kept is None:
        assert dense is not None
        return dense
    return jnp.zeros((len(x), len(encoder.b_enc))).at[jnp.arange(len(x))[:, None], kept.indices].set(kept.values)


def selected(encoder: Encoder, x: Float[Array, "B d"]) -> Acts:
    """The same, as its rule gives them."""
    y = NORMS[encoder.norm](x)
    if encoder.rule == "topk" and encoder.ranked_by is None:
        assert encoder.k is not None
        return Acts(topk.encode(y, encoder.W_enc, encoder.b_enc, encoder.b_in, encoder.k), None)
    with topk.exact():
        z_pre = (y - encoder.b_in) @ encoder.W_enc.T + encoder.b_enc
        return select(encoder, z_pre, magnitude_bias(encoder))[1]


def magnitude_bias(encoder: Encoder) -> Array | None:
    """b_mag − exp(r_mag) b_gate: magnitudes are exp(r_mag) z_pre plus this."""
    return None if encoder.r_mag is None else encoder.b_mag - jnp.exp(encoder.r_mag) * encoder.b_enc


def decode(encoder: Encoder, acts: Acts, x: Float[Array, "B d"], b_dec: Array) -> Float[Array, "B e"]:
    """x̂ of what was selected; `x` is what a skip connection sees."""
    if acts.kept is not None:
        kept = acts.kept
        if encoder.ranked_by is not None:
            kept = kept._replace(values=_over(kept.values, encoder.ranked_by[kept.indices]))
        found = combine(kept, encoder.W_dec)
    else:
        dense: Any = acts.dense if encoder.ranked_by is None else _over(acts.dense, encoder.ranked_by)
        sparse = _sparse_product if is_large(*encoder.W_dec.shape) else jnp.matmul
        found = by_platform(dense, encoder.W_dec, cpu=sparse, elsewhere=jnp.matmul)
    found = found + b_dec
    return found if encoder.W_skip is None else found + x @ encoder.W_skip.T


def _sparse_product(dense: Float[Array, "B n"], rows: Float[Array, "n d"]) -> Float[Array, "B d"]:
    """dense @ rows, where all tokens have few entries by those alone: a matmul costs as much as that of the encoder."""
    few = rows.shape[0] // 64
    are_few = (dense > 0).sum(axis=1).max() <= few
    product: Array = jax.lax.cond(are_few, lambda: combine(topk.top_k(dense, few), rows), lambda: dense @ rows)
    return product


def _over(values: Any, factors: Array) -> Array:
    return values / jnp.where(factors > 0, factors, 1)


def in_rows(W: np.ndarray, fn: Callable[[np.ndarray], np.ndarray], rows: int = 4096) -> np.ndarray:
    """fn of the rows in float64, some at a time: a wide matrix is not copied."""
    parts = [fn(np.asarray(W[i : i + rows], np.float64)) for i in range(0, len(W), rows)]
    return np.concatenate(parts)
