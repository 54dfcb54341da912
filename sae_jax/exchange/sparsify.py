"""sparsify (EleutherAI), from the first versions to 1.3.3.

    encoder.weight (n, d)   encoder.bias (n,)   W_dec (n, d)   b_dec (d,)   [W_skip (d, d)]   cfg.json, sae.safetensors

    z_pre = W_enc (x − b_dec) + b_enc, of a transcoder W_enc x + b_enc

Its `activation` is topk or groupmax; early versions have `signed`, the k largest in absolute value.
"""

from typing import Any

import numpy as np
from etils import epath

from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused
from sae_jax.exchange import arrays as arrays_lib
from sae_jax.exchange import origin
from sae_jax.exchange.encoders import Encoder, Opened
from sae_jax.runtime.disk import read_json

WEIGHTS = "sae.safetensors"


def write(sae: SAE, flag: str, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The files of a TopK SAE."""
    from safetensors.numpy import save as to_bytes

    n, d = sae.W_enc.shape
    config = {
        "activation": "topk", "expansion_factor": max(1, n // d), "num_latents": n, "k": sae.k, "d_in": d,
        "normalize_decoder": bool(np.allclose(np.linalg.norm(sae.W_dec, axis=1), 1, atol=1e-5)),
        "multi_topk": False, "skip_connection": False, "transcode": False,
    }  # fmt: skip
    arrays = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    hookpoint = {"hookpoint": origin.spelled(metadata["hook_name"], "sparsify")} if metadata.get("hook_name") else {}
    # Metadata lie beside: sparsify warns of every key in its configuration that it does not know.
    return {WEIGHTS: to_bytes(arrays), "cfg.json": arrays_lib.to_json(config),
            "metadata.json": arrays_lib.to_json(metadata | hookpoint)}  # fmt: skip


def read(path: epath.Path) -> Opened:
    """The sparse coder of a folder, by its weights' path."""
    where, beside = path.parent / "cfg.json", path.parent / "metadata.json"
    config = arrays_lib.config_beside(where)
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise Refused(f"{where}: activation", activation, "topk or groupmax: others are not supported")
    d, k = arrays_lib.integer(config, "d_in", where), arrays_lib.integer(config, "k", where)
    n = config.get("num_latents") or d * arrays_lib.integer(config, "expansion_factor", where)
    if activation == "groupmax" and (k < 1 or n % k):
        raise Refused(f"{where}: k", k, f"a divisor of the {n} features: groupmax has k groups of equal size")
    skips, transcodes = bool(config.get("skip_connection")), bool(config.get("transcode"))
    arrays, _ = arrays_lib.read_arrays(path)
    wanted: dict[str, tuple[int, ...]] = {
        "encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)
    }  # fmt: skip
    wanted |= {"W_skip": (d, d)} if skips else {}
    W_enc, b_enc, W_dec, b_dec, *rest = arrays_lib.take(arrays, wanted, path)
    encoder = Encoder(
        W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, b_in=np.zeros_like(b_dec) if transcodes else b_dec,
        W_skip=rest[0] if rest else None, rule="abstopk" if config.get("signed") else activation, k=k,
        transcodes=transcodes,
    )  # fmt: skip
    metadata = read_json("--sae", beside) if beside.exists() else {}
    hookpoint = metadata.pop("hookpoint", None)
    metadata = {"hook_name": hookpoint} | metadata if hookpoint else metadata
    return Opened(encoder, metadata, "sparsify", arrays_lib.unread(arrays, wanted))
