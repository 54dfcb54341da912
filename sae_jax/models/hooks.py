"""What a model holds at its layers, caught by hooks in one forward pass.

Layer L is the residual stream after L blocks (0: what goes into the first). Other hook points are modules of the L-th
block: `attention`, `mlp`, or the path of any of its submodules, as that module returns it.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from sae_jax.errors import Refused
from sae_jax.models.network import Batch, Network
from sae_jax.runtime.optional import module

# Where families keep these. In BERT and its like `attention` and `output` add the residual stream: their last dense
# layer is the part that is written to it.
HOOKS = {
    "attention": ("attention.output.dense", "self_attn", "attn", "attention", "inner_mha_cls"),
    "mlp": ("output.dense", "mlp", "feed_forward", "ffn", "ff"),
}


class _Stop(Exception):
    """Raised in a hook: the last layer asked for has been computed."""


def _tensor(output: Any, stream: int) -> Any:
    """The stream among what a block returns: several things or one."""
    if not isinstance(output, tuple):
        return output
    return output[min(stream, len(output) - 1)]


def _submodule(block: Any, hook: str) -> Any:
    known = dict(block.named_modules())
    for path in HOOKS.get(hook, (hook,)):
        if path and path in known:
            return known[path]
    within = ", ".join(name for name in known if name and "." not in name)
    allowed = f"residual, attention, mlp or a submodule of {type(block).__name__}: {within}"
    raise Refused("data.model.hook", hook, allowed)


def streams(network: Network, given: dict[str, Any], layers: Collection[int], hook: str = "residual") -> dict[int, Any]:
    """What a hook point gives at some layers, in one forward pass that goes no further than the last of them."""
    torch = module("torch", "hf")
    lowest = 0 if hook == "residual" else 1
    for layer in layers:
        if not lowest <= layer <= len(network.blocks):
            raise Refused("data.model.layer", layer, f"{lowest} to {len(network.blocks)}")
    caught: dict[int, Any] = {}

    def keep(layer: int, found: Any) -> None:
        caught[layer] = found
        if len(caught) == len(set(layers)):
            raise _Stop

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, args[0] if args and network.stream == 0 else kwargs.get("hidden_states", args[0] if args else None))

    def after(layer: int) -> Callable[..., None]:
        stream = network.stream if hook == "residual" else 0
        return lambda module, args, output: keep(layer, _tensor(output, stream))

    handles = []
    try:
        for layer in layers:
            if layer == 0:
                handles.append(network.blocks[0].register_forward_pre_hook(before, with_kwargs=True))
            else:
                block = network.blocks[layer - 1]
                watched = block if hook == "residual" else _submodule(block, hook)
                handles.append(watched.register_forward_hook(after(layer)))
        with torch.no_grad():  # inference mode is not for tensors that JAX traces
            network.run(**given)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught


def flat(x: Any) -> Any:
    """(B, T, d), feature maps (B, d, H, W), or what has left padding out itself, as rows of d."""
    return (x.transpose(0, 2, 3, 1) if x.ndim == 4 else x).reshape(-1, x.shape[1 if x.ndim == 4 else -1])


def computed(network: Network, batch: Batch, layers: Collection[int], hook: str) -> dict[int, np.ndarray]:
    """`streams` of one batch, where torch has the model."""
    device = next(iter(network.blocks[0].parameters())).device
    found = streams(network, {key: x.to(device) for key, x in batch.inputs.items()}, layers, hook)
    return {layer: x.float().cpu().numpy() for layer, x in found.items()}
