"""The sparse autoencoder as a pytree of four arrays. Knows no device, no loss, no data.

    z_pre = W_enc (x − b_dec) + b_enc ;  z = TopK(ReLU(z_pre)) ;  x̂ = W_decᵀ z + b_dec

Written for one SAE and a batch of tokens; several SAEs are the same pytree with a leading axis, under `jax.vmap`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sae_jax.autoencoder import topk
from sae_jax.autoencoder.kept import Kept
from sae_jax.errors import Refused

AllSum = Callable[[Any], Any]  # adds a pytree up over the devices that share a batch


class SAE(struct.PyTreeNode):
    """A TopK sparse autoencoder, z = TopK(ReLU(W_enc (x − b_dec) + b_enc)), x̂ = W_decᵀ z + b_dec.

    Rows are features, in the encoder as in the decoder; k of them are kept of each token. A pytree of arrays.
    """

    W_enc: Any  # (n, d)
    b_enc: Any  # (n,)
    W_dec: Any  # (n, d), unit rows
    b_dec: Any  # (d,)
    k: int = struct.field(pytree_node=False)

    def spread(self) -> "SAE":
        """How a stack of SAEs may be spread over devices: the leading axes of every leaf, by name."""
        return SAE(W_enc=FEATURES, b_enc=FEATURES, W_dec=FEATURES, b_dec=MEMBERS, k=self.k)


MEMBER, FEATURE = "member", "feature"  # names of the axes over which SAEs are batched and their features split
MEMBERS, FEATURES = PartitionSpec(MEMBER), PartitionSpec(MEMBER, FEATURE)


def each_member(fn: Callable[[Any], Any], members: Any) -> Any:
    """fn applied to every member of a stacked pytree: vmapped, or plainly where there is only one."""
    if jax.tree.leaves(members)[0].shape[0] > 1:
        return jax.vmap(fn, axis_name=MEMBER)(members)
    return jax.tree.map(lambda a: a[None], fn(jax.tree.map(lambda a: a[0], members)))


def init(key: PRNGKeyArray, n_features: int, k: int, center: Float[Array, "d"], norm: float = 1.0) -> SAE:
    """Random decoder rows of one norm, encoder tied to them, b_enc = 0, b_dec = center (zeros: the uncentred start)."""
    rows = norm * unit_rows(jax.random.normal(key, (n_features, center.shape[0]), center.dtype))
    return SAE(W_enc=rows, b_enc=jnp.zeros(n_features, center.dtype), W_dec=rows, b_dec=center, k=k)


def unit_rows(rows: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Each row divided by its Euclidean norm."""
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def preactivations(sae: SAE, x: Float[Array | np.ndarray, "B d"]) -> Float[Array, "B n"]:
    """z_pre before ReLU and top-k."""
    sae = jax.tree.map(jnp.asarray, sae)
    return topk.preactivations(jnp.asarray(x), sae.W_enc, sae.b_enc, sae.b_dec)


def encode(sae: SAE, x: Float[Array | np.ndarray, "B d"]) -> Kept:
    """The k kept features of every token.

    Args:
      sae: of JAX or NumPy arrays, as everywhere here.
      x: activations as the SAE takes them, in its own units: `before(x)` of what `load` returns.

    Returns:
      `values` (B, k), in the units of x, 0 where fewer than k pre-activations are positive, and their `indices`.

    Raises:
      Refused: the SAE has another activation than TopK.
    """
    if hasattr(sae, "activation"):  # a `dense.DenseSAE`
        raise Refused("sae", sae.activation, "a TopK SAE: sae_jax.features takes those of other kinds")
    sae = jax.tree.map(jnp.asarray, sae)
    return topk.encode(jnp.asarray(x), sae.W_enc, sae.b_enc, sae.b_dec, sae.k)


def decode(sae: SAE, codes: Kept | Float[Array, "B n"]) -> Float[Array, "B d"]:
    """x̂ from the kept features, or from activations that are dense, in the units that `encode` was given."""
    sae, codes = jax.tree.map(jnp.asarray, (sae, codes))  # a row of NumPy cannot be looked up by a traced index
    if isinstance(codes, Kept):
        return topk.decode(codes, sae.W_dec) + sae.b_dec
    with topk.exact():
        return codes @ sae.W_dec + sae.b_dec


def reconstruct(sae: SAE, x: Float[Array | np.ndarray, "B d"]) -> tuple[Float[Array, "B d"], Kept]:
    """x̂ and the kept features it is made of: `decode` of `encode`."""
    codes = encode(sae, x)
    return decode(sae, codes), codes


def square_error(
    sae: SAE, x: Float[Array, "B d"], shards: str | None = None, precision: str = "float32",
    lift: Float[Array, "n"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B d"], Kept]:  # fmt: skip
    """Σ‖x − x̂‖², with a gradient that goes through the kept entries only; x − x̂ and the codes, without one.

    Where features are split over a mesh axis `shards`, x̂ is that of all of them, the codes are this shard's;
    `precision` as in `topk.Way`, `lift` as in `topk.square_error`.
    """
    way = topk.Way(sae.k, shards=shards, precision=precision)
    return topk.square_error(x, x - sae.b_dec, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, lift, way)


def fired(codes: Kept | Float[Array, "B n"], n_features: int) -> Int[Array, "n"]:
    """How often each feature fired in the batch: kept **and** > 0. An index kept with value 0 has not fired."""
    if not isinstance(codes, Kept):
        return (codes > 0).sum(axis=0, dtype=jnp.int32)
    return jnp.zeros(n_features, jnp.int32).at[codes.indices.ravel()].add((codes.values > 0).ravel().astype(jnp.int32))
