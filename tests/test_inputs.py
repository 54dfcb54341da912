import numpy as np
import pytest

from sae_jax.errors import Refused
from sae_jax.models import inputs


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


def test_files_are_read_as_what_they_are(tmp_path):
    (tmp_path / "a.fasta").write_text(">one\nMKT\nAYI\n\n>two\nGSHM\n")
    (tmp_path / "plain.txt").write_text("MKT\nGSHM\n")
    assert list(inputs.read("proteins", str(tmp_path / "a.fasta"))) == ["MKTAYI", "GSHM"]
    assert list(inputs.read("dna", str(tmp_path / "plain.txt"))) == ["MKT", "GSHM"]
    assert inputs.identity("dna", str(tmp_path / "plain.txt")) != inputs.identity("dna", str(tmp_path / "a.fasta"))
    with pytest.raises(Refused, match="data.model.images = .*: a folder with images"):
        list(inputs.read("images", str(tmp_path)))
    with pytest.raises(Refused, match="data.model.text = .*: text that can be read"):
        list(inputs.read("text", str(tmp_path / "none")))


def test_a_dataset_of_the_hub_gives_the_column_of_its_kind(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra models")
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(inputs.read("text", f"hf:{tmp_path}")) == ["one", "two"]
    with pytest.raises(Refused, match="data.model.proteins = .*: a dataset with .* a column 'sequence'"):
        list(inputs.read("proteins", f"hf:{tmp_path}"))
