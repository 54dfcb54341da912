# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sae-jax/sae-jax/blob/main/colab/1_feature_death.ipynb)
#
# # Feature death in ten minutes
#
# A sparse autoencoder (SAE) is meant to give every concept of a network a feature. Often most of its features never
# fire on any token. Simon, Adams and Zou ([arXiv:2605.31518](https://arxiv.org/abs/2605.31518)) trace that to the
# *mean* of the activations: where it is long against their variation, a feature's fate is decided at initialisation by
# the angle it happens to make with the mean. Here you make such activations, predict how many features die, watch it
# happen, and prevent it. Everything runs on a CPU.

# %% tags=["install"]
# %pip install --quiet "sae-jax @ git+https://github.com/sae-jax/sae-jax"  # in a clone: -e ".."

# %% tags=["parameters"]
gamma = 20.0  # ‖mean‖ / ‖standard deviations‖ of the activations
steps = 2000  # of training
n_tokens = 20_000  # to measure on

# %%
# %matplotlib inline
import numpy as np
from IPython.display import Image, display
from ml_collections import ConfigDict

import sae_jax

# %% [markdown]
# ## Activations with a mean
#
# 256 directions in 64 dimensions, five of them active on each token (these are what an SAE should find), and on every
# token the same mean, `gamma` times as long as the rest.

# %%
rng = np.random.default_rng(0)
truth = rng.normal(size=(256, 64)) / 8
active = np.argsort(rng.random((n_tokens, 256)), axis=1)[:, :5]
signal = np.einsum("tk,tkd->td", rng.uniform(0.5, 1.5, active.shape), truth[active])
signal -= signal.mean(axis=0)
mean = rng.normal(size=64)
mean *= gamma * np.linalg.norm(signal.std(axis=0)) / np.linalg.norm(mean)
x = np.float32(signal + mean)

# %% [markdown]
# ## Before training: how many features would die?
#
# `diagnose` needs nothing but the activations. It sends a few hundred random directions past all tokens, and forecasts
# what an untrained SAE of any size would lose, as the activations are and under every remedy.

# %%
before = sae_jax.diagnose(x, n_features=1024, k=8)
print(before["advice"])

# %%
for name in ("shift_signal", "death_curve", "remedies"):
    display(before.figures[name])

# %% [markdown]
# In the first picture each point is a feature: how far the mean shifts its pre-activation, and how much that varies. Left
# of the dashed line no token ever brings it above zero: **dead by ReLU**. Many of the others are positive somewhere, but
# never among the k largest: **dead by TopK**.
#
# ## Training: who recovers?
#
# Two SAEs see the same batches. They differ in one thing: where the decoder bias starts, at zero or at the (geometric)
# median of the activations. The same activations are made on the device by `data.signal`, so nothing has to be stored.

# %%
config = sae_jax.base()
config.sae.n_features, config.sae.k = 1024, 8
config.data.signal, config.data.gamma, config.data.d_model = "sparse", gamma, 64
config.data.n_true_features, config.data.n_active, config.data.statistics_tokens = 256, 5, n_tokens
config.train.steps, config.train.batch_size, config.train.learning_rate = steps, 128, 1e-3
config.train.steps_per_dispatch = 50
config.checkpoint.every = steps // 10
config.eval.n_tokens = n_tokens
config.auxk.preset = "none"
config.members = ConfigDict({"baseline": {"sae": {"center": "none"}}, "centred": {"sae": {"center": "geometric_median"}}})

report = sae_jax.train(config, "runs/ten_minutes")

# %%
for member in report["members"]:
    start, end = member["init"], member["final"]
    print(f"{member['name']:9} dead {start['dead_total']:6.1%} → {end['dead_total']:6.1%}"
          f"   by ReLU {end['dead_by_relu']:6.1%}   true features found (MMCS) {end['mmcs']:.2f}")

# %%
for name in ("deaths", "bias", "shifts"):
    display(Image(f"runs/ten_minutes/{name}.png"))

# %% [markdown]
# The baseline's bias would have to travel the whole way to the mean, and Adam moves a coordinate by about the learning
# rate a step. Until it arrives, what is dead by ReLU gets no gradient and stays dead; others join it, as the features that
# carry the mean push them below zero. The centred SAE starts there: it finds the true features, and gives up some of the
# rows that it has to spare, four for every true one. The page `runs/ten_minutes/report.html` has all of it in one file.
#
# ## Taking it with you
#
# Any SAE of the run can be written in the format of SAELens, dictionary_learning or sparsify; scaling is folded in.

# %%
sae_jax.export("runs/ten_minutes", "runs/ten_minutes_saelens", "saelens", member="centred");

# %% [markdown]
# And an SAE of anybody's, in any of these formats, can be examined: who is dead, by which pathway, and what would happen
# if its bias were moved to the mean.

# %%
found = sae_jax.dissect("runs/ten_minutes", config, member="baseline")
print(found["advice"])
display(found.figures["alignment"])

# %% [markdown]
# Next: [your own model's activations](2_your_model.ipynb), [a sweep on a TPU slice](3_sweep_on_tpu.ipynb).
