"""TrainState and the pure training step: no I/O, no data, no device in here."""

from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.autoencoder import balance, death, dense, kept, objective, optimizer, topk
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import SAE, AllSum
from sae_jax.outliers.preprocess import Preprocessing, fold
from sae_jax.runtime import processes


class Static(NamedTuple):
    """What fixes the compiled program; members that agree on it train as one vmapped group."""

    n_features: int
    k: int
    unit_decoder: bool
    whiten: bool
    balance: bool
    preset: str
    steps: int
    warmup_steps: int
    decay_fraction: float
    beta1: float
    beta2: float
    clip_norm: float
    precision: str
    activation: str
    init_norm: float
    threshold: float
    sparsity: objective.Sparsity
    sparsity_warmup: int

    @classmethod
    def of(cls, config: ConfigDict) -> "Static":
        """The static part of one member's configuration."""
        s, t = config.sae, config.train
        bandwidth, threshold = (config_lib.of_penalty(config, field) for field in ("bandwidth", "threshold"))
        sparsity = objective.Sparsity(
            config.sparsity.preset, config.sparsity.target_l0, bandwidth, dense.groups_of(config.sae.groups)
        )
        return cls(
            s.n_features, s.k, s.unit_decoder, s.whiten, s.balance, config.auxk.preset, t.steps, t.warmup_steps,
            t.decay_fraction, t.beta1, t.beta2, t.clip_norm, t.precision, s.activation, s.init_norm,
            threshold, sparsity, config.sparsity.warmup_steps,
        )  # fmt: skip


class Hyper(struct.PyTreeNode):
    """What may differ within a group: arrays, so that one program serves all members."""

    learning_rate: Any  # ()
    learn_bias: Any  # () bool
    auxk_weight: Any  # ()
    dead_after_tokens: Any  # () int32
    before: Any = None  # Preprocessing that is this member's own; None where it sees the tokens that all share


class PenalisedHyper(Hyper):
    """Of SAEs with a penalty; a class of its own, so that checkpoints of all others stay readable."""

    sparsity_weight: Any = None  # ()


class TrainState(struct.PyTreeNode):
    """Every mutable fact of training one SAE. Data and randomness follow from the step and the seed."""

    step: Any  # () int32
    sae: SAE
    moments: optimizer.Moments
    tokens_since_fired: Any  # (n,) int32
    hyper: Hyper

    def spread(self) -> Self:
        """How a group's state may be spread over devices: the leading axes of every leaf, by name."""
        sae, one = self.sae.spread(), sae_lib.MEMBERS
        hyper = jax.tree.map(lambda _: one, self.hyper)
        moments = optimizer.Moments(sae, sae)
        return self.replace(step=one, sae=sae, moments=moments, tokens_since_fired=sae_lib.FEATURES, hyper=hyper)


class BalancedState(TrainState):
    """With balanced selection; a class of its own, so that checkpoints of all others stay readable."""

    beta: Any = None  # (n,), see `balance`

    def spread(self) -> Self:
        """As above."""
        return super().spread().replace(beta=sae_lib.FEATURES)


def hyper(config: ConfigDict) -> Hyper:
    """The varying part of one member's configuration."""
    found: dict[str, Any] = {
        "learning_rate": jnp.asarray(config.train.learning_rate, float),
        "learn_bias": jnp.asarray(not config.sae.freeze_bias),
        "auxk_weight": jnp.asarray(config_lib.auxk_weight(config), float),
        "dead_after_tokens": jnp.asarray(config_lib.dead_after_tokens(config), jnp.int32),
    }
    if config.sparsity.preset == "none":
        return Hyper(**found)
    return PenalisedHyper(**found, sparsity_weight=jnp.asarray(config_lib.of_penalty(config, "weight"), float))


def schedule(static: Static, step: Int[Array, ""]) -> Float[Array, ""]:
    """Warm-up, constant, decay to 0: the factor of the learning rate at a step, counted from 0."""
    start = max(static.warmup_steps, static.steps - round(static.decay_fraction * static.steps))
    factor: Array = optax.join_schedules(
        [
            optax.linear_schedule(1 / (static.warmup_steps + 1), 1.0, static.warmup_steps),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, max(static.steps - start, 1)),
        ],
        [static.warmup_steps, start],
    )(step)
    return factor


def sparsity_weight(state: TrainState, static: Static) -> Float[Array, ""]:
    """The weight of the penalty at a step, counted from 0: linear from 0 over its warm-up, as the libraries do it."""
    if not isinstance(state.hyper, PenalisedHyper):
        return jnp.zeros(())
    whole: Array = state.hyper.sparsity_weight
    return whole * jnp.minimum(state.step / static.sparsity_warmup, 1.0) if static.sparsity_warmup else whole


def init_state(key: PRNGKeyArray, static: Static, hyper: Hyper, center: Float[Array, "d"]) -> TrainState:
    """A fresh SAE whose b_dec starts at `center`, nothing yet counted as silent."""
    fresh = sae_lib.init(key, static.n_features, static.k, center, static.init_norm)
    sae = dense.of(fresh, static.activation, static.threshold)
    start: dict[str, Any] = {
        "step": jnp.zeros((), jnp.int32), "sae": sae, "moments": optimizer.init(sae),
        "tokens_since_fired": jnp.zeros(static.n_features, jnp.int32), "hyper": hyper,
    }  # fmt: skip
    if static.balance:
        return BalancedState(**start, beta=jnp.zeros(static.n_features, center.dtype))
    return TrainState(**start)


def descend(
    state: TrainState, grads: SAE, static: Static, shards: str | None = None
) -> tuple[SAE, optimizer.Moments, Float[Array, ""]]:
    """Parameters and moments one step down the gradient, and the gradient's norm."""
    return optimizer.update(
        state.sae,
        state.moments,
        grads.replace(b_dec=jnp.where(state.hyper.learn_bias, grads.b_dec, 0.0)),
        count=state.step + 1,
        rate=state.hyper.learning_rate * schedule(static, state.step),
        betas=(static.beta1, static.beta2),
        clip_norm=static.clip_norm,
        unit_decoder=static.unit_decoder,
        shards=shards,
    )


def train_step(
    state: TrainState,
    x: Float[Array, "B d"],
    *,
    static: Static,
    allsum: AllSum = lambda tree: tree,
    most: AllSum = lambda number: number,
    shards: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on this device's share of a batch, scaled to ‖sigma‖ = √d. Returns the next state and scalars.

    `allsum` adds a pytree up over the devices that share the batch (gradients, denominators, fired flags); `most` takes
    the largest of a number over the members of an ensemble. Both are the identity on one device, for one SAE. `shards`
    names the mesh axis over which the features are split, where they are.
    """
    dead = state.tokens_since_fired >= state.hyper.dead_after_tokens

    weight = sparsity_weight(state, static)
    lift = state.beta * balance.fading(state.step, static.steps) if isinstance(state, BalancedState) else None

    def gradients(room: int) -> Any:
        def share(sae: SAE) -> tuple[jax.Array, objective.Batch]:
            return objective.loss(
                sae, x, dead, state.hyper.auxk_weight, preset=static.preset, room=room, allsum=allsum, shards=shards,
                precision=static.precision, lift=lift, sparsity=static.sparsity, sparsity_weight=weight,
            )  # fmt: skip

        (loss, batch), grads = jax.value_and_grad(share, has_aux=True)(state.sae)
        return loss, grads, sae_lib.fired(batch.codes, dead.shape[0]), batch.fve, batch.l0, batch.least

    if static.preset == "none":
        found = gradients(0)
    else:
        # Whole gradients to choose from: a branch for AuxK alone would hand over zeros to add while it sleeps.
        n_dead = most(jnp.where(state.hyper.auxk_weight > 0, dead.sum(), 0))
        n_dead = n_dead if shards is None else jax.lax.pmax(n_dead, shards)
        rooms = objective.rooms(len(dead), x.shape[1])
        found = jax.lax.switch(objective.room_for(n_dead, rooms), [partial(gradients, room) for room in rooms])
    loss_share, grads, fired, fve, l0, least = found
    loss, grads, n_fired, n_tokens = allsum((loss_share, grads, fired, jnp.asarray(x.shape[0], jnp.int32)))

    sae, moments, grad_norm = descend(state, grads, static, shards)
    sae = dense.after_step(sae, least)
    silent = death.count_tokens(state.tokens_since_fired, n_fired > 0, n_tokens)
    n_silent = topk.over_shards((silent >= state.hyper.dead_after_tokens).sum(), shards)
    metrics = {
        "loss": loss, "fve": fve, "l0": l0, "dead": n_silent.astype(loss.dtype) / static.n_features,
        "grad_norm": grad_norm,
    }  # fmt: skip
    if isinstance(state, BalancedState):
        rate = state.hyper.learning_rate * schedule(static, state.step)
        state = state.replace(beta=balance.update(
            state.beta, n_fired, silent, n_tokens, n_features=static.n_features, k=static.k or jnp.maximum(l0, 1.0),
            d_model=x.shape[1], rate=rate,
        ))  # fmt: skip
    state = state.replace(step=state.step + 1, sae=sae, moments=moments, tokens_since_fired=silent)
    return state, metrics


class Group(NamedTuple):
    """Members that are trained as one vmapped program."""

    static: Static
    names: list[str]


def group_members(configs: dict[str, ConfigDict], d_model: int) -> list[Group]:
    """Members that share their static part, together; large ones each alone on a device.

    Batching pays where one SAE cannot keep the machine busy. A large one can, and alone it keeps its own AuxK branch
    (skipped while nothing is dead) and the sparse kernels. Spread over several devices, as many make a group.
    """
    groups: list[Group] = []
    for name, config in configs.items():
        static = Static.of(config)
        room = config_lib.mesh(config)["member"] if kept.is_large(static.n_features, d_model) else len(configs)
        alike = [group for group in groups if group.static == static and len(group.names) < room]
        if alike:
            alike[0].names.append(name)
        else:
            groups.append(Group(static, [name]))
    return groups


def init_group(
    configs: list[ConfigDict], centers: Float[Array, "M r"], before: Preprocessing | None = None
) -> TrainState:
    """The members of one group stacked along a leading axis. Members with equal seeds start from equal rows."""
    static = Static.of(configs[0])
    keys = jax.vmap(jax.random.key)(jnp.asarray([config.seed for config in configs]))
    hypers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(hyper, configs)).replace(before=before)
    return jax.jit(jax.vmap(lambda key, h, c: init_state(key, static, h, c)))(keys, hypers, centers)


def group_step(
    state: TrainState, x: Float[Array, "B d"], *, static: Static, allsum: AllSum, shards: str | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`train_step` for all members of a group on the same batch."""

    alone = state.step.shape == (1,)

    def most(number: jax.Array) -> jax.Array:
        # The maximum over the vmapped axis is no longer batched: a branch stays one instead of computing all.
        return number if alone else jax.lax.pmax(number, sae_lib.MEMBER)

    def one(s: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        own = x if s.hyper.before is None else s.hyper.before(x)
        return train_step(s, own, static=static, allsum=allsum, most=most, shards=shards)

    return sae_lib.each_member(one, state)


def in_shared_frame(state: TrainState) -> SAE:
    """The group's SAEs for the tokens that all share: what a member does to them first is folded into its weights.

    Without a matrix it is a shift alone, as `Ensemble` makes it.
    """
    before = state.hyper.before
    if before is None:
        sae: SAE = state.sae
        return sae
    if before.matrix is None:
        moved: SAE = state.sae.replace(b_dec=state.sae.b_dec + before.shift)
        return moved

    def folded(sae: SAE, before: Preprocessing) -> SAE:
        pairs = [jax.tree.map(lambda a, i=i: a[i], (sae, before)) for i in range(len(sae.b_dec))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(fold(*pair) for pair in pairs))

    whole: SAE = processes.by_parts(folded, state.sae, before)
    return whole
