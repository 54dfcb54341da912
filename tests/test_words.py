"""Token ids as text: each kind of tokenizer marks the beginning of a word in its own way."""

import pytest

from sae_jax.models.words import words

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")


def saved(folder, model, decoder=None):
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoder
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("pieces", "shown"), [
    (["▁the", "▁cat", "s"], [" the", " cat", "s"]),  # SentencePiece
    (["Ġthe", "Ġcat", "s", "Ã©"], [" the", " cat", "s", "é"]),  # bytes, each a character of its own
    (["the", "cat", "##s"], [" the", " cat", "s"]),  # WordPiece
    (["M", "K", "T"], ["M", "K", "T"]),  # letters
])  # fmt: skip
def test_a_word_begins_with_a_space(tmp_path, pieces, shown):
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token=pieces[0])
    decoder = tokenizers.decoders.ByteLevel() if "Ġthe" in pieces else None
    ids = list(range(len(pieces)))
    assert words(saved(tmp_path, model, decoder), ids[::-1]) == shown[::-1]


def test_without_the_tokenizer_ids_will_do(tmp_path):
    assert words(str(tmp_path / "none"), [1, 2]) is None
