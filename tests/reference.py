"""A whole training step in plain NumPy and float64, written from the formulae and sharing nothing with the package.

Dense where the package is sparse, one token at a time where it is batched, gradients by the chain rule on paper. What
the libraries call their constants is typed here from their source; versions stand beside them.
"""

from dataclasses import dataclass, field

import numpy as np

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")

# Weight of the auxiliary loss; features it takes a token, of d; whether from ReLU(z); whether it grows with the dead.
LIBRARIES = {
    "none": (0.0, lambda d: 0, True, False),
    # openai/sparse_autoencoder 4965b94; Gao et al. 2024 (arXiv:2406.04093), appendix A.2.
    "openai": (0.03125, lambda d: 256, True, False),
    # dictionary_learning 0.1.0, trainers/top_k.py: auxk_alpha = 1/32, top_k_aux = activation_dim // 2.
    "dictionary_learning": (0.03125, lambda d: d // 2, True, False),
    # SAELens 6.54.12, saes/topk_sae.py: aux_loss_coefficient = 1.0, k_aux = sae_in.shape[-1] // 2, hidden_pre as it is.
    "saelens": (1.0, lambda d: d // 2, False, True),
    # sparsify 1.3.3, sparse_coder.py: k_aux = y.shape[-1] // 2; config.py suggests an auxk_alpha of 1/32.
    "sparsify": (0.03125, lambda d: d // 2, True, True),
}
EPSILON = 1e-8  # Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1
MOST = 2_147_483_647  # the largest 32-bit integer


@dataclass
class Rules:
    """What stays the same from step to step."""

    preset: str
    k: int
    dead_after: int
    learning_rate: float
    steps: int
    warmup: int
    decay: float
    betas: tuple[float, float]
    clip: float
    unit_decoder: bool
    learn_bias: bool

    def rate(self, step):
        """Linear up to the full rate over the warm-up, flat, linear down to zero over the last part."""
        start = max(self.warmup, self.steps - round(self.decay * self.steps))
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        if step < start:
            return self.learning_rate
        return self.learning_rate * (self.steps - step) / (self.steps - start)


@dataclass
class State:
    """Parameters, Adam's moments, and how long each feature has been silent."""

    parameters: dict[str, np.ndarray]
    silent: np.ndarray
    step: int = 0
    mean: dict[str, np.ndarray] = field(default_factory=dict)
    square: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        for moments in (self.mean, self.square):
            moments.update({name: np.zeros_like(p) for name, p in self.parameters.items()})


def chosen(scores, allowed, count):
    """(B, n) flags: for every token the `count` allowed features with the highest scores."""
    flags, features = np.zeros(scores.shape, bool), np.flatnonzero(allowed)
    for token, row in enumerate(scores):
        flags[token, features[np.argsort(-row[features])[:count]]] = True
    return flags


def loss_and_gradients(p, x, dead, rules):
    """The loss of a batch, its gradient by parameter, the codes (B, n) and the error (B, d)."""
    (n_tokens, d), everything = x.shape, np.ones(len(dead), bool)
    z = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    codes = np.where(chosen(z, everything, rules.k) & (z > 0), z, 0.0)
    e = x - (codes @ p["W_dec"] + p["b_dec"])
    variance = ((x - x.mean(axis=0)) ** 2).sum()

    divisor = {"openai": n_tokens * d, "sparsify": variance}.get(rules.preset, n_tokens)
    loss = (e**2).sum() / divisor
    pulls = [(-2 * e / divisor, codes, codes > 0)]  # dloss/dx̂, what x̂ is made of, and where that may change
    grads = {"b_dec": pulls[0][0].sum(axis=0)}

    weight, k_aux, rectified, gradual = LIBRARIES[rules.preset]
    n_dead = int(dead.sum())
    if weight and n_dead:
        among = chosen(z, dead, k_aux(d))
        if rectified:
            among &= z > 0
        aux = np.where(among, z, 0.0)
        r = aux @ p["W_dec"] - e
        own = ((e - e.mean(axis=0)) ** 2).sum()
        factor = weight / {"saelens": n_tokens, "sparsify": variance}.get(rules.preset, own)
        factor *= min(n_dead / (d // 2), 1.0) if gradual else 1.0
        loss += factor * (r**2).sum()
        pulls.append((2 * factor * r, aux, among))

    grads |= {name: np.zeros_like(p[name]) for name in ("W_enc", "b_enc", "W_dec")}
    for pull, made_of, may_change in pulls:
        grads["W_dec"] += made_of.T @ pull
        of_codes = np.where(may_change, pull @ p["W_dec"].T, 0.0)
        grads["W_enc"] += of_codes.T @ (x - p["b_dec"])
        grads["b_enc"] += of_codes.sum(axis=0)
        grads["b_dec"] = grads["b_dec"] - of_codes.sum(axis=0) @ p["W_enc"]
    return loss, grads, codes, e


def train_step(state, x, rules):
    """The state after a step on the batch x, and what the step reports."""
    p, n_tokens = state.parameters, len(x)
    loss, grads, codes, e = loss_and_gradients(p, x, state.silent >= rules.dead_after, rules)
    if not rules.learn_bias:
        grads["b_dec"] = np.zeros_like(p["b_dec"])
    if rules.unit_decoder:
        for row, direction in zip(grads["W_dec"], p["W_dec"], strict=True):
            row -= (row @ direction) * direction
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    shrink = min(1.0, rules.clip / norm)

    t, (beta1, beta2) = state.step + 1, rules.betas
    new = State({}, np.zeros_like(state.silent), step=t)
    for name in PARAMETERS:
        g = shrink * grads[name]
        new.mean[name] = beta1 * state.mean[name] + (1 - beta1) * g
        new.square[name] = beta2 * state.square[name] + (1 - beta2) * g**2
        m, v = new.mean[name] / (1 - beta1**t), new.square[name] / (1 - beta2**t)
        new.parameters[name] = p[name] - rules.rate(state.step) * m / (np.sqrt(v) + EPSILON)
    if rules.unit_decoder:
        new.parameters["W_dec"] /= np.linalg.norm(new.parameters["W_dec"], axis=1)[:, None]

    fired = (codes > 0).any(axis=0)
    new.silent = np.array([0 if f else min(MOST, int(s) + n_tokens) for f, s in zip(fired, state.silent, strict=True)])
    return new, {
        "loss": loss,
        "fve": 1 - (e**2).sum() / ((x - x.mean(axis=0)) ** 2).sum(),
        "l0": (codes > 0).sum() / n_tokens,
        "dead": np.mean(new.silent >= rules.dead_after),
        "grad_norm": norm,
    }
