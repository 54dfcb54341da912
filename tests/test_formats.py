"""Export and import: the documented layouts run in plain NumPy and torch, the peers themselves, and what is refused."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import FULL_DPI
from etils import epath
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from experiments.trust import page_in_browser
from sae_jax import cli
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.dense import DenseSAE
from sae_jax.autoencoder.sae import SAE
from sae_jax.config import base
from sae_jax.diagnosis import autopsy
from sae_jax.errors import Refused
from sae_jax.exchange import formats, hub, sharing
from sae_jax.exchange.formats import Packed
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.preprocess import Preprocessing, whitening
from sae_jax.reports import figures
from sae_jax.runtime import checkpoint
from sae_jax.training.run import train

ROOT = Path(__file__).parents[1]

D, N, K = 12, 40, 5


@pytest.fixture
def x(rng):
    """Activations whose mean is 100 times as long as they vary."""
    x = rng.normal(size=(400, D)) * np.geomspace(1, 0.1, D)
    mean = rng.normal(size=D)
    return np.float32(x + 100 * np.linalg.norm(x.std(axis=0)) * mean / np.linalg.norm(mean))


def random_arrays(rng):
    shapes = {"W_enc": (N, D), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
    return {key: np.float32(rng.normal(size=shape)) for key, shape in shapes.items()}


def packed(rng, x, kind):
    """An SAE with weights of no particular structure behind each kind of preprocessing."""
    moments = moments_lib.moments(x, covariance=True)
    zero = np.zeros(D)
    before = {
        "baseline": Preprocessing(shift=zero, scale=3.0),
        "centred": Preprocessing(shift=moments.mean, scale=0.5),
        "whitened": whitening(moments).replace(scale=np.float64(2.0)),
        "layer_norm": Preprocessing(shift=0.1 * rng.normal(size=D), norm="layer_norm"),
        "layer_norm_unit": Preprocessing(shift=0.01 * rng.normal(size=D), scale=5.0, norm="layer_norm_unit"),
        "unit": Preprocessing(shift=x.mean(axis=0) / np.linalg.norm(x, axis=1).mean(), scale=2.0, norm="unit"),
    }[kind]
    arrays = random_arrays(rng)
    if kind == "baseline":
        arrays["b_dec"] = np.float32(x.mean(axis=0) * 3.0)
    return Packed(SAE(**arrays, k=K), before, {"model_name": "m", "layer": 3, "hook_name": "h", "mu": [1.0]})


def run_layout(files, folder, x):
    """Each format's forward pass, written from its documented layout: (active features, x̂)."""
    if "ae.pt" in files:
        w = torch.load(folder / "ae.pt", weights_only=True)
        t = torch.from_numpy(x)
        z = torch.relu(torch.nn.functional.linear(t - w["b_dec"], w["encoder.weight"], w["encoder.bias"]))
        top = z.topk(int(w["k"]), dim=1)
        kept = torch.zeros_like(z).scatter_(1, top.indices, top.values)
        return kept.numpy() > 0, (torch.nn.functional.linear(kept, w["decoder.weight"]) + w["b_dec"]).numpy()
    config = json.loads((folder / "cfg.json").read_text())
    if "sae.safetensors" in files:
        w = load_file(folder / "sae.safetensors")
        z = np.maximum((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
        back = 1.0, 0.0
    else:
        w = load_file(folder / "sae_weights.safetensors")
        flag = config["normalize_activations"]
        if flag == "layer_norm":
            back = x.std(axis=1, ddof=1, keepdims=True), x.mean(axis=1, keepdims=True)
            x = (x - back[1]) / (back[0] + 1e-5)
        elif flag == "constant_norm_rescale":
            back = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D), 0.0
            x = x / back[0]
        else:
            back = 1.0, 0.0
        z = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    kept = np.where(z >= np.partition(z, -config["k"], axis=1)[:, -config["k"], None], z, 0)
    return kept > 0, (kept @ w["W_dec"] + w["b_dec"]) * back[0] + back[1]


def run_ours(sae, before, x):
    """In float64, the preprocessing run instead of folded."""
    with jax.enable_x64(True):
        sae, before, x64 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (sae, before, x))
        y = before(x64)
        codes = sae_lib.encode(sae, y)
        found = np.asarray(before.invert(sae_lib.decode(sae, codes)))
        active = np.zeros((len(x), N), bool)
        np.put_along_axis(active, np.asarray(codes.indices), np.asarray(codes.values) > 0, axis=1)
    x64 = x.astype(np.float64)
    if before.norm.startswith("layer_norm"):
        size = np.sqrt(D) if before.norm.endswith("unit") else 1.0
        return active, found * size * np.sqrt(x64.var(axis=1, keepdims=True) + 1e-5) + x64.mean(axis=1, keepdims=True)
    return active, found * np.linalg.norm(x64, axis=1, keepdims=True) if before.norm == "unit" else found


@pytest.mark.parametrize("format", list(formats.FORMATS))
@pytest.mark.parametrize("kind", ["baseline", "centred", "whitened", "layer_norm", "layer_norm_unit", "unit"])
def test_the_layout_computes_what_we_do_at_gamma_100(rng, x, tmp_path, format, kind):
    given = packed(rng, x, kind)
    folder = tmp_path / "out"
    if given.before.norm != "none" and format != "saelens":
        with pytest.raises(Refused, match="only saelens has a flag"):
            sharing.export(given, str(folder), format)
        assert list(tmp_path.iterdir()) == []
        return
    sharing.export(given, str(folder), format)
    active, reconstruction = run_layout(os.listdir(folder), folder, x)
    expected_active, expected = run_ours(given.sae, given.before, x)
    same = (active == expected_active).all(axis=1)
    assert same.mean() > 0.99  # the others are ties
    error = np.linalg.norm(reconstruction - expected, axis=1)[same]
    # These rows are not of unit length, so x̂ is longer than x − mu; float32 keeps 1e-7 of the largest summand.
    allowed = 1e-5 * np.maximum(np.linalg.norm(x - x.mean(axis=0), axis=1), np.linalg.norm(expected, axis=1))[same]
    assert (error < allowed).all()


@pytest.mark.parametrize("format", list(formats.FORMATS))
@pytest.mark.parametrize("kind", ["whitened", "layer_norm", "unit"])
def test_import_export_import_is_the_identity(rng, x, tmp_path, format, kind):
    if kind != "whitened" and format != "saelens":
        kind = "centred"
    sharing.export(packed(rng, x, kind), str(tmp_path / "a"), format)
    first = sharing.load(str(tmp_path / "a"))
    sharing.export(first, str(tmp_path / "b"), format)
    second = sharing.load(str(tmp_path / "b"))
    assert first.metadata == second.metadata
    assert first.metadata["mu"] == [1.0]
    jax.tree.map(np.testing.assert_array_equal, (first.sae, first.before), (second.sae, second.before))
    for name, content in formats.encode(second, format).items():
        assert (tmp_path / "b" / name).read_bytes() == content


def test_formats_translate_into_one_another(rng, x, tmp_path):
    given = packed(rng, x, "centred")
    sharing.export(given, str(tmp_path / "start"), "saelens")
    previous = "start"
    for format in ("dictionary_learning", "sparsify", "saelens"):
        sharing.export(str(tmp_path / previous), str(tmp_path / format), format)
        previous = format
    first, last = (sharing.load(str(tmp_path / name)).sae for name in ("start", "saelens"))
    jax.tree.map(np.testing.assert_array_equal, first, last)


def test_saelens_ranking_by_decoder_norm_and_a_bias_not_applied_to_the_input(rng, x, tmp_path):
    sharing.export(packed(rng, x, "centred"), str(tmp_path / "a"), "saelens")
    config = json.loads((tmp_path / "a/cfg.json").read_text())
    config |= {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}
    (tmp_path / "a/cfg.json").write_text(json.dumps(config))
    w = {key: value.astype(np.float64) for key, value in load_file(tmp_path / "a/sae_weights.safetensors").items()}
    small = np.random.default_rng(1).normal(size=(50, D))
    norms = np.linalg.norm(w["W_dec"], axis=1)
    z = np.maximum((small @ w["W_enc"] + w["b_enc"]) * norms, 0)
    kept = np.where(z >= np.partition(z, -K, axis=1)[:, -K, None], z, 0)
    found = sharing.load(str(tmp_path / "a"))
    with jax.enable_x64(True):
        sae = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), found.sae)
        ours = np.asarray(sae_lib.decode(sae, sae_lib.encode(sae, jnp.asarray(small))))
    size = np.abs(w["b_dec"] @ w["W_enc"]).max()
    np.testing.assert_allclose(ours, (kept / norms) @ w["W_dec"] + w["b_dec"], atol=1e-6 * size)


def test_rows_without_length_rank_as_nothing_and_stay_zero(rng, tmp_path):
    """Of decoders that SAELens rescales by, shorter than 1 or of no length at all."""
    rows = np.float32(rng.normal(size=(N, D)))
    rows *= np.linspace(0, 0.9, N, dtype=np.float32)[:, None] / np.linalg.norm(rows, axis=1, keepdims=True)
    given = Packed(SAE(W_enc=np.float32(rng.normal(size=(N, D))), b_enc=np.float32(rng.normal(size=N)), W_dec=rows,
                       b_dec=np.zeros(D, np.float32), k=K), Preprocessing(shift=np.zeros(D)), {})  # fmt: skip
    sharing.export(given, str(tmp_path / "a"), "saelens")
    config = json.loads((tmp_path / "a/cfg.json").read_text()) | {"rescale_acts_by_decoder_norm": True}
    (tmp_path / "a/cfg.json").write_text(json.dumps(config))
    found, norms = sharing.load(str(tmp_path / "a")).sae, np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(found.W_enc, given.sae.W_enc * norms[:, None], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.b_enc, given.sae.b_enc * norms, rtol=1e-5, atol=1e-7)
    lengths = np.linalg.norm(found.W_dec, axis=1)
    np.testing.assert_allclose(lengths, np.arange(N) > 0, rtol=1e-5)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_threshold_goes_into_the_units_of_the_activations_once_it_is_set(rng, tmp_path, threshold, scale):
    arrays = random_arrays(rng)
    sae = DenseSAE(**arrays, k=K, threshold=np.float32(threshold), activation="batch_topk")
    given = Packed(sae, Preprocessing(shift=np.zeros(D), scale=scale), {})
    folded = formats.folded(given)
    assert folded.threshold == (threshold if threshold < 0 else threshold / scale)
    np.testing.assert_allclose(folded.b_enc, arrays["b_enc"] / scale, rtol=1e-6)
    opened = sharing.opened(given)
    assert opened.notes == (("Its threshold was never set, so every positive feature fires.",) if threshold < 0 else ())
    if threshold < 0:
        with pytest.raises(Refused, match="has not taken a step"):
            sharing.export(given, str(tmp_path / "out"))
        return
    for format in ("saelens", "dictionary_learning"):
        again = sharing.export(given, str(tmp_path / format), format)
        np.testing.assert_array_equal(again.encoder.threshold, np.full(N, threshold / scale, np.float32))
    np.testing.assert_array_equal(load_file(tmp_path / "saelens/sae_weights.safetensors")["threshold"],
                                  np.full(N, threshold / scale, np.float32))  # fmt: skip


@pytest.mark.parametrize(("n", "expansion"), [(5, 1), (12, 1), (13, 1), (24, 2), (40, 3)])
def test_what_sparsify_reads_says_all_it_asks_for(rng, n, expansion):
    for length in (1.0, 1.01):
        rows = rng.normal(size=(n, D))
        rows = np.float32(rows / np.linalg.norm(rows, axis=1, keepdims=True) * length)
        sae = SAE(W_enc=rows, b_enc=np.zeros(n, np.float32), W_dec=rows, b_dec=np.zeros(D, np.float32), k=3)
        config = json.loads(formats.encode(Packed(sae, Preprocessing(shift=np.zeros(D)), {}), "sparsify")["cfg.json"])
        assert config == {
            "activation": "topk", "expansion_factor": expansion, "num_latents": n, "k": 3, "d_in": D,
            "normalize_decoder": length == 1, "multi_topk": False, "skip_connection": False, "transcode": False,
        }  # fmt: skip
        assert isinstance(config["expansion_factor"], int)


def test_what_dictionary_learning_reads_of_topk_has_no_threshold(rng, x, tmp_path):
    sharing.export(packed(rng, x, "centred"), str(tmp_path / "a"), "dictionary_learning")
    state = torch.load(tmp_path / "a/ae.pt", weights_only=True)
    assert (state["threshold"].item(), state["k"].item()) == (-1, K)


@pytest.mark.parametrize(("groups", "widths"), [("10,40", [10, 30]), ("5,15,40", [5, 10, 25])])
def test_groups_are_written_as_widths_for_dictionary_learning(rng, groups, widths):
    arrays = random_arrays(rng)
    sae = DenseSAE(**arrays, k=K, threshold=np.float32(0.5), activation="batch_topk")
    given = Packed(sae, Preprocessing(shift=np.zeros(D)), {"config": {"sae.groups": groups}})
    state = torch.load(io.BytesIO(formats.encode(given, "dictionary_learning")["ae.pt"]), weights_only=True)
    assert state["group_sizes"].tolist() == widths


def test_relu_keeps_no_number_of_features(rng, tmp_path):
    arrays = random_arrays(rng)
    given = Packed(DenseSAE(**arrays, k=0), Preprocessing(shift=np.zeros(D)), {})
    sharing.export(given, str(tmp_path / "a"))
    again = formats.decode(epath.Path(tmp_path / "a"))
    assert (again.sae.k, again.sae.activation, again.before.scale) == (0, "relu", 1)
    sharing.export(str(tmp_path / "a"), str(tmp_path / "b"), "dictionary_learning")
    assert "k" not in json.loads((tmp_path / "b/config.json").read_text())["trainer"]


@pytest.mark.parametrize(("kind", "flag"), [
    ("layer_norm", "layer_norm"), ("layer_norm_unit", "layer_norm"), ("unit", "constant_norm_rescale"),
])  # fmt: skip
def test_a_card_names_the_norm_that_is_left_to_the_library(rng, x, kind, flag):
    card = sharing.model_card(packed(rng, x, kind), "saelens", "mine")
    assert f"Each token goes through `{flag}`, as the configuration says." in card
    assert "folded into the weights" not in card


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of members of different size, or whitened, and so in different groups."""
    config = base()
    config.sae.n_features, config.sae.k = 64, 4
    config.data.signal, config.data.gamma, config.data.d_model = "sparse", 20.0, 16
    config.data.n_true_features, config.data.n_active, config.data.statistics_tokens = 32, 3, 2000
    config.train.steps, config.train.batch_size, config.train.steps_per_dispatch, config.train.devices = 40, 32, 4, 1
    config.eval.n_tokens, config.eval.batch_size, config.checkpoint.every = 2000, 500, 20
    config.members = ConfigDict({
        "baseline": {"sae": {"center": "none"}},
        "centred": {"sae": {"center": "mean"}},
        "wide": {"sae": {"n_features": 96}},
        "white": {"sae": {"whiten": True}},
    })
    workdir = str(tmp_path_factory.mktemp("run") / "w")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(figures.STYLE, "figure.dpi", FULL_DPI)  # its page is looked at in a browser
        return config, workdir, train(config, workdir)


def test_members_with_a_mean_of_their_own_come_out_with_it(tiny, tmp_path):
    """Their tokens differ by that alone, and are as far from 0 as their gamma says."""
    tiny.train.steps, tiny.data.gamma = 0, 3.0
    tiny.members = ConfigDict({"near": {"seed": 0}, "far": {"data": {"gamma": 9.0}}})
    train(tiny, str(tmp_path / "w"))
    near, far = (sharing.load(str(tmp_path / "w"), member).metadata for member in ("near", "far"))
    assert (near["gamma_raw"], far["gamma_raw"]) == (pytest.approx(3, rel=0.05), pytest.approx(9, rel=0.05))
    np.testing.assert_allclose(far["mu"], 3 * np.asarray(near["mu"]), atol=0.1 * np.linalg.norm(near["mu"]))


@pytest.mark.parametrize("before", [False, True])
def test_a_member_without_settings_of_its_own_comes_out_as_well(tiny, tmp_path, before):
    """Runs of before have no list of their members."""
    tiny.members = ConfigDict({"a": {}, "b": {"seed": 5}, "wide": {"sae": {"n_features": 128}}})
    train(tiny, str(tmp_path / "w"))
    if before:
        path = tmp_path / "w/config.json"
        held = json.loads(path.read_text())
        assert held.pop("members") == ["a", "b", "wide"]
        path.write_text(json.dumps(held))
        train(tiny, str(tmp_path / "w"))  # goes on, with nothing to do
    both, wide = (group["sae"]["W_enc"] for group in checkpoint.saved(str(tmp_path / "w")).groups)
    for name, W_enc in (("a", both[0]), ("b", both[1]), ("wide", wide[0])):
        packed = sharing.load(str(tmp_path / "w"), name)
        assert packed.metadata["member"] == name
        np.testing.assert_array_equal(packed.sae.W_enc, W_enc)
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_a_run_is_read_without_what_training_alone_needs(run):
    """Adam's moments are twice the SAEs; nothing of it takes a device's memory."""
    _, workdir, _ = run
    lean, whole = (checkpoint.saved(workdir, whole).groups for whole in (False, True))
    assert all("moments" not in group for group in lean)
    for mine, theirs in zip(lean, whole, strict=True):
        moments = theirs.pop("moments")
        assert sum(a.size for a in jax.tree.leaves(moments)) >= 2 * theirs["sae"]["W_enc"].size
        assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(mine))
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)


@pytest.mark.parametrize("member", ["baseline", "centred", "wide", "white"])
def test_a_member_of_a_run_comes_out_with_its_own_deaths(run, member, tmp_path):
    config, workdir, report = run
    final = next(m["final"] for m in report["members"] if m["name"] == member)
    loaded = sharing.export(workdir, str(tmp_path / "out"), "sparsify", member=member)
    assert loaded.sae.W_enc.shape == (96 if member == "wide" else 64, 16)
    found = autopsy.dissect(str(tmp_path / "out"), config)  # other tokens of the same data
    assert abs(found["dead_total"] - final["dead_total"]) < 0.1
    assert found["bias_projection"] == pytest.approx(final["bias_projection"], abs=0.01)
    metadata = json.loads((tmp_path / "out/metadata.json").read_text())
    assert metadata["num_dead_features"] == round(final["dead_total"] * loaded.sae.W_enc.shape[0])
    assert metadata["gamma_raw"] == pytest.approx(20, rel=0.1)
    assert np.linalg.norm(metadata["mu"]) > 0
    card = (tmp_path / "out/README.md").read_text()
    assert f"{metadata['num_dead_features']} of" in card
    assert (tmp_path / "out/deaths.png").exists()


def test_what_would_be_pushed_is_the_folder_under_its_name_and_a_card(run, tmp_path):
    sharing.export(run[1], str(tmp_path / "mine"), member="centred")
    files = hub.commit_files(epath.Path(tmp_path / "mine"), with_card=True)
    assert {"README.md", "mine/cfg.json", "mine/sae_weights.safetensors", "mine/README.md"} <= files.keys()
    card = files["README.md"].decode()
    pictures = [line[4:-1] for line in card.splitlines() if line.startswith("![](")]
    assert pictures
    assert set(pictures) <= files.keys()
    assert card.startswith("---\nlibrary_name: saelens\n")


def test_the_page_of_a_run_is_complete_in_itself(run):
    page = Path(run[1], "report.html").read_text()
    assert page.count("<picture>") == 6
    assert page.count("data:image/png;base64,") == 12  # each for a desk and for a phone
    assert "http" not in page.split("base64")[0].replace("http-equiv", "")
    for member in ("baseline", "centred", "wide"):
        assert member in page


@pytest.mark.skipif(page_in_browser.browser() is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", page_in_browser.WIDTHS)
def test_the_page_fits_its_window_and_the_console_stays_empty(run, width, tmp_path):
    found = page_in_browser.look(Path(run[1], "report.html"), width, tmp_path)
    assert found == {
        "width": width, "page_width": width, "pictures": 6, "shown": 6, "console": [], "fine": True,
    }  # fmt: skip
    assert (tmp_path / f"page_{width}.png").stat().st_size > 20_000


def test_autopsy_counts_what_numpy_counts(rng, tmp_path, x):
    sae = SAE(
        W_enc=np.float32(rng.normal(size=(N, D))), b_enc=np.float32(0.1 * rng.normal(size=N)),
        W_dec=np.float32(rng.normal(size=(N, D))), b_dec=0.97 * x.mean(axis=0), k=2,
    )  # fmt: skip
    found = autopsy.dissect(Packed(sae, Preprocessing(shift=np.zeros(D)), {}), x, str(tmp_path / "w"))
    z = (x.astype(np.float64) - sae.b_dec) @ sae.W_enc.T.astype(np.float64) + sae.b_enc
    kept = np.argsort(-z, axis=1)[:, :2]
    fired = np.isin(np.arange(N), kept[np.take_along_axis(z, kept, axis=1) > 0])
    relu = (z <= 0).all(axis=0)
    assert 0 < relu.sum() < (~fired).sum() < N
    assert found["dead_features"] == {
        "dead_by_topk": np.flatnonzero(~relu & ~fired).tolist(), "dead_by_relu": np.flatnonzero(relu).tolist(),
    }  # fmt: skip
    assert found["dead_by_relu"] == relu.mean()
    centred = z + (sae.b_dec - x.mean(axis=0, dtype=np.float64)) @ sae.W_enc.T
    assert found["if_centred"]["dead_by_relu"] == (centred <= 0).all(axis=0).mean()
    assert found["gamma_left"] == pytest.approx(0.03 * found["gamma_raw"], rel=1e-3)
    assert found["bias_projection"] == pytest.approx(0.97)
    lines = (tmp_path / "w/features.csv").read_text().splitlines()
    assert len(lines) == N + 1
    assert sum("dead_by_relu" in line for line in lines) == relu.sum()
    mean = float(lines[1].split(",")[4])
    assert mean == pytest.approx(z.mean(axis=0)[0], rel=1e-4)


def spoil_missing(folder):
    arrays = load_file(folder / "sae_weights.safetensors")
    del arrays["b_enc"]
    save_file(arrays, folder / "sae_weights.safetensors")


def spoil_shape(folder):
    arrays = load_file(folder / "sae_weights.safetensors")
    save_file({**arrays, "b_dec": np.zeros(D + 1, np.float32)}, folder / "sae_weights.safetensors")


def spoil_nan(folder):
    arrays = load_file(folder / "sae_weights.safetensors")
    arrays["W_dec"][0, 0] = np.nan
    save_file(arrays, folder / "sae_weights.safetensors")


def spoil_config(**changes):
    def spoil(folder):
        config = json.loads((folder / "cfg.json").read_text())
        for key, value in changes.items():
            config[key] = value
            if value is None:
                del config[key]
        (folder / "cfg.json").write_text(json.dumps(config))

    return spoil


@pytest.mark.parametrize(("spoil", "said"), [
    (spoil_missing, "b_enc = 'missing'"),
    (spoil_shape, "b_dec = (13,): the shape (12,)"),
    (spoil_nan, "W_dec = 'not finite'"),
    (spoil_config(k=None), "k = 'missing'"),
    (spoil_config(k=41), "k = 41: 1 to the 40"),
    (spoil_config(architecture="gated"), "b_gate, b_mag, r_mag = 'missing'"),
    (spoil_config(architecture="abstopk"), "AbsTopK is not supported here, diagnose --sae takes it"),
    (spoil_config(architecture="temporal"), "temporal SAEs are not supported"),
    (spoil_config(architecture="of tomorrow"), "one of standard, topk"),
    (spoil_config(normalize_activations="expected_average_only_in"), "normalize_activations"),
    (spoil_config(d_sae=39), "the shape"),
    (lambda folder: (folder / "cfg.json").unlink(), "cfg.json"),
    (lambda folder: (folder / "cfg.json").write_text("{"), "cfg.json"),
    (lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"rubbish"), "safetensors"),
    (lambda folder: (folder / "sae_weights.safetensors").unlink(),
     "a folder with one of sae_weights.safetensors, ae.pt, sae.safetensors, params.npz, params.safetensors, "),
])  # fmt: skip
def test_folders_that_are_not_right_are_refused_in_one_line(rng, x, tmp_path, capsys, spoil, said):
    sharing.export(packed(rng, x, "centred"), str(tmp_path / "a"), "saelens")
    spoil(tmp_path / "a")
    assert cli.main(["export", f"--from={tmp_path}/a", "--format=sparsify", f"--out={tmp_path}/b"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("went_off",)


def test_a_pickle_is_not_opened(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/ae.pt").write_bytes(pickle.dumps({"encoder.weight": Bomb()}))
    assert cli.main(["export", "--from=a", "--format=saelens", "--out=b"]) == 2
    assert "nothing else is unpickled" in capsys.readouterr().err
    np.savez("a/params.npz", W_enc=np.array([Bomb()]))  # NumPy pickles what it has no type for
    assert cli.main(["export", "--from=a/params.npz", "--format=saelens", "--out=b"]) == 2
    assert "an npz file of arrays" in capsys.readouterr().err
    Path("a/params.npz").unlink()
    torch.save({"encoder.weight": Bomb()}, "a/ae.pt")
    assert cli.main(["export", "--from=a", "--format=saelens", "--out=b"]) == 2
    assert sorted(os.listdir()) == ["a"]


def test_another_width_than_the_activations(rng, x, tmp_path, capsys):
    sharing.export(packed(rng, x, "centred"), str(tmp_path / "a"), "saelens")
    np.save(tmp_path / "x.npy", rng.normal(size=(500, D + 1)).astype(np.float32))
    code = cli.main(["diagnose", f"--sae={tmp_path}/a", f"--activations={tmp_path}/x.npy", f"--workdir={tmp_path}/w"])
    assert code == 2
    assert f"width {D + 1}, not {D}" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(("argv", "said"), [
    (["export", "--out=o"], "--workdir = None"),
    (["export", "--workdir=RUN"], "--out"),
    (["export", "--workdir=RUN", "--out=o"], "--member = None: one of baseline, centred, white, wide"),
    (["export", "--workdir=RUN", "--out=o", "--member=x"], "--member = 'x': one of"),
    (["export", "--workdir=RUN", "--out=o", "--format=onnx"], "--format = 'onnx': one of saelens"),
    (["export", "--workdir=RUN", "--out=full", "--member=wide"], "--out = 'full': a folder that does not exist"),
    (["export", "--workdir=RUN", "--out=full/file/o", "--member=wide"], "--out = 'full/file/o': a folder that can be"),
    (["export", "--from=nowhere", "--out=o"], "--from = 'nowhere': a folder or file"),
    (["export", "--from=full", "--out=o"], "a folder with one of"),
    (["export", "--workdir=RUN", "--out=o", "--member=wide", "--push=a/b"], "--push = 'a/b': a repository on the hub"),
    (["export", "--from=hf://a/b/c", "--out=o"], "--from = 'hf://a/b/c': a repository on the hub"),
    (["export", "--from=hf://a/b/../../full", "--out=o"], "a folder inside the repository"),
    (["diagnose", "--sae=full", "--activations=x.npy", "--workdir=o", "--k=3"], "--k = 3: leave it out"),
])  # fmt: skip
def test_wrong_flags_write_nothing(run, tmp_path, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").write_text("")
    assert cli.main([flag.replace("RUN", run[1]) for flag in argv]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert os.listdir() == ["full"]


@pytest.mark.long
def test_the_peers_themselves_agree():
    """SAELens and sparsify load what we export; an SAE that SAELens trained is examined. In a process of its own."""
    command = [sys.executable, "-m", "experiments.trust.peer_conformance", "--peers=saelens,sparsify",
               "--gammas=100", "--steps=20", "--tokens=4000"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("identity True") == 8  # five conditions, of which sparsify refuses two
    assert "trained by saelens" in done.stdout
    assert "using eager implementation of sparse decoder" in done.stdout  # sparsify's word, with triton and without
