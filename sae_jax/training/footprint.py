"""What a run takes of memory, known before anything is allocated."""

from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.autoencoder import topk
from sae_jax.runtime import memory
from sae_jax.runtime.devices import Devices
from sae_jax.training import step as step_lib

# In units of all parameters: the state (they and two moments), a gradient, and where the device is the machine's own
# processor the copy of the state that a checkpoint is written from while training goes on.
STATE, GRADIENT, SAVED = 3, 1, 3
SCORES = 3  # arrays of the size of the pre-activations at a time: they and what is chosen from
DENSE_SCORES = 9  # the same where activations are dense: most, 8.5, of JumpReLU with balance; measured
READ_AHEAD = 10  # batches read, stacked and on their way to the device
LINE = 5000  # bytes of a feature in the table of fates and in the pictures, at the end; measured


def check(groups: list[step_lib.Group], d_model: int, config: ConfigDict, devices: Devices) -> None:
    """Refuses what cannot be trained in the memory there is: parameters, gradients and moments of every member, the
    checkpoint that is being written, batches, and the pre-activations of the group with the most of them."""
    dense = [group.static.activation != "topk" or bool(group.static.sparsity.groups) for group in groups]
    laid, largest = devices.memories(), max(group.static.n_features for group in groups)

    def need(n: int, batch: int, held_out: int) -> float:
        sizes = [(len(group.names), group.static.n_features * n / largest) for group in groups]  # others in proportion
        weights = [4 * (2 * d_model + 1) * members * features for members, features in sizes]
        kept = (STATE * sum(weights) + GRADIENT * max(weights)) * laid.copies / laid.parts
        saved = SAVED * sum(weights) / laid.parts if laid.is_host else 0
        rows = [rows / laid.batch_parts for rows in (batch, held_out)]
        at_a_time = [topk.rows_at_a_time(r, round(n), d_model) if laid.is_host else r for r in rows]
        most = (DENSE_SCORES * max(rows), SCORES * max(at_a_time))  # of a group that is dense, and of another
        scores = max(4 * most[not own] * members * features / laid.parts
                     for own, (members, features) in zip(dense, sizes, strict=True))  # fmt: skip
        batches = 4 * d_model * (batch * (READ_AHEAD + config.train.steps_per_dispatch) + held_out) / laid.batch_parts
        during = kept + saved + scores + batches
        # At the end the first state is made once more, to be compared with.
        lines = LINE * sum(members * features for members, features in sizes) if laid.is_host else 0
        return max(during, 2 * STATE * sum(weights) * laid.copies / laid.parts + lines)

    n_saes, batch, held_out = sum(len(group.names) for group in groups), config.train.batch_size, config.eval.batch_size
    memory.check(
        f"parameters, gradients and moments of {n_saes} SAEs of width {d_model}, with batches and pre-activations,",
        memory.Choice("sae.n_features", largest, lambda n: need(n, batch, held_out)),
        memory.Choice("train.batch_size", batch, lambda rows: need(largest, rows, held_out)),
        memory.Choice("eval.batch_size", held_out, lambda rows: need(largest, batch, rows)),
    )


def check_run(config: ConfigDict, d_model: int) -> None:
    """The same for a configuration, on the devices that it asks for."""
    devices = Devices(config.train.devices, **config_lib.mesh(config))
    check(step_lib.group_members(config_lib.members(config), d_model), d_model, config, devices)
