"""Compiles the real training step for TPU pods that are not here, and reads its cost from the compiled program.

    pip install -e ".[tpu]"
    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python experiments/compile_for_tpu.py --out=experiments/compile_for_tpu.csv

libtpu compiles ahead of time for a described topology, with no TPU present. For every chip, way of mapping (pmap; mesh
of data × feature) and n: FLOPs, bytes, memory a chip and collectives by kind and size, as XLA gives them, and a
roofline: the step takes at least the largest of FLOPs / peak, bytes / memory bandwidth and bytes sent / link bandwidth.
Nothing is run, so times are bounds, not measurements. About 10 minutes on 2 CPU cores.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from sae_jax import parallel, training
from sae_jax.config import base

OUT = flags.DEFINE_string("out", "experiments/compile_for_tpu.csv", "results")
ONLY = flags.DEFINE_string("only", "", "a case: its topology, as v5e:2x4")
WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}  # bytes
D, K, TOKENS = 4096, 64, 2048  # width, kept entries, tokens a chip of the data axis


class Chip(NamedTuple):
    """Peak of one chip, from its vendor's data sheet."""

    flops: float  # bfloat16, which float32 matmuls at default precision use
    memory: float  # bytes/s
    links: float  # bytes/s in and out, all links together
    capacity: float  # bytes


CHIPS = {
    "v4": Chip(275e12, 1.2e12, 300e9, 32e9),
    "v5e": Chip(197e12, 0.82e12, 200e9, 16e9),
    "v5p": Chip(459e12, 2.77e12, 600e9, 95e9),
}


class Compiled(NamedTuple):
    """What XLA says of one program, for one chip."""

    flops: float
    bytes: float
    memory: float
    sent: dict[str, float]  # collective → bytes that a chip gives or takes


def build(topology: Any, mode: str, n: int, data: int, feature: int) -> Any:
    """The training step of one SAE, compiled; the batch grows with the chips of the data axis."""
    config = base()
    config.sae.n_features, config.sae.k, config.data.signal = n, K, "gaussian"
    static = training.Static.of(config)
    state = jax.eval_shape(lambda: training.init_group([config], jnp.zeros((1, D), jnp.float32)))
    if mode == "pmap":
        step = jax.pmap(
            lambda s, x: training.group_step(s, x, static=static, allsum=lambda tree: jax.lax.psum(tree, "data")),
            axis_name="data", in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=topology.devices,
        )  # fmt: skip
        return step.lower(state, jax.ShapeDtypeStruct((data, TOKENS, D), jnp.float32)).compile()
    mesh = parallel.make_mesh(topology.devices, data=data, feature=feature)
    x = jax.ShapeDtypeStruct((data * TOKENS, D), jnp.float32)
    return parallel.mesh_step(mesh, static, state).lower(state, x).compile()


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


def cases() -> list[tuple[str, str, int, int, int]]:
    """(topology, mode, n, data, feature)."""
    sizes = [2**14, 2**15, 2**16, 2**17, 2**18]
    small = [("v5e:2x4", "pmap", n, 8, 1) for n in sorted([*sizes[:4], 5 * 2**14, 3 * 2**15])]
    small += [("v5e:2x4", "mesh", n, 1, 8) for n in sizes]
    wide = [("v5e:16x16", "pmap", n, 256, 1) for n in sizes[:2]]
    wide += [("v5e:16x16", "mesh", n, 256 // f, f) for n in sizes for f in (1, 8, 16) if n // f <= 2**15]
    scaling = [("v5e:4x4", "mesh", 2**17, 2, 8), ("v5e:8x8", "mesh", 2**17, 8, 8)]
    return small + wide + scaling + [("v4:2x2x2", "mesh", 2**17, 1, 8), ("v5p:2x2x2", "mesh", 2**17, 1, 8)]


def main(_: list[str]) -> None:
    """One line a case, as it comes."""
    rows = [
        "topology,mode,data,feature,n,fits,memory_gb,gflops,gbytes,collectives_mb,roofline_ms,bound_by,tokens_per_s"
    ]
    for name, mode, n, data, feature in cases():
        if ONLY.value not in name:
            continue
        chip = CHIPS[name.split(":")[0]]
        prefix = f"{name},{mode},{data},{feature},{n}"
        try:
            found = cost(build(topologies.get_topology_desc(name, platform="tpu"), mode, n, data, feature))
        except jax.errors.JaxRuntimeError as error:  # out of memory, refused by the compiler itself
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"Used ([\d.]+)G of", str(error))
            rows.append(f"{prefix},no,{used.group(1) if used else ''},,,,,,")
        else:
            sent = sum(found.sent.values())
            bounds = {
                "compute": found.flops / chip.flops, "memory": found.bytes / chip.memory, "links": sent / chip.links
            }  # fmt: skip
            worst = max(bounds, key=bounds.__getitem__)
            kinds = " ".join(f"{kind}:{size / 1e6:.1f}" for kind, size in sorted(found.sent.items()))
            rows.append(
                f"{prefix},{'yes' if found.memory < chip.capacity else 'no'},{found.memory / 1e9:.2f},"
                f"{found.flops / 1e9:.0f},{found.bytes / 1e9:.1f},{kinds},{1e3 * bounds[worst]:.2f},{worst},"
                f"{data * TOKENS / bounds[worst]:.0f}"
            )
        print(rows[-1], flush=True)
    with open(OUT.value, "w", encoding="utf-8") as file:
        file.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    app.run(main)
