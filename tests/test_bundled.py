import numpy as np
import pytest
import torch

from sae_jax.activations import bundled, models
from sae_jax.errors import Refused


def test_every_layer_of_one_pass_equals_the_blocks_run_one_by_one(monkeypatch):
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(3)])

    def run(x):
        for block in blocks:
            x = torch.tanh(block(x))

    batches = [torch.randn(4, 5, 6) for _ in range(3)]
    keep = np.ones((4, 5), bool)
    keep[:, 0] = False
    monkeypatch.setitem(bundled.MODELS, "toy", lambda rng: bundled.Model(run, blocks, iter((b, keep) for b in batches)))
    found = bundled.activations("toy", [1, 3], 40)
    assert {layer: x.shape for layer, x in found.items()} == {1: (40, 6), 3: (40, 6)}
    x = torch.cat(batches)
    with torch.inference_mode():
        first = blocks[0](x)
        third = blocks[2](torch.tanh(blocks[1](torch.tanh(first))))
    for layer, expected in ((1, first), (3, third)):
        np.testing.assert_allclose(found[layer], expected.numpy()[:, 1:].reshape(-1, 6)[:40], rtol=1e-5, atol=1e-6)
    assert not blocks[0]._forward_hooks


def test_positions_of_images_are_tokens(rng):
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)  # 2 images of 3 channels
    rows = bundled._tokens(x, None, rng)
    assert rows.shape == (40, 3)
    np.testing.assert_array_equal(rows[7], x[0, :, 1, 2])
    many = bundled._tokens(rng.normal(size=(2, 3, 30, 30)).astype(np.float32), None, rng)
    assert many.shape == (2 * bundled.POSITIONS, 3)


def test_unknown_models_and_layers_are_refused(monkeypatch):
    with pytest.raises(Refused, match="one of gemma-3-270m, minilm"):
        bundled.activations("gpt-9", [1], 10)
    toy = bundled.Model(print, torch.nn.ModuleList([torch.nn.Linear(2, 2)]), iter(()))
    monkeypatch.setitem(bundled.MODELS, "toy", lambda rng: toy)
    with pytest.raises(Refused, match="layers"):
        bundled.activations("toy", [2], 10)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    for name in ("minilm-l6", "antiberty", "efficientnet-lite0"):
        with pytest.raises(Refused, match=r"sae-jax\[bundled\]"):
            bundled.activations(name, [1], 10)


def test_generated_antibodies_are_made_of_residues():
    assert all(set(sequence) <= set(bundled.AMINO_ACIDS) for sequence in bundled.ANTIBODIES)
    assert set(bundled.MODELS) == {models.GEMMA, "minilm-l6", "antiberty", "efficientnet-lite0"}
