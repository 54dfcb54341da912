"""A model ready to run, and the batches that it is shown."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sae_jax.errors import Refused
from sae_jax.models import inputs
from sae_jax.runtime.optional import module

SIDE = 224  # pixels of an image for the vision transformers and the EfficientNet


class Batch(NamedTuple):
    """What one forward pass is given, and which of its positions are tokens."""

    inputs: dict[str, Any]  # tensors for the forward pass
    token_ids: np.ndarray  # (B, T); -1 where a position has no vocabulary
    real: np.ndarray  # (B, T): no padding
    special: np.ndarray  # (B, T): BOS, CLS, SEP, registers


class Network(NamedTuple):
    """A model ready to run."""

    run: Any  # the torch module
    blocks: Sequence[Any]
    width: int | tuple[int, ...]  # d_model, or one a block
    batches: Callable[[], Iterator[Batch]]
    stream: int = 0  # which of the things that a block returns is the residual stream, where it returns several
    context: int = 0  # positions of the longest sequence, where some are shorter
    compute: Callable[..., dict[int, Any]] | None = None  # where JAX runs it: of a batch, layers and hook, padded


def placed(network: Any, model: ConfigDict) -> Any:
    """In evaluation mode, on the accelerator that torch has, if any; JAX takes the weights from the host."""
    torch = module("torch", "hf")
    return network.eval().to("cuda" if model.backend == "torch" and torch.cuda.is_available() else "cpu")


def blocks(network: Any) -> Any:
    """The list of blocks: the only module list as long as the configuration's number of hidden layers."""
    torch = module("torch", "hf")
    depth = network.config.get_text_config().num_hidden_layers
    lists = [m for m in network.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise Refused("data.model.id", type(network).__name__, f"a model with one list of {depth} blocks")
    return lists[0]


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
        starts = range(0, len(held) - room + 1, room)
        for start in starts:
            yield before + held[start : start + room] + after
        del held[: len(starts) * room]  # once a document: it may be a whole book


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
    model: ConfigDict, side: int, mean: Any, deviation: Any, size: int, positions: int, specials: int = 0,
    name: str = "pixel_values",
) -> Iterator[Batch]:  # fmt: skip
    """Images cut to their middle square, resized, normalised: (B, 3, side, side), the argument `name`."""
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
            {name: torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())},
            np.full(shape, -1, np.int32), np.ones(shape, bool), special,
        )  # fmt: skip


def sequences(kind: str, model: ConfigDict, encode: Callable[[str], list[int]], ends: int) -> Iterator[list[int]]:
    """Token ids of each sequence, cut to the context; `ends` of them are special."""
    for sequence in inputs.read(kind, model[kind]):
        yield encode(sequence[: model.context - ends])


def text_network(network: Any, tokenizer: Any, model: ConfigDict, context: int) -> Network:
    """A model of text, with its text packed: there is no padding."""
    network.config.use_cache = False
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None) or context
    if context > positions:  # torch would say so in its own way, and JAX not at all
        raise Refused("data.model.context", model.context, f"up to {positions}, the positions that {model.id} has")
    return Network(
        placed(network, model), blocks(network), network.config.get_text_config().hidden_size,
        lambda: token_batches(packed(tokenizer, model, context), tokenizer.all_special_ids, 0, model.batch_size),
    )  # fmt: skip
