import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_jax.errors import Refused
from sae_jax.models import inputs, network


def first(source, count):
    return [item for _, item in zip(range(count), source, strict=False)]


def test_built_in_sequences_are_variants_of_antibodies_and_the_dna_that_codes_for_them():
    sequences = first(inputs.read("proteins", ""), 40)
    assert all(set(one) <= set(inputs.AMINO_ACIDS) for one in [*sequences, *inputs.ANTIBODIES])
    nearest = max(inputs.ANTIBODIES, key=lambda whole: sum(a == b for a, b in zip(whole, sequences[0], strict=False)))
    same = np.mean([a == b for a, b in zip(sequences[0], nearest, strict=True)])
    assert 0.7 < same < 1
    back = {codon: letter for letter, codon in inputs.CODONS.items()}
    dna = first(inputs.read("dna", ""), 1)[0]
    assert len(back) == 20
    assert "".join(back[dna[i : i + 3]] for i in range(0, len(dna), 3)) == sequences[0]


def test_built_in_text_is_what_this_python_says_of_itself():
    from pydoc_data.topics import topics

    texts = first(inputs.read("text", ""), len(topics) + 40)
    assert texts[: len(topics)] == [topics[name] for name in sorted(topics)]
    assert all(len(one) >= inputs.MIN_DOCSTRING for one in texts[len(topics) :])
    assert texts == first(inputs.read("text", ""), len(topics) + 40)


def test_built_in_photos_are_pictures_and_always_the_same():
    pytest.importorskip("skimage", reason="needs the extra models")
    one, other = (first(inputs.read("images", ""), 3) for _ in range(2))
    for picture, again in zip(one, other, strict=True):
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        np.testing.assert_array_equal(picture, again)
    assert not np.array_equal(one[0], one[1])
    assert inputs.identity("images", "").startswith("photos of scikit-image")


def test_a_folder_of_pictures_is_known_by_their_names_and_sizes(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs the extra models")
    (tmp_path / "deep").mkdir()
    image.new("L", (4, 3), 200).save(tmp_path / "b.png")
    image.new("RGB", (5, 2), (1, 2, 3)).save(tmp_path / "deep" / "a.png")
    grey, colour = inputs.read("images", str(tmp_path))
    assert (grey.shape, colour.shape) == ((3, 4, 3), (2, 5, 3))
    assert (grey == 200).all()
    before = inputs.identity("images", str(tmp_path))
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert inputs.identity("images", str(tmp_path)) != before


def test_files_are_read_as_what_they_are(tmp_path):
    (tmp_path / "a.fasta").write_text(">one\nMKT\nAYI\n\n>two\nGSHM\n")
    (tmp_path / "plain.txt").write_text("MKT\nGSHM\n")
    assert list(inputs.read("proteins", str(tmp_path / "a.fasta"))) == ["MKTAYI", "GSHM"]
    assert list(inputs.read("dna", str(tmp_path / "plain.txt"))) == ["MKT", "GSHM"]
    assert inputs.identity("dna", str(tmp_path / "plain.txt")) != inputs.identity("dna", str(tmp_path / "a.fasta"))
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert list(inputs.read("text", str(tmp_path / "marked.txt"))) == ["one\ntwo"]
    assert inputs.identity("text", str(tmp_path / "marked.txt")).endswith(" without its mark")
    (tmp_path / "marked.fasta").write_bytes(b"\xef\xbb\xbf>one\nMKT\n>tw\xc3\xb6\nGSHM\n")
    assert list(inputs.read("proteins", str(tmp_path / "marked.fasta"))) == ["MKT", "GSHM"]
    (tmp_path / "odd.fasta").write_text(">one\nMKÄ\n", encoding="utf-8")
    with pytest.raises(Refused, match="data.model.proteins = [^:]*: proteins that can be read .line 2 is not ASCII"):
        inputs.identity("proteins", str(tmp_path / "odd.fasta"))  # before anything is extracted
    (tmp_path / "mixed.txt").write_text("MKT\n\n>two\nGSHM\n")
    with pytest.raises(Refused, match="data.model.dna = [^:]*: dna that can be read .line 3 is a header,"):
        list(inputs.read("dna", str(tmp_path / "mixed.txt")))
    with pytest.raises(Refused, match="data.model.images = [^:]*: a folder with images"):
        list(inputs.read("images", str(tmp_path)))
    with pytest.raises(Refused, match="data.model.text = [^:]*: text that can be read"):
        list(inputs.read("text", str(tmp_path / "none")))


def test_a_dataset_of_the_hub_gives_the_column_of_its_kind(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra models")
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(inputs.read("text", f"hf:{tmp_path}")) == ["one", "two"]
    with pytest.raises(Refused, match="data.model.proteins = 'hf:[^:]*: a dataset with .* a column 'sequence'"):
        list(inputs.read("proteins", f"hf:{tmp_path}"))


@given(st.lists(st.text("ab\n ", max_size=9), max_size=9).map("".join), st.integers(1, 6))
def test_a_long_text_is_read_in_pieces_that_make_it_up_again(tmp_path_factory, text, piece):
    """But for a blank line, a line's end or a space where they are cut; what is short is one document."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "PIECE", piece)
        found = list(inputs.read("text", str(path)))
    assert re.fullmatch("(?:\n\n|\n| |)".join(map(re.escape, found)), text)
    assert len(found) == 1 or len(text) > piece
    assert all(len(one) <= 4 * piece for one in found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "PIECE", piece)
        assert inputs.identity("text", str(path)).endswith(" in pieces") == (len(found) > 1)  # other tokens, other name


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 12))
def test_documents_run_on_after_one_another_in_sequences_of_one_length(lengths, room):
    documents = ["x" * length for length in lengths]  # a token a character, numbered through
    numbers = iter(range(10_000))

    def tokenizer(text, add_special_tokens=True, verbose=True):
        ids = [1] if text == "a" else [100 + next(numbers) for _ in text]
        return SimpleNamespace(input_ids=[7, *ids, 8] if add_special_tokens else ids)

    tokenizer.bos_token_id = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "read", lambda *_: iter(documents))
        found = list(network.packed(tokenizer, SimpleNamespace(text=""), room + 2))
    total = sum(length + 2 for length in lengths)  # a blank line ends each
    assert [token for one in found for token in one[1:-1]] == list(range(100, 100 + total // room * room))
    assert all(one[0] == 7 and one[-1] == 8 and len(one) == room + 2 for one in found)
