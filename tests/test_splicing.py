"""Splicing into tiny decoders of random weights, against blocks called one by one and a softmax in float64."""

import numpy as np
import pytest
from test_models import DEPTH, WIDTH, gemma3, gpt2, modernbert, saved, settings  # noqa: F401

from sae_jax.errors import Refused
from sae_jax.models import adapters, extraction, splicing

torch = pytest.importorskip("torch", reason="needs the extra hf")


@pytest.fixture
def decoder(settings, monkeypatch, tmp_path):  # noqa: F811
    """GPT-2's class, and its settings."""
    network, words, _ = gpt2()
    saved(monkeypatch, settings, tmp_path / "model", "gpt2", network, words)
    return adapters.load(settings, head=True), settings


def by_hand(network, ids, layer, change):
    """−log p of the tokens behind a BOS and one token: `change` acts on the stream of all but BOS at a layer."""
    body = network.run.transformer
    with torch.no_grad():
        x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
        for number in range(DEPTH + 1):
            if number == layer:
                x = torch.cat([x[:, :1], change(x[:, 1:])], dim=1)
            if number < DEPTH:
                x = body.h[number](x)
                x = x[0] if isinstance(x, tuple) else x
        logits = (body.ln_f(x) @ body.wte.weight.T).double().numpy()[:, 1:-1]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, ids.numpy()[:, 2:, None], axis=-1).ravel()


@pytest.mark.parametrize("layer", [0, 1, 2, DEPTH])
def test_the_stream_itself_gives_the_clean_loss_and_its_mean_the_ablated_one(decoder, layer, rng):
    network, model = decoder
    model.layer = layer
    batch = next(network.batches())
    ids = batch.inputs["input_ids"]
    clean = splicing.losses(network, model, batch)
    np.testing.assert_array_equal(splicing.losses(network, model, batch, lambda x: x), clean)
    np.testing.assert_allclose(clean, by_hand(network, ids, layer, lambda x: x), rtol=1e-4)
    assert clean.shape == (ids.shape[0] * (ids.shape[1] - 2),)  # BOS predicts nothing that counts, nor does the last

    mean = rng.normal(size=WIDTH).astype(np.float32)
    ablated = splicing.losses(network, model, batch, lambda x: np.broadcast_to(mean, x.shape))
    expected = by_hand(network, ids, layer, lambda x: torch.from_numpy(mean).expand_as(x))
    np.testing.assert_allclose(ablated, expected, rtol=1e-4)
    assert np.abs(ablated - clean).mean() > 1e-3  # so the comparison means something

    seen = []
    splicing.losses(network, model, batch, lambda x: (seen.append(x), x)[1])
    rows = extraction.forward(network, model, batch, 0, [layer])[layer]
    np.testing.assert_array_equal(seen[0], rows.x)  # what an SAE is given here is what it was trained on


def test_special_tokens_are_spliced_where_they_are_kept(decoder):
    network, model = decoder
    batch = next(network.batches())
    counts = {}
    for model.keep_special_tokens in (False, True):
        seen = []
        found = splicing.losses(network, model, batch, lambda x, seen=seen: (seen.append(len(x)), 0 * x)[1])
        counts[model.keep_special_tokens] = (seen[0], len(found))
    sequences, length = batch.real.shape
    assert counts == {False: (sequences * (length - 1), sequences * (length - 2)),
                      True: (sequences * length, sequences * (length - 1))}  # fmt: skip


def test_hooks_are_gone_afterwards_even_if_the_replacement_fails(decoder):
    network, model = decoder
    batch = next(network.batches())
    clean = splicing.losses(network, model, batch)
    with pytest.raises(ZeroDivisionError):
        splicing.losses(network, model, batch, lambda x: 1 / 0)
    np.testing.assert_array_equal(splicing.losses(network, model, batch), clean)


def test_gemma_has_its_head(settings, monkeypatch, tmp_path):  # noqa: F811
    network, words, _ = gemma3()
    saved(monkeypatch, settings, tmp_path / "model", "tiny/gemma3", network, words)
    loaded = adapters.load(settings, head=True)
    batch = next(loaded.batches())
    clean = splicing.losses(loaded, settings, batch)
    np.testing.assert_array_equal(splicing.losses(loaded, settings, batch, lambda x: x), clean)
    assert np.abs(splicing.losses(loaded, settings, batch, lambda x: 0 * x) - clean).mean() > 1e-3


def test_what_predicts_no_next_token_is_refused(settings, monkeypatch, tmp_path):  # noqa: F811
    settings.id = "minilm-l6"
    with pytest.raises(Refused, match="a decoder of text"):
        adapters.load(settings, head=True)
    network, words, _ = modernbert()
    saved(monkeypatch, settings, tmp_path / "model", "modernbert", network, words)
    with pytest.raises(Refused, match="data.model.id = 'modernbert'"):
        adapters.load(settings, head=True)
    network, words, _ = gpt2()
    saved(monkeypatch, settings, tmp_path / "decoder", "gpt2", network, words)
    loaded = adapters.load(settings, head=True)
    settings.layer = DEPTH + 1
    with pytest.raises(Refused, match=f"data.model.layer = {DEPTH + 1}: 0 to {DEPTH}"):
        splicing.losses(loaded, settings, next(loaded.batches()), lambda x: x)


def test_recovered_is_one_for_the_stream_itself_and_none_where_ablation_costs_nothing():
    assert splicing.recovered(3.0, 5.0, 3.0) == 1
    assert splicing.recovered(3.0, 5.0, 5.0) == 0
    assert splicing.recovered(3.0, 5.0, 3.5) == pytest.approx(0.75)
    assert splicing.recovered(3.0, 3.0, 3.5) is None
