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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sae-jax/sae-jax/blob/main/colab/3_sweep_on_tpu.ipynb)
#
# # A sweep on a TPU slice
#
# Death against gamma, for several seeds: many SAEs, one table. On a TPU runtime every job uses all chips of the slice;
# on several hosts the same command shares the jobs out with `--shard=i/N`. A sweep that is killed goes on where it was.
# The same cells run on a CPU or GPU, only slower.

# %% tags=["install"]
# %pip install --quiet "jax[tpu]"  # on a GPU: jax[cuda12]
# %pip install --quiet "sae-jax @ git+https://github.com/sae-jax/sae-jax"  # in a clone: -e ".."

# %% tags=["parameters"]
gammas = (0.5, 1, 2, 5, 10, 20, 40)
seeds = (0, 1, 2)
steps = 2000
n_tokens = 20_000

# %%
import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# %% [markdown]
# The accelerators are left to the jobs: a TPU belongs to one process at a time, so this one only asks another what there is.

# %%
# !{sys.executable} -c "import jax; print(jax.devices())"

# %% [markdown]
# ## What to run
#
# A sweep is a configuration file with one more function: `sweep(add)` adds a combination of overrides at a time, with a
# label.

# %%
Path("gammas.py").write_text(f'''
from ml_collections import ConfigDict

from sae_jax.config import base


def get_config():
    config = base()
    config.sae.n_features, config.sae.k = 1024, 8
    config.data.signal, config.data.d_model = "sparse", 64
    config.data.n_true_features, config.data.n_active, config.data.statistics_tokens = 256, 5, {n_tokens}
    config.train.steps, config.train.batch_size, config.train.learning_rate = {steps}, 128, 1e-3
    config.train.steps_per_dispatch = 50
    config.checkpoint.every = {max(1, steps // 4)}
    config.eval.n_tokens = {n_tokens}
    config.auxk.preset = "none"
    config.members = ConfigDict({{
        "baseline": {{"sae": {{"center": "none"}}}}, "centred": {{"sae": {{"center": "geometric_median"}}}},
    }})
    return config


def sweep(add):
    for gamma in {gammas!r}:
        for seed in {seeds!r}:
            add({{"data.gamma": float(gamma), "seed": seed}}, f"gamma{{gamma}}_seed{{seed}}")
''');

# %%
# !{sys.executable} -m sae_jax sweep --config=gammas.py --workdir=runs/gammas --dry_run

# %% [markdown]
# ## Running it
#
# Several machines: the same command with `--shard=0/4` … `--shard=3/4` and a `--workdir` that all of them see, as
# `gs://bucket/gammas`, then once more with `--merge`. The repository's `experiments/speed/launch_tpu_pod.sh` does that on all
# hosts of a slice.

# %%
# !{sys.executable} -m sae_jax sweep --config=gammas.py --workdir=runs/gammas

# %% [markdown]
# ## The table

# %%
with open("runs/gammas/results.csv") as file:
    rows = [row for row in csv.DictReader(file) if row["status"] == "done" and int(row["steps"]) == steps]  # not at init
print(len(rows), "rows;", ", ".join(rows[0]))

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for condition, colour in (("baseline", "#4d4d4d"), ("centred", "#2166ac")):
    here = [row for row in rows if row["condition"] == condition]
    gamma = np.array([float(row["gamma_raw"]) for row in here])
    job = np.array([row["name"].rsplit("_seed")[0] for row in here])  # the same for all seeds of a gamma
    jobs = sorted(set(job), key=lambda name: gamma[job == name].mean())
    for key, label, style in (("dead_total", "dead", "-"), ("dead_by_relu", "dead by ReLU", "--")):
        dead = np.array([100 * float(row[key]) for row in here])
        means = np.array([(gamma[job == name].mean(), dead[job == name].mean()) for name in jobs])
        axis.plot(*means.T, style, lw=1.2, color=colour, label=f"{condition}: {label}")
        axis.plot(gamma, dead, "o", ms=3.5, mew=0, color=colour, alpha=0.6)
axis.set(xscale="log", xlabel="gamma", ylabel="features dead after training (%)", ylim=(-3, 103))
axis.set_xticks(gammas, [f"{value:g}" for value in gammas])
axis.minorticks_off()
axis.grid(alpha=0.25)
figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9);

# %% [markdown]
# To sweep real models and layers: the repository's `configs/sweep.py` has all layers of the paper's models;
# `--filter=model=gpt2` picks one, `--dry_run` prints what would be done.
