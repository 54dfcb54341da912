"""How each family of models on the hub is loaded and fed.

Nothing but weights is read (safetensors, GGUF, torch's weights_only); no code of the hub runs without being allowed.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sae_jax.errors import Refused, first_line
from sae_jax.models import bundled, facts, on_jax
from sae_jax.models.network import (
    SIDE,
    Batch,
    Network,
    blocks,
    image_batches,
    placed,
    sequences,
    text_network,
    token_batches,
)
from sae_jax.runtime.optional import module

DIFFUSION_SIDE, NOISE = 512, 0.5  # pixels; share of noise in what the diffusion transformer sees
IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)  # mean and deviation of channels


def load(model: ConfigDict, head: bool = False, devices: Sequence[Any] = ()) -> Network:
    """The network of `config.data.model`, its weights in float32, and the batches of its inputs.

    Args:
      head: with the language head, so that a whole forward pass gives the `logits` of the next token; in torch.
      devices: where JAX runs the model, if that is its backend; all local ones if none are given.

    Raises:
      Refused: weights that are not there or not allowed, a missing extra, a class without one list of blocks, or a head
        asked of what is no decoder of text.
    """
    known = facts.find(model)
    with contextlib.suppress(ImportError):  # families that do not need it go without
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt without a network
    try:
        # Conversions draw their bars whether or not anybody can see them.
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            family, id = (known.family, known.id) if known else (_family(model), model.id)
            if head and family not in DECODERS:
                raise Refused("data.model.id", model.id, "a decoder of text, which predicts the next token")
            if head:
                return FAMILIES[family](model, id, "AutoModelForCausalLM")
            network = FAMILIES[family](model, id)
    except (OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        if "trust_remote_code" in str(error):
            raise Refused("data.model.remote_code", model.remote_code, facts.opt_in(model.id, model.id)) from error
        how = f"weights that can be loaded ({first_line(error)})"
        if known and known.gated:
            page = f"https://huggingface.co/{known.id}"
            how += f"; they are gated ({known.licence}): accept the terms at {page} and set HF_TOKEN"
        raise Refused("data.model.id", model.id, how) from error
    return on_jax.moved(network, model, devices) if model.backend == "jax" else network


def _family(model: ConfigDict) -> str:
    """For a model of the hub that is not in the table: by the type that its configuration names."""
    config = module("transformers", "hf").AutoConfig.from_pretrained(model.id, **_options(model))
    return {"esm": "esm2", "dinov2": "vit", "dinov2_with_registers": "vit", "dinov3_vit": "vit"}.get(
        config.model_type, "transformers"
    )


def _options(model: ConfigDict) -> dict[str, Any]:
    commit = facts.commit(model)
    if commit:
        return {"revision": commit, "code_revision": commit, "trust_remote_code": True}
    return {"revision": model.revision, "trust_remote_code": False}


# -- families of the hub ---------------------------------------------------------------------------------------------


def _transformers(model: ConfigDict, id: str, kind: str = "AutoModel") -> Network:
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(id, **_options(model))
    network = getattr(transformers, kind).from_pretrained(id, dtype=torch.float32, **_options(model))
    return text_network(network, tokenizer, model, model.context)


def _vit(model: ConfigDict, id: str) -> Network:
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    network = transformers.AutoModel.from_pretrained(id, dtype=torch.float32, **_options(model))
    config = network.config
    specials = 1 + getattr(config, "num_register_tokens", 0)
    positions = specials + (SIDE // config.patch_size) ** 2
    mean, deviation = 255 * IMAGENET
    return Network(
        placed(network, model), blocks(network), config.hidden_size,
        lambda: image_batches(model, SIDE, mean, deviation, model.batch_size, positions, specials),
    )  # fmt: skip


def _sd3(model: ConfigDict, id: str) -> Network:
    """The image stream of the transformer at half noise, without a prompt: its text embeddings are zero, as they were
    for part of its training. The paper does not say what its activations were taken at."""
    diffusers, torch = module("diffusers", "models"), module("torch", "hf")
    options = {"revision": model.revision, "torch_dtype": torch.float32}
    vae = placed(diffusers.AutoencoderKL.from_pretrained(id, subfolder="vae", **options), model)
    network = placed(diffusers.SD3Transformer2DModel.from_pretrained(id, subfolder="transformer", **options), model)
    config = network.config
    shrink = 2 ** (len(vae.config.block_out_channels) - 1)
    side = min(DIFFUSION_SIDE, config.sample_size * shrink)
    positions = (side // shrink // config.patch_size) ** 2

    def batches() -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        for batch in image_batches(model, side, 127.5, 127.5, model.batch_size, positions):
            pixels = batch.inputs["pixel_values"].to(vae.device)
            with torch.inference_mode():
                latent = vae.encode(pixels).latent_dist.mean
            latent = (latent - vae.config.shift_factor) * vae.config.scaling_factor
            noise = torch.from_numpy(rng.standard_normal(latent.shape, np.float32)).to(latent.device)
            count = len(latent)
            yield batch._replace(inputs={
                "hidden_states": (1 - NOISE) * latent + NOISE * noise,
                "timestep": torch.full((count,), 1000 * NOISE),
                "encoder_hidden_states": torch.zeros(count, 77 + 256, config.joint_attention_dim),
                "pooled_projections": torch.zeros(count, config.pooled_projection_dim),
            })  # fmt: skip

    return Network(network, network.transformer_blocks, network.inner_dim, batches, stream=1)


def _esm2(model: ConfigDict, id: str) -> Network:
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(id, **_options(model))
    network = transformers.AutoModel.from_pretrained(id, dtype=torch.float32, **_options(model))
    return Network(
        placed(network, model), blocks(network), network.config.hidden_size,
        lambda: token_batches(
            sequences("proteins", model, lambda s: tokenizer(s).input_ids, 2), tokenizer.all_special_ids,
            tokenizer.pad_token_id, model.batch_size, mask="attention_mask",
        ),
        context=model.context,
    )  # fmt: skip


def _esm3(model: ConfigDict, id: str) -> Network:
    """The package `esm` downloads its own weights; it needs an older transformers, so an environment of its own."""
    return esm3_network(module("esm.models.esm3", "esm3").ESM3.from_pretrained("esm3-open"), model)


def esm3_network(network: Any, model: ConfigDict) -> Network:
    """ESM3 given sequences only; its other tracks are masked."""
    tokenizer = network.tokenizers.sequence
    return Network(
        placed(network, model), network.transformer.blocks, network.transformer.norm.normalized_shape[0],
        lambda: token_batches(
            sequences("proteins", model, lambda s: tokenizer(s)["input_ids"], 2), tokenizer.all_special_ids,
            tokenizer.pad_token_id, model.batch_size, ids="sequence_tokens", mask="sequence_id",
        ),
        context=model.context,
    )  # fmt: skip


# The hub's code is not ours to test: these rest on the paths of its modules and on what its model cards show.


def _progen(model: ConfigDict, id: str) -> Network:
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(id, revision=facts.commit(model))
    network = transformers.AutoModelForCausalLM.from_pretrained(id, dtype=torch.float32, **_options(model))
    ends = tokenizer.convert_tokens_to_ids(["1", "2"])  # where a protein begins (N terminus) and stops
    return Network(
        placed(network, model), network.transformer.h, facts.MODELS[model.id].width,
        lambda: token_batches(
            sequences("proteins", model, lambda s: tokenizer("1" + s + "2", add_special_tokens=False).input_ids, 2),
            ends, 0, model.batch_size,
        ),
        context=model.context,
    )  # fmt: skip


def _evo(model: ConfigDict, id: str) -> Network:
    """Tokens are the bytes of the sequence; the causal convolutions never see padding on the right."""
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    network = transformers.AutoModelForCausalLM.from_pretrained(id, dtype=torch.float32, **_options(model))
    return Network(
        placed(network, model), network.backbone.blocks, facts.MODELS[model.id].width,
        lambda: token_batches(
            sequences("dna", model, lambda s: list(s.encode("ascii")), 0), [], 1, model.batch_size,
        ),
        context=model.context,
    )  # fmt: skip


def _glm2(model: ConfigDict, id: str) -> Network:
    """Proteins on the plus strand, each element behind its strand token."""
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(id, **_options(model))
    network = transformers.AutoModel.from_pretrained(id, dtype=torch.float32, **_options(model))
    special = [*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<+>")]
    return Network(
        placed(network, model), network.encoder.layers, facts.MODELS[model.id].width,
        lambda: token_batches(
            sequences("proteins", model, lambda s: tokenizer("<+>" + s).input_ids, 3), special,
            tokenizer.pad_token_id, model.batch_size, mask="attention_mask",
        ),
        context=model.context,
    )  # fmt: skip


DECODERS = ("transformers", "gemma")  # families that may have a language head
FAMILIES: dict[str, Callable[..., Network]] = {
    "transformers": _transformers, "vit": _vit, "sd3": _sd3, "esm2": _esm2, "esm3": _esm3, "progen": _progen,
    "evo": _evo, "glm2": _glm2, "gemma": bundled.gemma, "minilm": bundled.minilm,
    "antiberty": bundled.antiberty, "efficientnet": bundled.efficientnet,
}  # fmt: skip
