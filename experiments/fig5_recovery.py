"""Figure 5: two phases of recovery and the bias that crawls, over gamma and four conditions.

    python experiments/fig5_recovery.py --workdir=runs/fig5 --scale=cpu
"""


from absl import app, flags, logging
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax import running

WORKDIR = flags.DEFINE_string("workdir", "runs/fig5", "folder for the runs, the table and the figure")
SCALE = flags.DEFINE_enum("scale", "cpu", ["smoke", "cpu", "paper"], "how large and how long")
ONLY = flags.DEFINE_enum("only", None, ["plain", "auxk"], "train these members and do nothing else")
GAMMAS = (1.0, 5.0, 20.0, 40.0)
# steps, d, true features, n, k, batch, held-out tokens, learning rate
SCALES = {
    "smoke": (200, 16, 64, 64, 3, 32, 1000, 1e-3),
    "cpu": (2_000_000, 32, 128, 128, 3, 32, 20_000, 3e-4),
    "paper": (2_000_000, 256, 1024, 8192, 64, 2048, 100_000, 3e-4),
}


def config(scale: str, which: str) -> ConfigDict:
    """The members of one preset: every gamma, with the bias learned and frozen, on the same signal."""
    steps, d, n_true, n, k, batch, held_out, rate = SCALES[scale]
    c = config_lib.base()
    c.sae.n_features, c.sae.k = n, k
    c.data.update(
        signal="sparse", gamma=1.0, d_model=d, n_true_features=n_true, n_active=2 if scale != "paper" else 16,
        mean_direction="one", statistics_tokens=20_000,
    )  # fmt: skip
    c.train.update(steps=steps, batch_size=batch, learning_rate=rate, decay_fraction=0.0)
    c.train.steps_per_dispatch = min(2000, steps // 10)
    c.auxk.preset = "dictionary_learning" if which == "auxk" else "none"
    c.auxk.dead_after_tokens = batch * min(5000, steps // 10)  # 10M tokens at the usual batch of 2,048
    c.eval.n_tokens, c.eval.points = held_out, 60
    c.checkpoint.every = max(1, steps // 100)
    c.members = ConfigDict({
        f"{gamma:g}{' frozen' if frozen else ''}": {"data": {"gamma": gamma}, "sae": {"freeze_bias": frozen}}
        for gamma in GAMMAS for frozen in (False, True)
    })  # fmt: skip
    return c


def main(_: list[str]) -> None:
    """Trains the two halves side by side, each in a process of its own; then the table and the figure."""
    logging.set_verbosity(logging.ERROR)
    if ONLY.value:
        running.train(config(SCALE.value, ONLY.value), f"{WORKDIR.value}/{ONLY.value}")
        return


if __name__ == "__main__":
    app.run(main)
