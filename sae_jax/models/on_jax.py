"""A torch model as a function of JAX: its own modules, traced by torchax, compiled for the devices of the SAE."""

import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sae_jax.errors import Refused, first_line
from sae_jax.models import hooks
from sae_jax.models.network import Batch, Network
from sae_jax.runtime.optional import module

EXTRA = "torchax"
SHORTEST = 16  # positions that sequences are padded to at least, and to powers of two beyond: a program for each length


def moved(network: Network, model: ConfigDict) -> Network:
    """The network with its forward pass in JAX, its weights placed once on every device, batches spread over them.

    Raises:
      Refused: torchax is missing; from the first batch on also that it cannot trace this model.
    """
    torchax, torch = module("torchax", EXTRA), module("torch", EXTRA)
    jax_view = module("torchax.interop", EXTRA).jax_view
    tensors = {**dict(network.run.named_parameters()), **dict(network.run.named_buffers())}
    mesh = Mesh(np.array(jax.local_devices()), ("batch",))
    everywhere, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    weights = {key: jax.device_put(_array(x), everywhere) for key, x in tensors.items()}
    programs: dict[Any, Any] = {}  # compiled, by what they give and the shapes of what they take

    def traced(layers: tuple[int, ...], hook: str, given: dict[str, jax.Array]) -> Any:
        def streams(weights: dict[str, Any], given: dict[str, Any]) -> dict[int, Any]:
            run = partial(torch.func.functional_call, network.run, weights, ())
            return hooks.streams(network._replace(run=lambda **given: run(given)), given, layers, hook)

        try:
            with torchax.default_env(), torch.device("jax"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")  # 32 bits are enough
                with jax.default_matmul_precision("highest"):
                    return jax.jit(jax_view(streams)).lower(weights, given)
        except Refused:
            raise
        except Exception as error:  # torchax, torch, transformers and JAX each have their own
            what = f"torch: torchax cannot trace {model.id} ({type(error).__name__}: {first_line(error)})"
            raise Refused("data.model.backend", "jax", what) from error

    def compute(batch: Batch, layers: Collection[int], hook: str) -> dict[int, np.ndarray]:
        padded, cut = _padded(batch, -(-model.batch_size // mesh.size) * mesh.size)
        given = jax.device_put(padded, spread)
        key = (tuple(sorted(layers)), hook, *((name, x.shape) for name, x in given.items()))
        if key not in programs:
            programs[key] = traced(*key[:2], given).compile()
        return {layer: cut(np.asarray(x, np.float32)) for layer, x in programs[key](weights, given).items()}

    return network._replace(compute=compute)


def _array(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.detach().cpu().numpy()
    return found


def _padded(batch: Batch, size: int) -> tuple[dict[str, np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """The inputs as `size` sequences, longer ones where lengths differ; and what cuts off of a layer what was added.

    A sequence more is the last once again: one of nothing but padding has no softmax.
    """
    rows, length = batch.real.shape
    even = batch.real.all() and not any(x.dtype == bool for x in map(_array, batch.inputs.values()))
    longer = 0 if even else max(SHORTEST, 1 << (length - 1).bit_length()) - length
    given = {}
    for key, tensor in batch.inputs.items():
        x = _array(tensor)
        if x.shape == (rows, length):
            x = np.pad(x, ((0, 0), (0, longer)))
        given[key] = np.pad(x, ((0, size - rows), *((0, 0),) * (x.ndim - 1)), mode="edge")
    return given, lambda found: found[:rows, :length] if longer else found[:rows]
