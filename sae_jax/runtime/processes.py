"""Several processes that are one run: they start alike, stop in the same turn, and go on together or not at all."""

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax.errors import Preempted, Refused, RunFailed


def any_process(flag: bool) -> Any:
    """In how many devices' processes it is so: to be looked at later, as the others may not have come to it yet."""
    everywhere = Mesh(np.asarray(jax.devices()), ("device",))
    own = np.full(jax.local_device_count(), flag, np.int32)
    flags = jax.make_array_from_process_local_data(NamedSharding(everywhere, PartitionSpec("device")), own)
    return _total(NamedSharding(everywhere, PartitionSpec()))(flags)


@cache
def _total(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.sum, out_shardings=sharding)


def check_alike(field: str, what: str, value: Any) -> None:
    """Refuses processes of one run that differ in something of which all have to have the same; all ask together."""
    if jax.process_count() == 1:
        return
    devices = Counter(device.process_index for device in jax.devices()).values()
    if len(set(devices)) > 1:
        raise Refused("processes", f"{min(devices)} to {max(devices)} devices each", "equally many in all processes")
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    every = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (every != every[0]).any():
        other = int((every != every[0]).any(axis=1).argmax())
        raise Refused(field, f"processes 0 and {other} differ", f"one and the same {what} in all processes")


def of_the_first(found: dict[str, np.ndarray], field: str, what: str) -> dict[str, np.ndarray]:
    """What process 0 has found, to the bit; refused where others have found something else than rounding explains."""
    if jax.process_count() == 1:
        return found
    check_alike(field, what, {key: [str(x.dtype), *x.shape] for key, x in found.items()})
    as_bytes = {key: np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8) for key, x in found.items()}
    sent = {key: np.asarray(x, np.uint8) for key, x in multihost_utils.broadcast_one_to_all(as_bytes).items()}
    first = {key: np.frombuffer(sent[key].tobytes(), x.dtype).reshape(x.shape) for key, x in found.items()}
    alike = [
        np.allclose(x, first[key], rtol=1e-4, atol=1e-4 * np.nan_to_num(np.abs(x)).max(initial=0), equal_nan=True)
        for key, x in found.items()
    ]
    check_alike(field, what, all(alike))
    return first


def fetched(tree: Any) -> Any:
    """As NumPy arrays, whole, whichever devices of whichever processes hold the parts; all processes ask together."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            assert isinstance(leaf.sharding, NamedSharding)
            leaf = relaid(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def by_parts(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """fn(tree, *rest), like `tree` but perhaps of other widths: worked out on the host, by each process for its own
    part of arrays that are spread over devices, and spread as they are."""
    sharding = jax.tree.leaves(tree)[0].sharding
    if len(sharding.device_set) == 1:
        return fn(tree, *rest)
    done: dict[str, Any] = {}  # devices that share a batch have the same part
    placed = []
    for device in sorted(sharding.addressable_devices, key=lambda device: device.id):
        own = jax.tree.map(lambda a, at=device: next(s for s in a.addressable_shards if s.device == at), (tree, *rest))
        where = str([shard.index for shard in jax.tree.leaves(own)])
        if where not in done:
            done[where] = fn(*jax.tree.map(lambda shard: shard.data, own))
        placed.append(jax.device_put(done[where], device))

    def joined(before: jax.Array, *parts: jax.Array) -> jax.Array:
        assert isinstance(before.sharding, NamedSharding)
        n = len(before.sharding.spec)  # axes that may be spread
        shape = (*before.shape[:n], *parts[0].shape[n:])
        return jax.make_array_from_single_device_arrays(shape, before.sharding, list(parts))

    return jax.tree.map(joined, tree, *placed)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Several processes go on together or not at all: one that fails ends at once, and the others notice and follow.

    The ordinary way out, past open checkpoints and an interpreter that shuts down, waits for all processes to take
    leave of each other, and one that is gone never comes. To stop on request is no failure: all do so in the same turn.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Preempted) or not jax.distributed.is_initialized():
            raise
        if isinstance(error, Refused | RunFailed):
            message, code = str(error), error.exit_code
        elif isinstance(error, jax.errors.JaxRuntimeError):
            message, code = f"another process of this run has ended or cannot be reached, so all stop ({error})", 3
        else:
            traceback.print_exception(error)
            message, code = f"process {jax.process_index()} has failed, so all stop", 1
        print(f"sae_jax: {' '.join(message.split())}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if jax.process_index() == 0:
            time.sleep(2)  # it coordinates: once it has gone the others are ended, whatever they were about to say
        os._exit(code)


@cache
def relaid(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """What lays an array over devices so, from where it lies by now."""
    return jax.jit(lambda array: array, out_shardings=sharding)
