"""Losses and gradients of every activation against the libraries' own code, from the same weights and batch.

    pip install -e ".[test]" && python -m experiments.trust.peer_losses --peers=saelens

and with dictionary_learning in an environment of its own, as for peer_conformance:

    peers/bin/python -m experiments.trust.peer_losses --out=experiments/trust/peer_losses.csv

Each line is one architecture and one random setting (sparsity, groups, weights, who is dead), all in float64.
What stands in a column is the largest difference as a share of the largest entry. dictionary_learning's JumpReLU does
not subtract b_dec: ours gets the bias that makes up for it, and the gradients are compared by the chain rule. It also
counts a batch before it asks who is dead, where we count it after: ours is told who is dead by its count. Exits with 1
where a difference passes 1e-5.
"""

import argparse
import csv
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

warnings.filterwarnings("ignore")  # the peers' own

from sae_jax.autoencoder import dense, jumprelu, objective  # noqa: E402
from sae_jax.autoencoder.objective import Sparsity  # noqa: E402
from sae_jax.autoencoder.sae import SAE  # noqa: E402

TOLERANCE = 1e-5
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
SEEDS = range(3)


class Setting:
    """One random setting: weights away from any special value, a batch, and who is dead."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.d, self.n, self.batch = 8, 40, 30  # alike, so that what JAX has compiled serves again
        self.k, self.coefficient = int(rng.integers(2, 6)), float(rng.uniform(0.3, 3))
        self.target, self.bandwidth = float(rng.uniform(3, 9)), float(rng.uniform(0.3, 1.0))
        self.groups = (*sorted(rng.choice(np.arange(2, self.n), 2, replace=False).tolist()), self.n)
        self.x = rng.normal(size=(self.batch, self.d)) + 2 * rng.normal(size=self.d)
        self.W_enc, self.W_dec = (rng.normal(size=(self.n, self.d)) / np.sqrt(self.d) for _ in range(2))
        self.b_enc, self.b_dec = 0.1 * rng.normal(size=self.n), rng.normal(size=self.d)
        self.theta = rng.uniform(0.05, 0.5, self.n)
        self.dead = rng.random(self.n) < 0.3


def ours(
    setting: Setting, activation: str, preset: str, sparsity: Sparsity = objective.PLAIN, weight: float = 0.0
) -> dict[str, np.ndarray]:
    """Loss and gradients of `objective.loss`; `preset` is that of AuxK."""
    with jax.enable_x64(True):
        threshold: Any = {"jumprelu": setting.theta, "batch_topk": np.float64(-1)}.get(activation)
        arrays = {name: jnp.asarray(getattr(setting, name)) for name in PARAMETERS}
        k = 0 if activation in dense.PENALTIES else setting.k
        sae = SAE(**arrays, k=k)
        if activation != "topk":
            threshold = None if threshold is None else jnp.asarray(threshold)
            sae = dense.DenseSAE(**arrays, k=k, threshold=threshold, activation=activation)

        def loss(sae: SAE) -> jax.Array:
            return objective.loss(
                sae, jnp.asarray(setting.x), jnp.asarray(setting.dead),
                jnp.asarray(objective.PRESETS[preset].weight), preset=preset, sparsity=sparsity,
                sparsity_weight=weight,
            )[0]  # fmt: skip

        value, grads = jax.value_and_grad(loss)(sae)
        found = {"loss": value, **{name: getattr(grads, name) for name in PARAMETERS}}
        if activation == "jumprelu":
            found["threshold"] = grads.threshold
        return {name: np.asarray(a) for name, a in found.items()}


# -- SAELens -----------------------------------------------------------------------------------------------------------


def saelens(setting: Setting, architecture: str, coefficients: dict[str, float], **options: Any) -> dict[str, Any]:
    """The loss of a training SAE of SAELens, and its gradients with features as rows."""
    import torch
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import TrainStepInput

    kind, config = get_sae_training_class(architecture)
    sae = kind(config(d_in=setting.d, d_sae=setting.n, dtype="float64", **options))
    with torch.no_grad():
        for name, value in (("W_enc", setting.W_enc.T), ("W_dec", setting.W_dec), ("b_enc", setting.b_enc),
                            ("b_dec", setting.b_dec)):  # fmt: skip
            getattr(sae, name).data = torch.tensor(value)
        if architecture == "jumprelu":
            sae.threshold.data = torch.tensor(setting.theta)
    out = sae.training_forward_pass(TrainStepInput(
        sae_in=torch.tensor(setting.x), coefficients=coefficients, dead_neuron_mask=torch.tensor(setting.dead),
        n_training_steps=0, is_logging_step=False,
    ))  # fmt: skip
    out.loss.backward()
    grads = {name: getattr(sae, name).grad.numpy() for name in PARAMETERS}
    found = {"loss": out.loss.detach().numpy(), **grads, "W_enc": grads["W_enc"].T}
    if architecture == "jumprelu":
        found["threshold"] = sae.threshold.grad.numpy()
    return found


def saelens_cases(setting: Setting) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, theirs, ours) of every architecture of SAELens."""
    s, plain = setting, {"rescale_acts_by_decoder_norm": False, "decoder_init_norm": None}
    for name, groups in (("batch_topk", ()), ("matryoshka", s.groups)):
        widths = {"matryoshka_widths": list(groups)} if groups else {}
        for preset in ("saelens", "none"):
            coefficient = objective.PRESETS[preset].weight
            theirs = saelens(s, "matryoshka_batchtopk" if groups else "batchtopk", {}, k=s.k,
                             aux_loss_coefficient=coefficient, **widths, **plain)  # fmt: skip
            yield f"{name}, AuxK {preset}", theirs, ours(s, "batch_topk", preset, Sparsity(groups=groups))
    theirs = saelens(s, "standard", {"l1": s.coefficient}, decoder_init_norm=None)
    yield "relu", theirs, ours(s, "relu", "none", Sparsity("saelens"), s.coefficient)
    for mode in ("step", "tanh", "quadratic"):
        preset = "saelens" if mode == "step" else f"saelens_{mode}"
        own = jumprelu.PENALTIES[preset]
        target = s.target if own.has_target else 0.0
        theirs = saelens(
            s, "jumprelu", {"l0": s.coefficient}, decoder_init_norm=None, jumprelu_sparsity_loss_mode=mode,
            jumprelu_bandwidth=s.bandwidth, target_l0=target or None, jumprelu_ste_to_input=own.to_input,
            pre_act_loss_coefficient=3e-6 if mode == "tanh" else None,
        )  # fmt: skip
        yield f"jumprelu, {preset}", theirs, ours(s, "jumprelu", "none", Sparsity(preset, target, s.bandwidth),
                                                  s.coefficient)  # fmt: skip


# -- dictionary_learning -----------------------------------------------------------------------------------------------


def dictionary_learning(setting: Setting, trainer: Any, turned: bool) -> dict[str, Any]:
    """The loss of one of its trainers, and its gradients with features as rows."""
    import torch

    ae, s = trainer.ae.double(), setting
    rows = ("W_enc", "W_dec") if turned else ("encoder.weight", "decoder.weight")
    biases = ("b_enc" if turned else "encoder.bias", "bias" if hasattr(ae, "bias") else "b_dec")
    parameters = dict(ae.named_parameters())
    W_enc, W_dec = parameters[rows[0]], parameters[rows[1]]
    with torch.no_grad():
        W_enc.copy_(torch.tensor(s.W_enc.T if turned else s.W_enc))
        W_dec.copy_(torch.tensor(s.W_dec if turned else s.W_dec.T))
        parameters[biases[0]].copy_(torch.tensor(s.b_enc))
        parameters[biases[1]].copy_(torch.tensor(s.b_dec))
        if "threshold" in parameters:
            parameters["threshold"].copy_(torch.tensor(s.theta))
    if hasattr(trainer, "num_tokens_since_fired"):
        trainer.num_tokens_since_fired = torch.tensor(s.dead * 10_000_000)
    loss = trainer.loss(torch.tensor(s.x), step=0)
    loss.backward()
    if hasattr(trainer, "num_tokens_since_fired"):
        s.dead = trainer.num_tokens_since_fired.numpy() >= 10_000_000
    grads = {
        "W_enc": W_enc.grad.T if turned else W_enc.grad, "W_dec": W_dec.grad if turned else W_dec.grad.T,
        "b_enc": parameters[biases[0]].grad, "b_dec": parameters[biases[1]].grad,
    }  # fmt: skip
    if "threshold" in parameters:
        grads["threshold"] = parameters["threshold"].grad
    return {"loss": loss.detach().numpy(), **{name: g.numpy() for name, g in grads.items()}}


def dictionary_learning_cases(setting: Setting) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, theirs, ours) of every trainer of dictionary_learning."""
    from dictionary_learning.trainers import batch_top_k, jumprelu, matryoshka_batch_top_k, standard

    s = setting
    common: dict[str, Any] = {"steps": 10, "activation_dim": s.d, "dict_size": s.n, "layer": 0, "lm_name": "",
                              "device": "cpu", "warmup_steps": 0}  # fmt: skip
    theirs = dictionary_learning(s, batch_top_k.BatchTopKTrainer(k=s.k, **common), False)
    yield "batch_topk", theirs, ours(s, "batch_topk", "dictionary_learning")

    trainer = matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(k=s.k, group_fractions=[0.25, 0.75], **common)
    groups = tuple(np.cumsum(trainer.group_sizes).tolist())
    theirs = dictionary_learning(s, trainer, True)
    yield "matryoshka", theirs, ours(s, "batch_topk", "dictionary_learning", Sparsity(groups=groups))

    trainer = standard.StandardTrainer(l1_penalty=s.coefficient, sparsity_warmup_steps=None, **common)
    yield "relu", dictionary_learning(s, trainer, False), ours(
        s, "relu", "none", Sparsity("dictionary_learning"), s.coefficient
    )

    trainer = jumprelu.JumpReluTrainer(
        bandwidth=s.bandwidth, sparsity_penalty=s.coefficient, target_l0=s.target, sparsity_warmup_steps=None, **common
    )
    theirs = dictionary_learning(s, trainer, True)
    s.b_enc = s.b_enc + s.W_enc @ s.b_dec  # W (x − b_dec) + this = W x + theirs
    mine = ours(s, "jumprelu", "none", Sparsity("dictionary_learning", s.target, s.bandwidth), s.coefficient)
    mine["W_enc"] = mine["W_enc"] + np.outer(mine["b_enc"], s.b_dec)
    mine["b_dec"] = mine["b_dec"] + mine["b_enc"] @ s.W_enc
    yield "jumprelu", theirs, mine


CASES: dict[str, Callable[[Setting], Iterator[tuple[str, dict[str, Any], dict[str, Any]]]]] = {
    "saelens": saelens_cases, "dictionary_learning": dictionary_learning_cases,
}  # fmt: skip


def differences(theirs: dict[str, Any], mine: dict[str, Any]) -> dict[str, float]:
    """Of the loss and each gradient, the largest difference as a share of the largest entry."""
    assert theirs.keys() == mine.keys()
    return {
        name: float(np.abs(mine[name] - value).max() / max(np.abs(value).max(), 1e-300))
        for name, value in theirs.items()
    }


def main() -> None:
    """All of them; prints, and writes a table if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(CASES), help="which, separated by commas")
    parser.add_argument("--out", help="a CSV")
    args = parser.parse_args()
    rows = []
    for peer in args.peers.split(","):
        for seed in SEEDS:
            for name, theirs, mine in CASES[peer](Setting(seed)):
                off = differences(theirs, mine)
                rows.append({"peer": peer, "architecture": name, "seed": seed, "loss": float(theirs["loss"]),
                             **{f"off_{key}": f"{value:.1e}" for key, value in off.items()},
                             "worst": f"{max(off.values()):.1e}"})  # fmt: skip
                print(f"{peer:20} {name:28} seed {seed}: {rows[-1]['worst']}", flush=True)
    if args.out:
        keys = list(dict.fromkeys(key for row in rows for key in row))
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, keys)
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(any(float(row["worst"]) > TOLERANCE for row in rows))


if __name__ == "__main__":
    main()
