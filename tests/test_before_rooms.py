"""Runs and datasets that were written before the package had rooms still restore, go on and read."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

import sae_jax
from sae_jax.activations import files
from sae_jax.config import from_identity

ARCHIVE = Path(__file__).parent / "data/before_rooms.tar.gz"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder as it was: tokens.npy, three datasets of it, and a run stopped at step 30 of 40."""
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.3 has none, and 3.12 asks
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, **safely)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 2**-7), ("float16", 2**-8)])
def test_a_dataset_reads(old, dtype, tolerance):
    x = np.load("tokens.npy")
    chunks = files.open_chunks(f"data_{dtype}/activations/tokens/2.0.0")
    found = chunks.tokens(0, len(x))
    assert found.shape == x.shape
    np.testing.assert_allclose(found, x, atol=tolerance * 4, rtol=tolerance)


def test_a_run_goes_on_and_ends_as_it_did(old):
    identity = json.loads(Path("run/config.json").read_text())
    report = sae_jax.train(from_identity(identity), "run")
    known = json.loads(Path("report_at_the_end.json").read_text())
    saes = np.load("sae_at_the_end.npz")
    assert report["step"] == known["step"] == 40
    for member, before in zip(report["members"], known["members"], strict=True):
        assert {k: v for k, v in member["init"].items() if k in before["init"]} == before["init"]
        for key, value in before["final"].items():
            assert member["final"][key] == pytest.approx(value, abs=1e-4), key
        sae = sae_jax.load("run", member["name"]).sae
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            np.testing.assert_allclose(getattr(sae, name), saes[f"{member['name']}_{name}"], atol=1e-4)


def test_the_sae_of_a_run_that_is_not_finished_loads_and_reconstructs(old):
    x = np.load("tokens.npy")
    for member in json.loads(Path("report_at_the_end.json").read_text())["members"]:
        name = member["name"]
        loaded = sae_jax.load("run", name)
        assert loaded.metadata["step"] == 30
        values, indices = sae_jax.features("run", x, member=name)
        assert values.shape == indices.shape == (len(x), loaded.sae.k)
        error = x.astype(np.float64) - sae_jax.reconstruct("run", x, member=name)
        fve = 1 - np.sum(error**2) / np.sum((x - x.mean(axis=0, dtype=np.float64)) ** 2)
        assert fve == pytest.approx(loaded.metadata["final"]["fve"], abs=0.1)  # that is of the held-out tokens
