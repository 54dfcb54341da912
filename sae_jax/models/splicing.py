"""What a reconstruction is worth to the model: its loss on text with the residual stream of one layer replaced.

    recovered = (CE_ablated − CE_spliced) / (CE_ablated − CE_clean)

CE is the mean of −log p(next token) in nats. Ablated is the same stream replaced by its mean, or by zeros; 1 is as good
as the stream itself, 0 no better than the ablation.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from sae_jax.errors import Refused
from sae_jax.models.extraction import kept
from sae_jax.models.network import Batch, Network
from sae_jax.runtime.optional import module

Replace = Callable[[Float[np.ndarray, "rows d"]], Float[np.ndarray, "rows d"]]


def losses(network: Network, model: ConfigDict, batch: Batch, replace: Replace | None = None) -> np.ndarray:
    """−log p of the next token (predictions,) in float32 nats, with the tokens of `model.layer` replaced.

    Tokens are what extraction keeps: the stream of special tokens and of padding stays as it is (BOS is an attention
    sink, and no SAE has seen it). What they predict is not counted, nor is a next token that is special or padding.

    Args:
      network: a decoder of text, loaded with its head.
      replace: from activations (rows, d_model) float32 to those that go on in their place; None for the clean loss.

    Raises:
      Refused: the model has no such layer.
    """
    torch = module("torch", "hf")
    layer, keep = model.layer, kept(model, batch)
    if not 0 <= layer <= len(network.blocks):
        raise Refused("data.model.layer", layer, f"0 to {len(network.blocks)}")

    def spliced(x: Any) -> Any:
        at = torch.from_numpy(keep).to(x.device)
        new = np.array(replace(x[at].float().cpu().numpy()), np.float32)  # type: ignore[misc]
        found = x.clone()
        found[at] = torch.from_numpy(new).to(x.device, x.dtype)
        return found

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((spliced(args[0]), *args[1:]), kwargs) if args else (args, kwargs | {
            "hidden_states": spliced(kwargs["hidden_states"])})  # fmt: skip

    def after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        return (spliced(output[0]), *output[1:]) if isinstance(output, tuple) else spliced(output)

    handles = []
    if replace is not None:
        handles = [network.blocks[0].register_forward_pre_hook(before, with_kwargs=True) if layer == 0
                   else network.blocks[layer - 1].register_forward_hook(after)]  # fmt: skip
    try:
        device = next(iter(network.blocks[0].parameters())).device
        with torch.inference_mode():
            logits = network.run(**{key: x.to(device) for key, x in batch.inputs.items()}).logits
            counted = keep[:, :-1] & batch.real[:, 1:] & ~batch.special[:, 1:]
            at, following = torch.from_numpy(counted), torch.from_numpy(batch.token_ids[:, 1:][counted]).long()
            found = torch.nn.functional.cross_entropy(
                logits[:, :-1][at.to(device)].float(), following.to(device), reduction="none"
            )
    finally:
        for handle in handles:
            handle.remove()
    values: np.ndarray = found.cpu().numpy()
    return values


def recovered(clean: float, ablated: float, spliced: float) -> float | None:
    """The share of the loss that ablation costs which the reconstruction saves; None where it costs nothing."""
    return (ablated - spliced) / (ablated - clean) if ablated != clean else None
