"""Activations that go straight from the model into training: the same as stored ones, and nothing is left on disk."""

import jax
import numpy as np
import pytest
from test_running import assert_equal, final_states

import sae_jax
from sae_jax.activations import files, pipeline
from sae_jax.errors import Refused
from sae_jax.models import extraction, streaming
from sae_jax.models.sources import open_source
from sae_jax.training import run as run_lib

torch = pytest.importorskip("torch", reason="needs the extra hf")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

CONTEXT, SEQUENCES, WIDTH = 12, 4, 16


@pytest.fixture
def config(tiny, tmp_path):
    """A random GPT-2 on a text of 1,400 characters, a token each."""
    torch.manual_seed(0)
    network = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=130, n_positions=32, n_embd=WIDTH, n_layer=3, n_head=2)
    )
    network.save_pretrained(tmp_path / "model")
    letters = {"<bos>": 0} | {chr(code): code for code in range(1, 130)}
    words = pytest.importorskip("tokenizers").Tokenizer(
        pytest.importorskip("tokenizers").models.BPE(vocab=letters, merges=[])
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("what the model reads, character by character; " * 30)
    model = tiny.data.model
    tiny.data.signal, model.id, model.text = "", str(tmp_path / "model"), str(tmp_path / "text.txt")
    model.layer, model.n_tokens, model.context, model.batch_size = 2, 1200, CONTEXT, SEQUENCES
    model.cache, model.stream = str(tmp_path / "cache"), True
    tiny.eval.n_tokens, tiny.eval.batch_size, tiny.data.statistics_tokens = 100, 50, 300
    return tiny


def test_streamed_rows_are_the_stored_ones_bit_by_bit(config):
    streamed = streaming.StreamedChunks(config.data.model)
    stored = files.open_chunks(extraction.extracted(config.data.model))
    assert streamed.rows == SEQUENCES * (CONTEXT - 1)
    n = min(stored.n_tokens, streamed.n_tokens)
    assert n >= 1024
    np.testing.assert_array_equal(streamed.tokens(0, n), stored.tokens(0, n))
    np.testing.assert_array_equal(streamed[7], streamed.tokens(7 * streamed.rows, 8 * streamed.rows))


def test_processes_share_out_what_one_would_stream(config):
    chunks = streaming.StreamedChunks(config.data.model)
    train = np.arange(len(chunks) - 3)

    def taken(process=0, processes=1):
        iterator = pipeline.batches(chunks, train, 32, 0, process, processes)
        found = [next(iterator) for _ in range(40)]
        iterator.close()
        return np.stack(found)

    np.testing.assert_array_equal(np.concatenate([taken(0, 2), taken(1, 2)], axis=1), taken())


def test_a_streamed_run_that_is_interrupted_ends_like_one_that_was_not_and_stores_nothing(
    config, tmp_path, monkeypatch
):
    whole = sae_jax.train(config, str(tmp_path / "whole"))
    assert whole["data"]["tokens_a_batch"] == SEQUENCES * (CONTEXT - 1)
    advance = run_lib.Run._next_inputs

    def dies(self, count):
        if self.step == 24:
            raise KeyboardInterrupt
        return advance(self, count)

    monkeypatch.setattr(run_lib.Run, "_next_inputs", dies)
    with pytest.raises(KeyboardInterrupt):
        sae_jax.train(config, str(tmp_path / "cut"))
    monkeypatch.undo()
    assert sae_jax.train(config, str(tmp_path / "cut"))["members"] == whole["members"]
    assert_equal(*(jax.device_get(final_states(config, tmp_path / name)) for name in ("whole", "cut")))
    assert not (tmp_path / "cache").exists()


def test_only_what_is_needed_again_is_kept(config, monkeypatch):
    source = open_source(config)
    runs = []
    forward = extraction.forward
    monkeypatch.setattr(extraction, "forward", lambda *a: runs.append(a[3]) or forward(*a))
    first = [x for x, _ in source.held_out()], list(source.statistics())
    count = len(runs)
    second = [x for x, _ in source.held_out()], list(source.statistics())
    assert count == len(set(runs)) == -(-100 // source._chunks.rows) + -(-300 // source._chunks.rows)
    assert len(runs) == count
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.concatenate(a), np.concatenate(b))


def test_what_cannot_be_streamed_is_refused(config):
    config.data.model.id, config.data.model.activations, config.data.model.layer = "af3", "x.npy", 0
    with pytest.raises(Refused, match=r"data.model.stream = True: False"):
        streaming.StreamedChunks(config.data.model)
