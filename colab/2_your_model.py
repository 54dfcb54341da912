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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sae-jax/sae-jax/blob/main/colab/2_your_model.ipynb)
#
# # Diagnose your own model's activations
#
# Before you spend a day on an SAE: how severe are the outliers of your layer, how many features would it lose, and what
# helps? All it takes is an array of shape (tokens, d_model), from any framework. Here it comes out of a PyTorch model
# through a forward hook; with your own array, go straight to the diagnosis.

# %% tags=["install"]
# torch and transformers are there already on Colab; elsewhere: sae-jax[hf], or in a clone: -e "..[hf]"
# %pip install --quiet "sae-jax @ git+https://github.com/sae-jax/sae-jax"

# %% tags=["parameters"]
model_id = "openai-community/gpt2"  # a decoder on the Hugging Face hub; empty: a small random one, for a dry run
layer = 6
n_tokens = 20_000
n_features, k = 8192, 64  # of the SAE you have in mind

# %%
# %matplotlib inline
import pydoc_data.topics

import numpy as np
import torch
import transformers
from IPython.display import display

import sae_jax

# %% [markdown]
# ## Activations, by a hook
#
# The residual stream after `layer` blocks. The first token of each sequence is left out: it is an attention sink with a
# huge norm, and would be most of the mean. (`python -m sae_jax extract` does all this for many layers in one pass, and
# keeps the result as a dataset that training reads from disk.)

# %%
if model_id:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_id)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_id)
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(tokenizer(text).input_ids)
else:
    torch.manual_seed(0)
    tiny = transformers.GPT2Config(n_layer=layer + 1, n_embd=64, n_head=4, vocab_size=1000, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(tiny)
    model.transformer.wpe.weight.data += 0.1 * torch.randn(64)  # a mean, as trained models have it
    ids = torch.randint(1000, (4 * n_tokens,))

kept = []
block = model.transformer.h[layer]  # of a Llama or Gemma: model.model.layers[layer]
handle = block.register_forward_pre_hook(lambda module, args: kept.append(args[0][:, 1:].flatten(0, 1)))
with torch.inference_mode():
    for batch in ids[: len(ids) // 256 * 256].view(-1, 256).split(16):
        model(batch)
        if sum(map(len, kept)) >= n_tokens:
            break
handle.remove()
x = torch.cat(kept)[:n_tokens].float().numpy()
x.shape

# %% [markdown]
# ## The diagnosis

# %%
report = sae_jax.diagnose(x, n_features=n_features, k=k)
print(f"gamma {report['gamma']:.2f} after LayerNorm, {report['gamma_raw']:.2f} as it is, "
      f"{report['gamma_direction']:.2f} of directions; effective rank {report['effective_rank']:.0f} of {x.shape[1]}")
print(report["advice"])

# %% [markdown]
# Which dimensions the mean is made of: vertical lines stand out on every token.

# %%
display(report.figures["landscape"])

# %% [markdown]
# How many features an untrained SAE would lose at every sparsity k/n, with a 95 % band, and what the laws in closed form
# say at yours.

# %%
display(report.figures["death_curve"])

# %% [markdown]
# What each remedy would leave. Centring usually helps, but not always: a mean made by a few tokens of giant norm shifts
# all the others when it is taken away.

# %%
display(report.figures["remedies"])
report["recommended"]

# %% [markdown]
# ## The numbers behind it

# %%
{name: found["probe"] for name, found in report["remedies"].items()}

# %% [markdown]
# To train by the recipe: `numpy.save("activations.npy", x)`, then, in a clone of the repository,
#
# ```
# python -m sae_jax train --config=configs/default.py --config.data.path=activations.npy --workdir=runs/mine
# ```
#
# or, anywhere, `sae_jax.train(sae_jax.base({"data.path": "activations.npy"} | report["recipe"]), "runs/mine")`.
#
# ## An SAE that exists already
#
# `dissect` takes a folder of SAELens, dictionary_learning or sparsify, `hf://OWNER/NAME/FOLDER`, a run of ours, or four
# arrays, as of this untrained SAE: who is dead, by which pathway, and what centring would have saved.

# %%
rows = np.random.default_rng(0).normal(size=(1024, x.shape[1])).astype("float32")
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
zeros = np.zeros(1024, "float32"), np.zeros(x.shape[1], "float32")
found = sae_jax.dissect(sae_jax.SAE(W_enc=rows, b_enc=zeros[0], W_dec=rows, b_dec=zeros[1], k=8), x)
print(found["advice"])
display(found.figures["shifts"])
