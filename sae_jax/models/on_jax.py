"""A torch model as a function of JAX: its own modules, traced by torchax, compiled for the devices of the SAE."""

import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sae_jax.errors import Refused, first_line, missing_extra
from sae_jax.models import hooks
from sae_jax.models.network import Batch, Network
from sae_jax.runtime import memory
from sae_jax.runtime.optional import module

EXTRA = "torchax"
SHORTEST = 16  # positions that sequences are padded to at least, and to powers of two beyond: a program for each length


def moved(network: Network, model: ConfigDict, devices: Sequence[jax.Device] = ()) -> Network:
    """The network with its forward pass in JAX, its weights placed once, batches spread over the devices.

    Every device has all weights; each a part of them where they would take more than half of its memory: XLA then
    brings together what a layer needs when it is its turn.

    Raises:
      Refused: torchax is missing; from the first batch on also that it cannot trace this model.
    """
    _torchax().default_env()  # made here: what it holds would else be part of the first program that is traced
    mesh = Mesh(np.array(list(devices) or jax.local_devices()), ("batch",))
    held, spread = weights(network, model.weights), NamedSharding(mesh, PartitionSpec("batch"))
    room = memory.available()
    too_large = room is not None and sum(x.nbytes for x in held.values()) > room / 2
    placed = {key: jax.device_put(x, _part(mesh, x.shape) if too_large else _whole(mesh)) for key, x in held.items()}
    programs: dict[Any, Any] = {}  # compiled, by what they give and the shapes of what they take

    def compute(batch: Batch, layers: Collection[int], hook: str) -> dict[int, jax.Array]:
        size = -(-model.batch_size // mesh.size) * mesh.size
        given = jax.device_put(_padded(batch, size, network.context, model.weights), spread)
        key = (tuple(sorted(layers)), hook, *((name, x.shape) for name, x in given.items()))
        if key not in programs:
            try:
                lowered = jax.jit(function(network, tuple(sorted(layers)), hook)).lower(placed, given)
                programs[key] = lowered.compile()
            except (Refused, MemoryError):
                raise
            except Exception as error:  # torchax, torch, transformers and JAX each have their own
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                what = f"torch: JAX cannot run {model.id} ({type(error).__name__}: {first_line(error)})"
                raise Refused("data.model.backend", "jax", what) from error
        found: dict[int, jax.Array] = programs[key](placed, given)
        return found

    return network._replace(compute=compute)


def function(network: Network, layers: Collection[int], hook: str = "residual") -> Callable[[Any, Any], dict[int, Any]]:
    """`hooks.streams` as a function of JAX, of `weights` and inputs by name; to be traced, not called as it is."""
    torchax, torch = _torchax(), module("torch", EXTRA)

    def streams(weights: dict[str, Any], given: dict[str, Any]) -> dict[int, Any]:
        run = partial(torch.func.functional_call, network.run, weights, ())
        return hooks.streams(network._replace(run=lambda **given: run(given)), given, layers, hook)

    def traced(weights: dict[str, Any], given: dict[str, Any]) -> dict[int, Any]:
        exact = jax.default_matmul_precision("highest")
        with torchax.default_env(), torch.device("jax"), exact, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")  # 32 bits are enough
            found: dict[int, Any] = torchax.interop.jax_view(streams)(weights, given)
        return {layer: x.astype(jnp.result_type(float)) for layer, x in found.items()}

    return traced


def weights(network: Network, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Parameters and buffers by name, on the host, of JAX's default precision; parameters in bfloat16 if asked for.

    Buffers stay as they are: angles of positions and running means would lose what they are there for.
    """
    held = {key: _array(x, dtype) for key, x in network.run.named_parameters()}
    return held | {key: _array(x) for key, x in network.run.named_buffers()}


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _part(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Along the first axis that the devices can share equally, or nowhere."""
    axis = next((i for i, size in enumerate(shape) if size % mesh.size == 0 and size), None)
    return _whole(mesh) if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, "batch"))


def _torchax() -> Any:
    try:
        module("torchax.interop", EXTRA)
        return module("torchax", EXTRA)
    except AttributeError as error:  # an older torchax asks torch for what is no longer there
        raise missing_extra("a torchax that goes with this torch", EXTRA) from error


def _array(tensor: Any, dtype: str = "float32") -> np.ndarray:
    tensor = tensor.detach().cpu()
    found: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    wanted = jnp.bfloat16 if dtype == "bfloat16" else jnp.result_type(float)
    return found.astype(wanted, copy=False) if found.dtype.kind == "f" else found


def _padded(batch: Batch, size: int, context: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The inputs as `size` sequences; where lengths differ (a `context`), as long as few programs take.

    A sequence more is the last once again: one of nothing but padding has no softmax.
    """
    rows, length = batch.real.shape
    longer = max(0, min(max(SHORTEST, 1 << (length - 1).bit_length()), context) - length)
    given = {}
    for key, tensor in batch.inputs.items():
        x = _array(tensor, dtype)
        if x.shape == (rows, length):
            x = np.pad(x, ((0, 0), (0, longer)))
        given[key] = np.pad(x, ((0, size - rows), *((0, 0),) * (x.ndim - 1)), mode="edge")
    return given
