"""SAEs that train and leave: an SAE with its preprocessing, to the bytes of another library's files and back.

                W_enc                b_enc          W_dec                b_dec  a folder with
    saelens     W_enc (d, n)         b_enc          W_dec (n, d)         b_dec  cfg.json, sae_weights.safetensors
    dictionary  encoder.weight       encoder.bias   decoder.weight       b_dec  config.json, ae.pt
    _learning     (n, d)                              (d, n)
    sparsify    encoder.weight       encoder.bias   W_dec (n, d)         b_dec  cfg.json, sae.safetensors
                  (n, d)

All three compute relu and top-k of W_enc (x − b_dec) + b_enc, as we do, so scaling, centring and whitening fold into
weights and biases (in float64, rounded once to float32). A norm of each token does not fold: SAELens has a flag for
it, the other two have none, and refuse. BatchTopK, JumpReLU and ReLU become the classes that the first two use them as;
sparsify has none. Layouts as in SAELens 6.54.12, dictionary_learning 0.1.0, sparsify 1.3.3. `registry` reads more kinds
of SAE than are written here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sae_jax.autoencoder.dense import DenseSAE
from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused
from sae_jax.exchange import dictionary_learning, registry, saelens, sparsify
from sae_jax.exchange.encoders import Opened
from sae_jax.outliers.preprocess import Preprocessing, fold

# SAELens' flag for each norm, and what ours is a multiple of: its LayerNorm divides by the deviation with ddof 1 (and
# adds 1e-5 to that, where we add it to the variance), its other norm makes every token √d long.
NORM_FLAGS: dict[str, tuple[str, Callable[[int], float]]] = {
    "none": ("none", lambda d: 1.0),
    "layer_norm": ("layer_norm", lambda d: (d / (d - 1)) ** 0.5),
    "layer_norm_unit": ("layer_norm", lambda d: (d - 1) ** -0.5),
    "unit": ("constant_norm_rescale", lambda d: d**-0.5),
}
# The libraries' norms → ours, a multiple of it.
OUR_NORMS = {**{norm: norm for norm in NORM_FLAGS}, "sample_layer_norm": "layer_norm", "constant_norm_rescale": "unit"}


class Packed(NamedTuple):
    """An SAE and what comes with it: `sae`, of NumPy float32 arrays, sees before(x) and reconstructs that.

    Metadata is plain JSON: `model_name`, `hook_name`, `layer`, `context_size` where known, and whatever else there is.
    """

    sae: SAE
    before: Preprocessing
    metadata: dict[str, Any]


def encode(packed: Packed, format: str) -> dict[str, bytes]:
    """The files of an SAE in a format, name → content, with its preprocessing folded in.

    Raises:
      Refused: there is no such format, or it has no flag for the norm, or no class for the activation.
    """
    if format not in FORMATS:
        raise Refused("--format", format, "one of " + ", ".join(FORMATS))
    norm = packed.before.norm
    if norm != "none" and format != "saelens":
        raise Refused("--format", format, f"saelens: {norm} looks at each token, and only saelens has a flag for it")
    if isinstance(packed.sae, DenseSAE) and packed.sae.activation == "batch_topk" and packed.sae.threshold < 0:
        raise Refused("threshold", "not set", "one that training has set: this BatchTopK SAE has not taken a step")
    if isinstance(packed.sae, DenseSAE) and format == "sparsify":
        raise Refused("--format", format, f"saelens or dictionary_learning: sparsify has no {packed.sae.activation}")
    flag, factor = NORM_FLAGS[norm]
    return FORMATS[format](folded(packed, factor(packed.before.shift.shape[0])), flag, packed.metadata)


def folded(packed: Packed, factor: float = 1.0) -> SAE:
    """The SAE with the affine part of its preprocessing in its weights; it sees norm(x) / factor.

    A scalar goes into the biases alone: an SAE of s·y is that of y with its biases over s and its features in the units
    of y. So scaling and centring leave the weights as they are to the last bit, and the decoder rows of unit length.
    """
    scale = np.float64(packed.before.scale) * factor
    sae = packed.sae.replace(
        b_enc=np.float64(packed.sae.b_enc) / scale, b_dec=np.float64(packed.sae.b_dec) / scale
    )
    if isinstance(sae, DenseSAE) and sae.threshold is not None:
        unset = np.asarray(sae.threshold) < 0
        sae = sae.replace(threshold=np.where(unset, sae.threshold, np.float64(sae.threshold) / scale))
    before = packed.before.replace(norm="none", shift=np.float64(packed.before.shift) / factor, scale=1.0)
    found: SAE = jax.tree.map(_float32, fold(sae, before))
    return found


def decode(path: epath.Path) -> Packed:
    """The SAE in a folder or file, in whatever format its files say, as one of ours.

    Raises:
      Refused: as `registry.read`, or the SAE is of a kind that is not written.
    """
    return as_ours(registry.read(path), str(path))


OURS = {"topk": "topk", "threshold": "jumprelu", "relu": "relu"}  # rule → activation


def is_ours(opened: Opened) -> bool:
    """Whether an SAE can be one of ours."""
    encoder = opened.encoder
    return encoder.rule in OURS and not encoder.transcodes and encoder.W_skip is None and not opened.stays


def as_ours(opened: Opened, name: str) -> Packed:
    """An SAE of another library as one of ours, its options folded into weights and biases.

    Raises:
      Refused: it is of a kind that is neither trained here nor written in these formats.
    """
    encoder = jax.tree.map(np.asarray, opened.encoder)
    if not is_ours(opened):
        reason = opened.stays or f"{encoder.name} is not supported here"
        raise Refused("--sae", name, f"a TopK, JumpReLU or ReLU SAE: {reason}, diagnose --sae takes it")
    d = encoder.W_enc.shape[1]
    arrays = {"W_enc": encoder.W_enc, "b_enc": encoder.b_enc, "W_dec": encoder.W_dec, "b_dec": encoder.b_dec}
    sae = SAE(**arrays, k=encoder.k or 0)
    if encoder.rule != "topk":
        sae = DenseSAE(**arrays, k=0, threshold=encoder.threshold, activation=OURS[encoder.rule])
        config = opened.metadata.get("config", {}) if opened.library == "sae_jax" else {}
        if config.get("sae.activation") == "batch_topk":
            sae = sae.replace(k=config["sae.k"], threshold=encoder.threshold[0], activation="batch_topk")
    if encoder.ranked_by is not None:  # it ranks by z · ‖row‖ and divides the rows by their norms
        norms = np.linalg.norm(sae.W_dec.astype(np.float64), axis=1)
        rows = norms[:, None]
        sae = sae.replace(
            W_enc=_float32(sae.W_enc * rows), b_enc=_float32(sae.b_enc * norms),
            W_dec=_float32(sae.W_dec / np.where(rows > 0, rows, 1)),
        )  # fmt: skip
    if not encoder.subtracts:  # W x + b_enc = W (x − b_dec) + (b_enc + W b_dec)
        sae = sae.replace(b_enc=_float32(sae.b_enc + sae.W_enc.astype(np.float64) @ sae.b_dec))
    norm = OUR_NORMS[encoder.norm]
    factor = 1.0 if norm == encoder.norm else NORM_FLAGS[norm][1](d)
    before = Preprocessing(shift=np.zeros(d), scale=1 / factor, norm=norm)
    return Packed(sae, before, opened.metadata)


# name → its writer: (SAE, SAELens' flag for the norm, metadata) → files
FORMATS: dict[str, Callable[[SAE, str, dict[str, Any]], dict[str, bytes]]] = {
    "saelens": saelens.write,
    "dictionary_learning": dictionary_learning.write,
    "sparsify": sparsify.write,
}


def _float32(array: Any) -> np.ndarray:
    return np.asarray(array, np.float32, order="C")
