"""The only file that knows about devices: one program for one device (jit) or several (pmap, batch split over them)."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax import optimizer, training
from sae_jax import sae as sae_lib
from sae_jax.errors import Preempted, Refused, RunFailed
from sae_jax.objective import AllSum

DATA = "data"  # name of the axis over which batches are split


class Devices:
    """The local devices of this run and how a batch is laid over them.

    Args:
      count: local devices to use; 0 is all of them.
    """

    def __init__(self, count: int = 0):
        available = jax.local_devices()
        if count > len(available):
            raise Refused("train.devices", count, f"0 (all) to {len(available)}, the local devices of this process")
        self.local = available[: count or len(available)]
        self.count = len(self.local) * jax.process_count()
        self.pmapped = self.count > 1

    def check_batch(self, field: str, batch_size: int) -> None:
        """Refuses a batch that the devices cannot share equally."""
        if batch_size % self.count:
            raise Refused(field, batch_size, f"a multiple of the {self.count} devices")

    def compile(
        self, fn: Callable[..., Any], *, split: tuple[int | None, ...], donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """Compiles fn(allsum, device, *args), which must return the same values on every device.

        Args:
          fn: `allsum` adds pytrees up over the devices, `device` is the number of this one.
          split: for every argument the axis along which it is shared out, or None where all devices get the whole.
          donate: arguments whose buffers are given up.
        """
        if not self.pmapped:
            return jax.jit(
                lambda *args: fn(lambda tree: tree, jnp.zeros((), jnp.int32), *args), donate_argnums=donate
            )
        mapped = jax.pmap(
            partial(fn, _psum),
            axis_name=DATA,
            in_axes=(0, *split),
            out_axes=None,
            donate_argnums=tuple(1 + argument for argument in donate),
            devices=self._everywhere(),
        )
        numbers = jax.process_index() * len(self.local) + np.arange(len(self.local), dtype=np.int32)

        def call(*args: Any) -> Any:
            folded = [a if axis is None else self._fold(a, axis) for a, axis in zip(args, split, strict=True)]
            return mapped(numbers, *folded)

        return call

    def _everywhere(self) -> list[jax.Device]:
        """The devices of this run in all processes, which use equally many each."""
        found: dict[int, list[jax.Device]] = {}
        for device in jax.devices():
            found.setdefault(device.process_index, []).append(device)
        return [device for own in found.values() for device in own[: len(self.local)]]

    def shared(self, tree: Any) -> Any:
        """The same values as arrays that all processes own together: what a checkpoint of a pod is made of."""
        if jax.process_count() == 1:
            return tree
        everywhere = NamedSharding(Mesh(np.asarray(jax.devices()), (DATA,)), PartitionSpec())

        def one(leaf: jax.Array) -> jax.Array:
            values = np.asarray(leaf)
            return jax.make_array_from_callback(values.shape, everywhere, lambda index: values[index])

        return jax.tree.map(one, tree)

    def own(self, tree: Any) -> Any:
        """`shared` undone: this process's copy."""
        return tree if jax.process_count() == 1 else jax.tree.map(lambda a: jnp.asarray(a.addressable_data(0)), tree)

    def _fold(self, array: np.ndarray, axis: int) -> np.ndarray:
        """(…, B, …) → (…, devices, B / devices, …)."""
        n = len(self.local)
        return array.reshape(*array.shape[:axis], n, array.shape[axis] // n, *array.shape[axis + 1 :])


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
        os._exit(code)


_psum: AllSum = lambda tree: jax.lax.psum(tree, DATA)  # noqa: E731


# -- a mesh of members × batch × features ----------------------------------------------------------------------------

FEATURE = "feature"  # name of the axis over which a dictionary is split


def make_mesh(devices: Any, *, member: int = 1, data: int = 1, feature: int = 1) -> Mesh:
    """member × data × feature devices, in that order; collectives over features, the most frequent, on neighbours."""
    return Mesh(np.asarray(devices).reshape(member, data, feature), (sae_lib.MEMBER, DATA, FEATURE))


def layout(mesh: Mesh, state: training.TrainState) -> training.TrainState:
    """How a group's state (leading axis: members) lies on a mesh: the NamedSharding of every leaf."""
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((sae_lib.MEMBER,), (sae_lib.MEMBER, FEATURE)))
    sae = state.sae.replace(W_enc=rows, b_enc=rows, W_dec=rows, b_dec=whole)
    hyper = jax.tree.map(lambda _: whole, state.hyper)
    return training.TrainState(whole, sae, optimizer.Moments(sae, sae), rows, hyper)


def mesh_step(mesh: Mesh, static: training.Static, like: training.TrainState) -> Callable[..., Any]:
    """`training.group_step` on a mesh, compiled: (state, x (B, d)) → (state, metrics), the state's buffers given up.

    Each device keeps its members, its rows of the batch and its features. Over `feature` go the k candidates a token of
    every shard and one (B, d) sum, never pre-activations; over `data` the gradients of a device's own features.
    """
    shardings = layout(mesh, like)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    allsum = _psum if mesh.shape[DATA] > 1 else lambda tree: tree
    step = partial(
        training.group_step, static=static, allsum=allsum, shards=FEATURE if mesh.shape[FEATURE] > 1 else None
    )
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, PartitionSpec(DATA)), out_specs=(specs, PartitionSpec(sae_lib.MEMBER)),
        check_vma=False,
    )  # fmt: skip
    x = NamedSharding(mesh, PartitionSpec(DATA))
    metrics = NamedSharding(mesh, PartitionSpec(sae_lib.MEMBER))
    return jax.jit(mapped, in_shardings=(shardings, x), out_shardings=(shardings, metrics), donate_argnums=0)
