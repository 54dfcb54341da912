"""Activations that go straight from the model into training: the same as stored ones, and nothing is left on disk."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from processes import ROOT, Processes
from test_processes import TRAIN
from test_running import assert_equal, final_states

import sae_jax
from sae_jax.activations import files, pipeline
from sae_jax.config import flatten
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


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_streamed_run_that_is_interrupted_ends_like_one_that_was_not_and_stores_nothing(
    config, tmp_path, monkeypatch, backend
):
    if backend == "jax":
        pytest.importorskip("torchax")
    config.data.model.backend = backend
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


# -- on the devices ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_devices(config):
    pytest.importorskip("torchax")
    config.data.model.backend = "jax"
    return config


@pytest.mark.parametrize("batch_size", [32, 300])  # lanes that stay in their window, and that cross into the next
def test_batches_on_the_devices_are_those_of_the_host(on_devices, batch_size):
    chunks = streaming.StreamedChunks(on_devices.data.model)
    train, n = np.arange(len(chunks) - 3), 30
    host, device = (make(chunks, train, batch_size, 7) for make in (pipeline.batches, streaming.batches))
    expected = [next(host) for _ in range(n)]
    found = [next(device) for _ in range(n)]
    host.close()
    assert all(isinstance(x, jax.Array) for x in found)
    assert {len(x.sharding.device_set) for x in found} == {2}
    np.testing.assert_array_equal(found, expected)
    device.set_state({"next_index": 11})  # a pure function of the number
    np.testing.assert_array_equal(next(device), expected[11])


@pytest.mark.parametrize("mesh", ["", "member=2", "feature=2"])
def test_no_activation_comes_to_the_host(on_devices, tmp_path, monkeypatch, mesh):
    """Once training has begun nothing as wide as the stream is read or sent.

    A transfer guard sees what is sent unasked. On CPUs it lets everything be read, so reading is watched: what lies on
    two devices can only be read through `__array__` and `_value`.
    """
    begun, crossed = [], []
    array, advance, put = jax._src.array.ArrayImpl, run_lib.Run._next_inputs, jax.device_put
    read, value = array.__array__, array._value
    on_devices.train.devices, on_devices.checkpoint.every = 2, on_devices.train.steps
    on_devices.train.mesh = mesh

    def noticed(self, *args, **kwargs):
        crossed.extend([self.shape] * bool(begun and self.shape[-1:] == (WIDTH,)))
        return read(self, *args, **kwargs)

    def valued(self):
        crossed.extend([self.shape] * bool(begun and self.shape[-1:] == (WIDTH,)))
        return value.fget(self)

    def sent(x, *args, **kwargs):
        crossed.extend(a.shape for a in jax.tree.leaves(x) if begun and np.shape(a)[-1:] == (WIDTH,))
        return put(x, *args, **kwargs)

    def guarded(self, count):
        begun.append(self.step)
        with jax.transfer_guard_host_to_device("disallow"):
            x = advance(self, count)
        if self.step + count == on_devices.train.steps:
            assert crossed == []
            np.asarray(x)  # which is noticed
            assert set(crossed) == {x.shape}
            monkeypatch.undo()
        return x

    monkeypatch.setattr(array, "__array__", noticed)
    monkeypatch.setattr(array, "_value", property(valued))
    monkeypatch.setattr(jax, "device_put", sent)
    monkeypatch.setattr(run_lib.Run, "_next_inputs", guarded)
    sae_jax.train(on_devices, str(tmp_path / "w"))
    assert begun[-1] + on_devices.train.steps_per_dispatch == on_devices.train.steps
    assert len(set(crossed)) == 1


LOSSES = """
import json, sys
import jax
jax.config.update("jax_enable_x64", True)
from sae_jax import config as config_lib
from sae_jax.training import run, watching
import sae_jax
run.Run._draw = lambda *_: None
flat = json.load(open("config.json"))
losses = {}
for devices in (1, 2, 4):
    losses[devices] = found = []
    steps = watching.Watch.steps
    def kept(self, first, count, metrics, steps=steps, found=found):
        found.extend(loss for group in metrics for loss in group["loss"][:count].ravel().tolist())
        return steps(self, first, count, metrics)
    watching.Watch.steps = kept
    sae_jax.train(config_lib.from_identity(flat | {"train.devices": devices}), f"run{devices}")
    watching.Watch.steps = steps
json.dump(losses, open("losses.json", "w"))
"""


@pytest.mark.long
def test_one_two_and_four_devices_stream_the_same(on_devices, tmp_path):
    on_devices.train.steps, on_devices.eval.batch_size, on_devices.checkpoint.every = 50, 48, 50
    (tmp_path / "config.json").write_text(json.dumps(flatten(on_devices)))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", LOSSES], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses["1"]) == 50 * len(on_devices.members)
    for other in ("2", "4"):
        np.testing.assert_allclose(losses[other], losses["1"], rtol=1e-9)


@pytest.mark.long
@pytest.mark.usefixtures("x64")
def test_two_processes_stream_what_one_does(on_devices, tmp_path):
    """One of them is asked to stop on the way, and both stop and go on."""
    on_devices.train.steps, on_devices.train.steps_per_dispatch = 50, 5
    started = Processes(TRAIN.format(config=on_devices.to_json(), disturb="ask"), 2, tmp_path / "two")
    one = sae_jax.train(on_devices, str(tmp_path / "one"))
    for code, said in started.wait():
        assert code == 0, said
        assert "stopped on request at step" in said
    two = json.loads((tmp_path / "two/w/report.json").read_text())
    assert (two["devices"], one["devices"]) == (2, 1)
    for ours, theirs in zip(two["members"], one["members"], strict=True):
        for key in ("fve", "l0", "dead_total", "bias_projection"):
            assert ours["final"][key] == pytest.approx(theirs["final"][key], rel=1e-9), key
