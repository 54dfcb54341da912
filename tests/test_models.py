"""Extraction, on random-weight models of the classes that the hub serves; nothing is downloaded."""

import numpy as np
import pytest

from sae_jax.activations import files, models, store
from sae_jax.config import base
from sae_jax.errors import Refused

torch = pytest.importorskip("torch", reason="needs the extra hf")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")


def gemma3():
    config = transformers.Gemma3TextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=2))


def pythia():
    config = transformers.GPTNeoXConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return transformers.GPTNeoXForCausalLM(config)


class Letters:
    """A tokenizer of single characters with a BOS token."""

    bos_token_id = 2
    all_special_ids = (0, 1, 2)

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return transformers.BatchEncoding({"input_ids": [3 + ord(letter) % 50 for letter in text]})


@pytest.fixture
def settings(tmp_path):
    model = base().data.model
    model.id, model.layer, model.n_tokens, model.context, model.batch_size = "tiny/model", 2, 600, 12, 4
    model.text, model.cache = str(tmp_path / "text.txt"), str(tmp_path / "cache")
    (tmp_path / "text.txt").write_text("what the model reads, character by character; " * 20)
    return model


@pytest.mark.parametrize("make", [gemma3, gpt2, pythia])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_layer_is_what_the_model_itself_reports(make, layer):
    torch.manual_seed(0)
    network = make().eval()
    ids = torch.randint(3, 60, (2, 7))
    expected = network(ids, output_hidden_states=True).hidden_states[layer]
    np.testing.assert_allclose(models.residual_streams(network, ids, [layer])[layer], expected.detach(), atol=1e-6)


def test_many_layers_come_from_one_pass():
    network = gpt2().eval()
    ids = torch.randint(3, 60, (2, 7))
    expected = network(ids, output_hidden_states=True).hidden_states
    found = models.residual_streams(network, ids, [2, 0])
    assert set(found) == {0, 2}
    for layer, x in found.items():
        np.testing.assert_allclose(x, expected[layer].detach(), atol=1e-6)


def test_nothing_behind_the_layer_is_computed(monkeypatch):
    network = gpt2().eval()
    network.transformer.h[2].register_forward_hook(lambda *_: pytest.fail("ran on"))
    assert models.residual_streams(network, torch.randint(3, 60, (2, 7)), [1, 2])[2].shape == (2, 7, 16)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(Refused, match=r"data.model.layer = 3: 0 \(embeddings\) to 2"):
        models.residual_streams(gpt2().eval(), torch.randint(3, 60, (1, 4)), [0, 3])


def test_rows_leave_special_tokens_out_and_say_where_they_come_from(settings):
    torch.manual_seed(0)
    network = gemma3().eval()
    parts = [part[2] for _, part in models.rows(network, Letters(), settings, [2])]
    rows = store.Rows(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    assert len(rows.x) >= 600
    assert 2 not in rows.token_id
    assert rows.position.min() == 1  # BOS stood at 0
    row = 11 * 5 + 3  # sequence 5 of 11 kept tokens each
    sequence = next(ids for i, ids in enumerate(models.sequences(Letters(), settings)) if i == 5)
    assert (rows.sequence_id[row], rows.position[row], rows.token_id[row]) == (5, 4, sequence[4])
    expected = network(torch.tensor([sequence]), output_hidden_states=True).hidden_states[2][0, 4].detach()
    np.testing.assert_allclose(rows.x[row], expected, atol=1e-5)
    settings.keep_special_tokens = True
    kept = next(models.rows(network, Letters(), settings, [2]))[1][2]
    assert (kept.token_id == 2).sum() == 4


def test_rows_may_begin_later_and_are_the_same(settings):
    torch.manual_seed(0)
    network = gemma3().eval()
    whole = list(models.rows(network, Letters(), settings, [1, 2]))
    later = list(models.rows(network, Letters(), settings, [1, 2], start=300))
    assert 0 < len(later) < len(whole)
    assert later[0][0] <= 300
    for (first, parts), (first_later, parts_later) in zip(whole[-len(later) :], later, strict=True):
        assert first == first_later
        for layer in (1, 2):
            for a, b in zip(parts[layer], parts_later[layer], strict=True):
                np.testing.assert_array_equal(a, b)


def test_extraction_writes_a_dataset_once(settings, monkeypatch):
    torch.manual_seed(0)
    network = gemma3().eval()
    monkeypatch.setattr(models, "load", lambda _: (network, Letters()))
    folder = models.extracted(settings)
    chunks = files.open_chunks(folder)
    assert chunks.d_model == 16
    assert len(chunks) * chunks.rows >= 512
    assert chunks.identity["layer"] == 2
    monkeypatch.setattr(models, "load", lambda _: pytest.fail("loaded again"))
    assert models.extracted(settings) == folder
    settings.layer = 1
    with pytest.raises(pytest.fail.Exception):
        models.extracted(settings)


def test_layers_extracted_together_are_found_one_by_one(settings, monkeypatch):
    torch.manual_seed(0)
    network = gemma3().eval()
    monkeypatch.setattr(models, "load", lambda _: (network, Letters()))
    folders = models.extract(settings, [0, 1, 2], settings.cache)
    monkeypatch.setattr(models, "load", lambda _: pytest.fail("loaded again"))
    for layer in range(3):
        settings.layer = layer
        assert models.extracted(settings) == folders[layer]
        assert files.open_chunks(folders[layer]).identity["layer"] == layer


def test_a_model_that_cannot_be_had_is_refused(settings, tmp_path):
    settings.id = str(tmp_path / "no-such-model")
    with pytest.raises(Refused, match=r"data.model.id"):
        models.load(settings)
