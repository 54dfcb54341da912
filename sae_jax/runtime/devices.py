"""How work is laid over devices: one program for one (jit) or several (pmap, or a mesh).

Under pmap they share the batch, each with all the parameters. On a mesh they share members and features as well. What
several processes have is always a mesh: no process holds more of members and features than its own devices do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import FEATURE, MEMBERS, AllSum
from sae_jax.errors import Refused
from sae_jax.runtime.processes import relaid

DATA = "data"  # name of the axis over which a batch is split
WHOLE = PartitionSpec()  # the same on all devices
STEPS = PartitionSpec(None, sae_lib.MEMBER)  # of metrics, step by step
Out = Callable[..., Any]  # specs of the arguments → specs of what is returned


class Memories(NamedTuple):
    """What is in one memory."""

    is_host: bool  # the machine's own, in which checkpoints are copied too
    copies: int  # of everything
    parts: int  # memories over which members and features are shared out
    batch_parts: int  # memories over which a batch is shared out


class Part(NamedTuple):
    """Which part of every batch a process reads. Those whose devices need the same rows read the same part."""

    number: int
    of: int

    def rows(self, batch_size: int) -> slice:
        """Its rows of a batch."""
        share = batch_size // self.of
        return slice(self.number * share, (self.number + 1) * share)


def own_part() -> Part:
    """Where every process reads a part of its own."""
    return Part(jax.process_index(), jax.process_count())


class Devices:
    """The devices of this run and how its work is laid over them.

    Args:
      count: local devices to use; 0 is all of them.
      member, feature: over how many the members and the features are spread; the batch is shared by what is left.

    Attributes:
      part: what this process reads of a batch.
    """

    def __init__(self, count: int = 0, member: int = 1, feature: int = 1):
        available = jax.local_devices()
        if count > len(available):
            raise Refused("train.devices", count, f"0 (all) to {len(available)}, the local devices of this process")
        self.local = available[: count or len(available)]
        self.count = len(self.local) * jax.process_count()
        self.shares, rest = divmod(self.count, member * feature)  # parts of a batch
        self.shards = FEATURE if feature > 1 else None  # the axis over which features are split, where they are
        self._mesh: Mesh | None = None
        self.part = own_part()
        if member * feature > 1 or jax.process_count() > 1:
            asked = f"member={member},feature={feature}"
            if rest:
                raise Refused("train.mesh", asked, f"numbers whose product divides the {self.count} devices")
            self._mesh = make_mesh(self._everywhere(), member=member, data=self.shares, feature=feature)
            self.part = _part(self._mesh, asked)

    def check_batch(self, field: str, batch_size: int) -> None:
        """Refuses a batch that the devices cannot share equally."""
        if batch_size % self.shares:
            raise Refused(field, batch_size, f"a multiple of {self.shares}, the devices that share it")

    def check_groups(self, groups: list[list[str]]) -> None:
        """Refuses members that the devices cannot share equally, given the names of those that are one program."""
        member = self._mesh.shape[sae_lib.MEMBER] if self._mesh else 1
        for names in groups:
            if len(names) % member:
                alike = f"{len(names)} ({', '.join(names)}) are one program"
                raise Refused("train.mesh", f"member={member}", f"a number that divides members of a program: {alike}")

    def memories(self) -> "Memories":
        """How a run is laid over memories."""
        is_host = self.local[0].platform == "cpu"  # processors that are called several devices have one
        if is_host:
            return Memories(is_host, self.shares, jax.process_count() if self._mesh else 1, 1)
        return Memories(is_host, 1, self.count // self.shares, self.shares)

    def compile(
        self, fn: Callable[..., Any], *, split: tuple[int | None, ...], donate: tuple[int, ...] = (),
        out: Out = lambda *_: WHOLE,
    ) -> Callable[..., Any]:  # fmt: skip
        """Compiles fn(allsum, device, *args), which must return the same values on every device that shares a batch.

        Args:
          fn: `allsum` adds pytrees up over the devices that share a batch, `device` is the number of this one of them.
          split: for every argument the axis along which it is shared out, or None where all devices get the whole; of
            what has a `spread` each gets its members and features.
          donate: arguments whose buffers are given up.
          out: how what is returned lies on a mesh.
        """
        if self._mesh is not None:
            return self._meshed(self._mesh, fn, split, donate, out)
        if self.count == 1:
            return jax.jit(
                lambda *args: fn(lambda tree: tree, jnp.zeros((), jnp.int32), *args), donate_argnums=donate
            )
        mapped = jax.pmap(
            partial(fn, _psum),
            axis_name=DATA,
            in_axes=(0, *split),
            out_axes=None,
            donate_argnums=tuple(1 + argument for argument in donate),
            devices=self.local,
        )
        numbers = np.arange(len(self.local), dtype=np.int32)

        def call(*args: Any) -> Any:
            folded = [a if axis is None else self._fold(a, axis) for a, axis in zip(args, split, strict=True)]
            return mapped(numbers, *folded)

        return call

    def _meshed(
        self, mesh: Mesh, fn: Callable[..., Any], split: tuple[int | None, ...], donate: tuple[int, ...], out: Out
    ) -> Callable[..., Any]:
        compiled: list[Callable[..., Any]] = []  # on the first call, which shows how members are grouped

        def call(*args: Any) -> Any:
            specs = tuple(
                _specs(a) if axis is None else PartitionSpec(*[None] * axis, DATA)
                for a, axis in zip(args, split, strict=True)
            )
            if not compiled:
                each = lambda *args: fn(_allsum(mesh), jax.lax.axis_index(DATA), *args)  # noqa: E731
                compiled.append(_over(mesh, each, specs, out(*specs), donate))
            laid = []
            for spec, axis, arg in zip(specs, split, args, strict=True):
                lay = partial(_laid, axis=axis, part=self.part)
                laid.append(jax.tree.map(lambda s, a, lay=lay: jax.tree.map(partial(lay, s), a), _on(mesh, spec), arg))
            return compiled[0](*laid)

        return call

    def allmax(self, tree: Any) -> Any:
        """The largest over the devices that share a batch, inside of what `compile` compiles."""
        return jax.lax.pmax(tree, DATA) if self.shares > 1 else tree

    def made(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, each device making its own members and features: no one could hold all."""
        if self._mesh is None:
            return make()
        return jax.jit(make, out_shardings=_on(self._mesh, _specs(jax.eval_shape(make))))()

    def _everywhere(self) -> list[jax.Device]:
        """The devices of this run in all processes, which use equally many each."""
        found: dict[int, list[jax.Device]] = {}
        for device in jax.devices():
            found.setdefault(device.process_index, []).append(device)
        return [device for own in found.values() for device in own[: len(self.local)]]

    def _fold(self, array: np.ndarray, axis: int) -> np.ndarray:
        """(…, B, …) → (…, devices, B / devices, …)."""
        n = len(self.local)
        return array.reshape(*array.shape[:axis], n, array.shape[axis] // n, *array.shape[axis + 1 :])


def _part(mesh: Mesh, asked: str) -> Part:
    """What this process reads of a batch: the rows of its devices' places along the data axis."""
    places: dict[int, set[int]] = {}
    for (_, data, _), device in np.ndenumerate(mesh.devices):
        places.setdefault(device.process_index, set()).add(data)
    size = len(places[0])
    if any(own != set(range(min(own) // size * size, min(own) // size * size + size)) for own in places.values()):
        hosts = f"{len(places)} processes of {mesh.size // len(places)} devices each"
        raise Refused("train.mesh", asked, f"numbers that divide the devices of a process, or are multiples: {hosts}")
    return Part(min(places[jax.process_index()]) // size, mesh.shape[DATA] // size)


_psum: AllSum = lambda tree: jax.lax.psum(tree, DATA)  # noqa: E731


# -- a mesh of members × batch × features ----------------------------------------------------------------------------

def make_mesh(devices: Any, *, member: int = 1, data: int = 1, feature: int = 1) -> Mesh:
    """member × data × feature devices, in that order; collectives over features, the most frequent, on neighbours."""
    return Mesh(np.asarray(devices).reshape(member, data, feature), (sae_lib.MEMBER, DATA, FEATURE))


def layout(mesh: Mesh, state: Any) -> Any:
    """How a group's state (leading axis: members) lies on a mesh: the NamedSharding of every leaf."""
    return _on(mesh, _specs(state))


def mesh_step(mesh: Mesh, step: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """A group's step on a mesh, compiled: (state, x (B, d)) → (state, metrics), the state's buffers given up.

    `step` takes state and x, `allsum` and `shards`, as `training.step.group_step` does; `like` is a state.

    Each device keeps its members, its rows of the batch and its features. Over `feature` go the k candidates a token of
    every shard and one (B, d) sum, never pre-activations; over `data` the gradients of a device's own features.
    """
    laid = partial(step, allsum=_allsum(mesh), shards=FEATURE if mesh.shape[FEATURE] > 1 else None)
    return _over(mesh, laid, (_specs(like), PartitionSpec(DATA)), (_specs(like), MEMBERS), donate=(0,))


def _specs(tree: Any) -> Any:
    """What has a `spread` (states and SAEs of groups) by members and features, everything else whole."""

    def laid_out(node: Any) -> bool:
        return hasattr(node, "spread")

    return jax.tree.map(lambda node: node.spread() if laid_out(node) else WHOLE, tree, is_leaf=laid_out)


def _on(mesh: Mesh, specs: Any) -> Any:
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def _laid(sharding: NamedSharding, array: Any, axis: int | None, part: Part) -> jax.Array:
    """The array so laid over the devices. From several to several it goes by a program: `device_put` reads it first.

    Of what is shared out along `axis` each process has its part; of other arrays all have the whole.
    """
    on_devices = isinstance(array, jax.Array)
    here = sharding.is_fully_addressable
    if on_devices and len(array.sharding.device_set) > 1 and array.is_fully_addressable == here:
        return array if array.sharding == sharding else relaid(sharding)(array)
    if here:
        return jax.device_put(array, sharding)
    shape, before = list(np.shape(array)), 0
    if axis is not None:
        before = part.number * shape[axis]
        shape[axis] *= part.of
    if not on_devices:
        return jax.make_array_from_process_local_data(sharding, np.asarray(array), tuple(shape))
    placed = []  # device to device: what a model has computed here does not go by the host
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        assert index is not None
        own = [slice(s.start and s.start - before, s.stop and s.stop - before) if i == axis else s
               for i, s in enumerate(index)]  # fmt: skip
        placed.append(jax.device_put(array[tuple(own)], device))
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, placed)


def _over(mesh: Mesh, fn: Callable[..., Any], ins: Any, outs: Any, donate: tuple[int, ...]) -> Callable[..., Any]:
    """fn on every device of the mesh, compiled."""
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    return jax.jit(mapped, in_shardings=_on(mesh, ins), out_shardings=_on(mesh, outs), donate_argnums=donate)


def _allsum(mesh: Mesh) -> AllSum:
    return _psum if mesh.shape[DATA] > 1 else lambda tree: tree
