"""Compiles the real training step for TPU pods that are not here, and reads its cost from the compiled program.

    pip install -e ".[tpu]"
    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python -m experiments.speed.compile_for_tpu

libtpu compiles ahead of time for a described topology, with no TPU present. For every chip, way of mapping (pmap; mesh
of data × feature) and n: FLOPs, bytes, memory a chip and collectives by kind and size, as XLA gives them, and a
roofline: the step takes at least the largest of FLOPs / peak, bytes / memory bandwidth and bytes sent / link bandwidth.
Nothing is run, so times are bounds, not measurements; what a sort, a gather or a scatter takes is not in them. The step
is one branch while AuxK finds nothing dead, others by how much is dead; the numbers of XLA are those of the dearest, so
`asleep` is the step compiled without AuxK. With train.precision float32 a product takes six passes of the matrix unit,
which FLOPs here do not count but the roofline does. About ten minutes on 2 CPU cores.

Mode `model` is a language model and the step as one program (extras bundled and torchax): Gemma 3 270M up to layer 9 on
every chip, with 8 sequences of 256 tokens each, and behind it an SAE of d 640 spread over the mesh.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import command
from sae_jax.config import base
from sae_jax.runtime import devices as devices_lib
from sae_jax.training import step as step_lib

OUT = flags.DEFINE_string("out", "experiments/speed/compile_for_tpu.csv", "results")
ONLY = flags.DEFINE_string("only", "", "cases: part of a topology or a mode, as v5e:2x4 or model")
WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}  # bytes
COLUMNS = (
    "fits", "memory_gb", "gflops", "gbytes", "collectives_mb", "roofline_ms", "bound_by", "tokens_per_s",
)  # fmt: skip
D, K, TOKENS = 4096, 64, 2048  # width, kept entries, tokens a chip of the data axis
SEQUENCES = 8  # a chip, where a language model comes first


class Chip(NamedTuple):
    """Peak of one chip, from its vendor's data sheet."""

    flops: float  # bfloat16; a float32 product is made of six
    memory: float  # bytes/s
    links: float  # bytes/s in and out, all links together
    capacity: float  # bytes


CHIPS = {
    "v4": Chip(137.5e12, 0.6e12, 150e9, 16e9),  # one of its two cores, which are devices of their own here
    "v5e": Chip(197e12, 0.82e12, 200e9, 16e9),
}


class Compiled(NamedTuple):
    """What XLA says of one program, for one chip."""

    flops: float
    bytes: float
    memory: float
    sent: dict[str, float]  # collective → bytes that a chip gives or takes


class Case(NamedTuple):
    """One program: the first columns of the table."""

    topology: str
    mode: str
    data: int
    feature: int
    n: int
    auxk: str  # awake | asleep
    precision: str = "bfloat16"  # train.precision


def build(case: Case) -> Any:
    """The training step of one SAE, compiled; the batch grows with the chips of the data axis."""
    name, mode, data, feature, n, auxk, precision = case
    topology = topologies.get_topology_desc(name, platform="tpu")
    config = base()
    config.sae.n_features, config.sae.k, config.data.signal = n, K, "gaussian"
    config.train.precision = precision
    config.auxk.preset = config.auxk.preset if auxk == "awake" else "none"
    static = step_lib.Static.of(config)
    state = jax.eval_shape(lambda: step_lib.init_group([config], jnp.zeros((1, D), jnp.float32)))
    if mode == "pmap":
        step = jax.pmap(
            lambda s, x: step_lib.group_step(s, x, static=static, allsum=lambda tree: jax.lax.psum(tree, "data")),
            axis_name="data", in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=topology.devices,
        )  # fmt: skip
        return step.lower(state, jax.ShapeDtypeStruct((data, TOKENS, D), jnp.float32)).compile()
    mesh = devices_lib.make_mesh(topology.devices, data=data, feature=feature)
    if mode == "model":
        return behind_a_model(mesh, config)
    x = jax.ShapeDtypeStruct((data * TOKENS, D), jnp.float32)
    on_mesh: Any = devices_lib.mesh_step(mesh, partial(step_lib.group_step, static=static), state)
    return on_mesh.lower(state, x).compile()


def behind_a_model(mesh: jax.sharding.Mesh, config: ConfigDict) -> Any:
    """Token ids in, the SAE's next state out: activations lie where they were computed, then where the SAE's step has
    its rows of the batch."""
    from sae_jax.models import adapters, hooks, on_jax

    model, length = config.data.model, TOKENS // SEQUENCES
    model.id, model.layer = "gemma-3-270m", 9
    network = adapters.load(model)
    static = step_lib.Static.of(config)
    state = jax.eval_shape(lambda: step_lib.init_group([config], jnp.zeros((1, network.width), jnp.float32)))
    step = devices_lib.mesh_step(mesh, partial(step_lib.group_step, static=static), state)
    forward = on_jax.function(network, [model.layer])

    def whole(state: Any, weights: Any, ids: Any) -> Any:
        return step(state, hooks.flat(forward(weights, {"input_ids": ids})[model.layer]))

    everywhere = NamedSharding(mesh, PartitionSpec())
    weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
                           on_jax.weights(network))  # fmt: skip
    ids = jax.ShapeDtypeStruct((mesh.size * SEQUENCES, length), jnp.int32,
                               sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))  # fmt: skip
    laid = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state,
                        devices_lib.layout(mesh, state))  # fmt: skip
    return jax.jit(whole, donate_argnums=0).lower(laid, weights, ids).compile()


def cost(compiled: Any) -> Compiled:
    """FLOPs, bytes, memory and collectives of one chip's program."""
    found, memory = compiled.cost_analysis(), compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    sent: dict[str, float] = {}
    pattern = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for shapes, kind in re.findall(pattern, compiled.as_text()):
        size = sum(
            WIDTHS[dtype] * np.prod([int(i) for i in dims.split(",") if i])
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        # A ring sends every byte of an all-reduce about twice, of the others once.
        sent[kind] = sent.get(kind, 0.0) + float(size) * (2 if kind == "all-reduce" else 1)
    return Compiled(found["flops"], found["bytes accessed"], held - memory.alias_size_in_bytes, sent)


def cases() -> list[Case]:
    """In the order of the table."""
    awake, asleep, exact = "awake", "asleep", "float32"
    found = [Case("v5e:2x4", "pmap", 8, 1, n * 2**14, awake) for n in (1, 4, 6, 7)]
    found += [Case("v5e:2x4", "pmap", 8, 1, 2**14, asleep), Case("v5e:2x4", "mesh", 1, 8, 2**17, awake)]
    for shape, data in (("2x4", 1), ("4x4", 2), ("8x8", 8), ("16x16", 32)):
        found.append(Case(f"v5e:{shape}", "mesh", data, 8, 2**17, asleep))
    found += [Case("v5e:16x16", "mesh", 32, 8, 2**17, awake), Case("v5e:16x16", "mesh", 16, 16, 2**17, asleep)]
    found += [Case("v5e:16x16", "mesh", 256 // f, f, 2**18, awake) for f in (8, 16)]
    found.append(Case("v5e:4x4", "mesh", 1, 16, 2**18, awake))
    found += [Case("v5e:4x4", "model", 16 // f, f, n, awake) for f, n in ((1, 2**14), (8, 2**17))]
    found.append(Case("v4:2x2x1", "mesh", 1, 8, 2**17, asleep))
    return [
        *found,
        Case("v5e:2x4", "pmap", 8, 1, 6 * 2**14, awake, exact),
        Case("v5e:2x4", "pmap", 8, 1, 2**14, asleep, exact),
        Case("v5e:8x8", "mesh", 8, 8, 2**17, asleep, exact),
    ]


def measured(case: Case) -> str:
    """The other columns of the table."""
    chip = CHIPS[case.topology.split(":")[0]]
    try:
        found = cost(build(case))
    except jax.errors.JaxRuntimeError as error:  # out of memory, refused by the compiler itself
        used = re.search(r"\(([\d.]+)G\) exceeds", str(error))
        if used is None:
            raise
        return f"no,{float(used.group(1)) * 2**30 / 1e9:.2f},,,,,,"
    sent = sum(found.sent.values())
    flops = found.flops * (6 if case.precision == "float32" else 1)
    bounds = {"compute": flops / chip.flops, "memory": found.bytes / chip.memory, "links": sent / chip.links}
    worst = max(bounds, key=bounds.__getitem__)
    kinds = " ".join(f"{kind}:{size / 1e6:.1f}" for kind, size in sorted(found.sent.items()))
    shares = case.data * (case.feature if case.mode == "model" else 1)
    fits = "yes" if found.memory < chip.capacity else "no"
    return (
        f"{fits},{found.memory / 1e9:.2f},{found.flops / 1e9:.0f},{found.bytes / 1e9:.1f},{kinds},"
        f"{1e3 * bounds[worst]:.2f},{worst},{shares * TOKENS / bounds[worst]:.0f}"
    )


def main() -> None:
    """One line a case, as it comes; every one compiled anew, as rows of an older step would look the same."""
    rows = [",".join((*Case._fields, *COLUMNS))]
    for case in cases():
        if ONLY.value in f"{case.topology} {case.mode}":
            rows.append(",".join(map(str, case)) + "," + measured(case))
            print(rows[-1], flush=True)
            Path(OUT.value).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
