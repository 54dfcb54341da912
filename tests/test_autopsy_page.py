"""The page of an autopsy: complete in itself, numbers as in features.csv, a table that NumPy agrees with."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import FULL_DPI
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from experiments.trust import page_in_browser
from sae_jax.activations import store
from sae_jax.autoencoder.sae import SAE
from sae_jax.diagnosis import autopsy, columns
from sae_jax.diagnosis import texts as texts_lib
from sae_jax.exchange.encoders import Encoder, Opened
from sae_jax.exchange.sightings import Best
from sae_jax.models import words
from sae_jax.reports import feature_table, figures

D, N, K = 16, 300, 2
in_browser = pytest.mark.skipif(page_in_browser.browser() is None, reason="needs a browser: apt-get install chromium")

DRIVE = """
const rows = () => [...document.querySelectorAll("tr[data-feature]")].map(row => Number(row.dataset.feature));
const count = () => document.getElementById("count").textContent;
const press = name => document.querySelector(`th[data-name=${name}] button`).click();
const set = (id, value, event) => {
  const one = document.getElementById(id); one.value = value; one.dispatchEvent(new Event(event));
};
"""


@pytest.fixture(scope="module")
def dissected(tmp_path_factory):
    """The folder of an autopsy whose SAE has features of every fate, and the tokens and arrays it was of."""
    rng = np.random.default_rng(0)
    mean = 1.5 * rng.choice([-1, 1], size=D)
    x = np.float32(rng.normal(size=(3000, D)) + mean)
    W_enc, W_dec = (np.float32(rng.normal(size=(N, D))) for _ in range(2))
    W_dec[7] = 1.5 * W_dec[3]
    sae = SAE(W_enc=W_enc, b_enc=np.float32(-0.3 * rng.random(N)), W_dec=W_dec, b_dec=np.zeros(D, np.float32), k=K)
    folder = tmp_path_factory.mktemp("autopsy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(figures.STYLE, "figure.dpi", FULL_DPI)
        report = autopsy.dissect(sae, x, str(folder), n_probes=16)
    assert all(report["dead_features"].values())
    return folder, x, sae, report


@pytest.fixture(scope="module")
def table(dissected):
    """features.csv, column by column; words stay words."""
    with open(dissected[0] / "features.csv") as file:
        rows = list(csv.DictReader(file))
    words = ("fate", "revived_if_centred")
    return {key: np.array([row[key] for row in rows], None if key in words else float) for key in rows[0]}


def embedded(folder):
    page = (folder / "report.html").read_text()
    return json.loads(re.search(r'id="features">(.*?)</script>', page, re.S)[1])


def test_the_page_is_complete_in_itself(dissected):
    folder, _, _, report = dissected
    page = (folder / "report.html").read_text()
    assert page.count("<picture>") == 5
    assert not re.search(r"https?:|<link(?! rel=\"icon\" href=\"data:,\")|src=\"(?!data:)|@import|fetch\(", page)
    moved = report["if_centred"]
    n_dead = sum(map(len, report["dead_features"].values()))
    assert f"{moved['revived']} of {n_dead} dead features fire" in page
    fve, then = (f"{found['fve']:.3f}".replace("-", "−") for found in (report, moved))
    assert f"FVE\u00a0{fve}\u00a0→\u00a0{then}" in page  # beside what is revived
    assert {"density.png", "dead_over_tokens.png", "shifts.png", "alignment.png", "landscape.png"} <= {
        path.name for path in folder.iterdir()
    }


def test_its_numbers_are_those_of_features_csv(dissected, table):
    data = embedded(dissected[0])
    assert {name for name, *_ in data["columns"]} == set(feature_table.COLUMNS) - {"tokens_since_fired"}
    for (name, *_), values in zip(data["columns"], data["values"], strict=True):
        if name == "fate":
            assert [data["fates"][value] for value in values] == table[name].tolist()
        elif name == "revived_if_centred":
            assert [str(bool(value)) for value in values] == table[name].tolist()
        else:
            np.testing.assert_allclose(values, table[name], rtol=1e-5)


def test_the_new_columns_are_what_numpy_counts(dissected, table):
    _, x, sae, _ = dissected
    z = np.float64(x) @ np.float64(sae.W_enc).T + sae.b_enc
    bar = np.maximum(np.sort(z, axis=1)[:, -K], 0)
    kept = (z >= bar[:, None]) & (z > 0)
    np.testing.assert_array_equal(table["frequency"], kept.sum(axis=0) / len(x))
    np.testing.assert_allclose(table["distance_to_threshold"], (z - bar[:, None]).max(axis=0), atol=1e-4)
    dead = table["fate"] != "alive"
    assert (table["distance_to_threshold"][dead] < 0).all()
    assert (table["distance_to_threshold"][~dead] > -1e-6).all()
    units = np.float64(sae.W_dec) / np.linalg.norm(np.float64(sae.W_dec), axis=1, keepdims=True)
    cosines = units @ units.T - 3 * np.eye(N)
    np.testing.assert_array_equal(table["nearest_twin"], cosines.argmax(axis=1))
    np.testing.assert_allclose(table["twin_cosine"], cosines.max(axis=1), atol=1e-5)
    assert (table["nearest_twin"][7], table["nearest_twin"][3]) == (3, 7)


@pytest.mark.parametrize("n", [1, 2, 5, 12, 13])
def test_twins_of_blocks_that_do_not_divide(rng, monkeypatch, n):
    monkeypatch.setattr(columns, "BLOCK", 4)
    rows = rng.normal(size=(n, 3))
    if n > 4:
        rows[2] = 0  # like nothing: its cosine with all is 0
    twin, cosine = columns.nearest_twins(rows)
    if n == 1:
        assert (twin.tolist(), cosine.tolist()) == ([-1], [0])
        return
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.where(norms > 0, norms, 1)
    expected = np.where(np.eye(n), -np.inf, units @ units.T)
    np.testing.assert_allclose(cosine, expected.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(expected[np.arange(n), twin], expected.max(axis=1), atol=1e-6)


# -- tokens in their context -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_text(dissected, tmp_path_factory):
    """The same autopsy on a dataset that knows its tokens: 30 sequences of 100, token i being number i of 3,000."""
    root, (_, x, sae, _) = tmp_path_factory.mktemp("text"), dissected
    names = [f"word{i}" for i in range(len(x))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / "tokenizer")
    folder = store.folder_of(str(root), "d")
    rows = np.arange(len(x), dtype=np.int32)
    stored = store.Rows(x, rows, rows // 100, rows % 100)
    writer = store.Writer(folder, D, {"id": str(root / "tokenizer"), "layer": 1}, chunk=100)
    store.write({0: writer}, lambda start: [(0, {0: stored})])
    autopsy.dissect(sae, str(folder), str(root / "out"), n_probes=16)
    return root / "out"


def test_best_tokens_are_those_of_numpy(dissected, table, of_text):
    _, x, sae, _ = dissected
    texts = embedded(of_text)["texts"]
    assert [texts["vocabulary"][i] for i in texts["tokens"]] == [f"word{i}" for i in range(len(x))]
    assert texts["breaks"] == list(range(100, len(x), 100))
    W, stretches = np.float64(sae.W_enc), range(0, len(x), 256)
    for name, bias in (("alive", sae.b_dec), ("revived", x.mean(axis=0, dtype=np.float64))):
        z = (np.float64(x) - bias) @ W.T + sae.b_enc
        bar = np.maximum(np.sort(z, axis=1)[:, -K], 1e-300)
        acts = np.where(z >= bar[:, None], z, 0)
        revived = table["revived_if_centred"] == "True"
        for i in np.flatnonzero(revived if name == "revived" else table["fate"] == "alive"):
            tops = sorted((acts[s : s + 256, i].max(), s + acts[s : s + 256, i].argmax()) for s in stretches)[::-1]
            expected = [row for value, row in tops if value > 0][:5]
            assert texts["best"][i] == expected
    left = (table["fate"] != "alive") & (table["revived_if_centred"] == "False")
    assert all(len(texts["best"][i]) == 5 for i in np.flatnonzero(left))  # where it comes nearest


@in_browser
def test_a_feature_opens_with_its_tokens_in_context(of_text):
    texts = embedded(of_text)["texts"]
    feature = next(i for i, rows in enumerate(texts["best"]) if len(rows) == 5)
    found = page_in_browser.ask(of_text / "report.html", DRIVE + f"""
        set("find", "{feature}", "input");
        document.querySelector("tr[data-feature]").click();
        return [...document.querySelectorAll("#one li")].map(one =>
          [one.textContent, one.querySelector("mark").textContent]);
    """)  # fmt: skip
    for (text, marked), row in zip(found, texts["best"][feature], strict=True):
        begin = row // 100 * 100
        around = range(max(begin, row - 12), min(begin + 100, row + 6))
        assert (text, marked) == ("".join(f"word{i}" for i in around), f"word{row}")


def test_without_a_tokenizer_ids_are_shown(rng, tmp_path):
    assert words.words("nobody/has-this", [1, 2]) is None
    found = texts_lib.Texts(np.array([5, 7, 5]), np.array([-1, -1, -1]), "nobody/has-this")
    found.add(0, (Best(np.ones((1, 2)), np.array([[2, 0]])),) * 2)
    assert found.found(np.zeros(2, bool)) == {
        "vocabulary": [" 5", " 7"], "tokens": [0, 1, 0], "breaks": [], "best": [[2], [0]],
    }  # fmt: skip


def test_the_best_five_of_all_batches_are_kept_in_order():
    """Three features, three stretches a batch. One fires often, one once, one never: it shows where it came nearest."""
    found = texts_lib.Texts(np.arange(18) * 10 % 40, np.repeat([7, 8, 9], [4, 5, 9]), "")
    assert [found.wants(start) for start in (0, 17, 18)] == [True, True, False]
    score = [
        [[3.0, -5.0, -1.0], [1.0, -1.0, -2.0], [6.0, -3.0, -3.0]],
        [[6.0, 0.5, -4.0], [5.0, 0.0, -5.0], [0.0, -4.0, -6.0]],
        [[2.0, -6.0, -2.5], [4.0, -7.0, -7.0], [9.0, 9.0, 9.0]],  # of rows beyond the last token: none
    ]
    row = [[[0, 1, 1], [2, 3, 3], [5, 4, 4]], [[1, 0, 0], [3, 2, 2], [5, 4, 4]], [[0, 0, 0], [1, 1, 1], [6, 6, 6]]]
    for start, one, at in zip((0, 6, 12), map(np.array, score), map(np.array, row), strict=True):
        found.add(start, (Best(one, at), Best(-one, at)))
    said = found.found(np.zeros(3, bool))
    assert said["best"] == [[5, 7, 9, 13, 0], [6], [1, 3, 12, 4, 6]]  # of equal ones the first
    assert found.found(np.array([True, False, False]))["best"] == [[11, 2, 12, 0, 13], *said["best"][1:]]
    assert said["breaks"] == [4, 9]
    assert said["vocabulary"] == [" 0", " 10", " 20", " 30"]
    assert said["tokens"] == [*(4 * [0, 1, 2, 3]), 0, 1]


def test_columns_are_in_the_units_of_the_activations(rng):
    """All that is looked at is of activations times `scale`, but for shares and cosines."""
    n, zero = 6, np.zeros(3, np.float32)
    W = np.float32(rng.normal(size=(n, 3)))
    encoder = Encoder(W_enc=W, b_enc=np.zeros(n, np.float32), W_dec=2 * W, b_dec=zero, b_in=zero, k=1)
    opened = Opened(encoder, {}, "none", tokens_since_fired=np.arange(n))
    each = {key: rng.normal(size=n) for key in ("mean", "std", "largest", "margin")}
    shift = SimpleNamespace(mean=each["mean"], std=each["std"], n_tokens=50)
    here = SimpleNamespace(fates=np.full(n, "alive"), n_fired=np.arange(n), largest=each["largest"], shift=shift,
                           margin=each["margin"])  # fmt: skip
    found = columns.of(opened, here, np.zeros(n, bool), np.ones(n), 4.0)
    for name, key in {"mean_preactivation": "mean", "std_preactivation": "std", "largest_activation": "largest",
                      "distance_to_threshold": "margin"}.items():  # fmt: skip
        np.testing.assert_allclose(found[name], each[key] / 4)
    np.testing.assert_allclose(found["frequency"], np.arange(n) / 50)
    np.testing.assert_allclose(found["decoder_norm"], 2 * np.linalg.norm(W, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(found["tokens_since_fired"], np.arange(n))


# -- in a browser ----------------------------------------------------------------------------------------------------

@in_browser
def test_headings_sort_and_conditions_filter_as_numpy_does(dissected, table):
    found = page_in_browser.ask(dissected[0] / "report.html", DRIVE + """
        const out = {start: rows()};
        press("frequency"); out.down = rows();
        press("frequency"); out.up = rows();
        press("cosine_with_mean"); out.cosine = rows();
        set("fate", "dead", "change"); out.dead = [count(), rows()];
        set("fate", "revived", "change"); out.revived = count();
        set("fate", "", "change");
        set("find", "frequency > 0.001 and decoder_norm<4", "input"); out.both = [count(), rows()];
        set("find", "nonsense < 3", "input");
        out.nonsense = [count(), document.getElementById("find").getAttribute("aria-invalid")];
        set("find", "17, 4", "input"); out.two = rows();
        document.querySelector("tr[data-feature='17']").click();
        out.opened = document.querySelector("#one h3").textContent;
        set("find", "", "input");
        document.getElementById("view").scrollTop = 1e6; document.getElementById("view").clientHeight;
        out.drawn = rows().length;
        return out;
    """)  # fmt: skip
    shown = len(found["down"])
    assert 10 < shown < N / 2  # those in sight, and a few
    order = lambda key, sign: np.lexsort((np.arange(N), sign * table[key]))  # noqa: E731
    assert found["start"] == list(range(shown))
    assert found["down"] == order("frequency", -1)[:shown].tolist()
    assert found["up"] == order("frequency", 1)[:shown].tolist()
    assert found["cosine"] == order("cosine_with_mean", -1)[:shown].tolist()
    dead = table["fate"] != "alive"
    assert found["dead"][0] == f"{dead.sum()} of {N} features"
    assert found["dead"][1] == [i for i in order("cosine_with_mean", -1) if dead[i]][: len(found["dead"][1])]
    assert found["revived"] == f"{(table['revived_if_centred'] == 'True').sum()} of {N} features"
    both = (table["frequency"] > 0.001) & (table["decoder_norm"] < 4)
    assert found["both"][0] == f"{both.sum()} of {N} features"
    assert found["both"][1] == [i for i in order("cosine_with_mean", -1) if both[i]][: len(found["both"][1])]
    assert found["nonsense"][0].startswith("not understood")
    assert found["nonsense"][1] == "true"
    assert sorted(found["two"]) == [4, 17]
    assert found["opened"] == "Feature 17"
    assert found["drawn"] < N / 2


@in_browser
@pytest.mark.parametrize("width", page_in_browser.WIDTHS)
def test_the_page_fits_its_window_and_the_console_stays_empty(dissected, width, tmp_path):
    found = page_in_browser.look(Path(dissected[0], "report.html"), width, tmp_path)
    assert found == {
        "width": width, "page_width": width, "pictures": 5, "shown": 5, "console": [], "fine": True,
    }  # fmt: skip


# -- what is said of it ------------------------------------------------------------------------------------------------

BEGINS = ("25.0 % of the features (4 of 16) never fire on these 12,345 tokens: 6.2 % by ReLU, 18.8 % by {}.")
BIASED = ("The bias has 40 % of the mean (b·mu/‖mu‖²); what it lacks of it is 1.23 times as long as the variation, "
          "where a bias of zero would lack 2.50.")  # fmt: skip
WITHOUT = ("Its encoder subtracts no bias, so it sees the whole mean, 1.23 times as long as the variation; b_enc may "
           "make up for that.")  # fmt: skip
MOVED = ("With the bias moved to the mean and nothing else changed, 2 of the 4 dead features fire, 12.5 % are dead, "
         "and {}.")  # fmt: skip
STARTS = ("An untrained {} is forecast to start with 50.0 % dead, with its bias at the mean 0.0 %, at the geometric "
          "median 6.2 %.")  # fmt: skip
TOPK, LIKE_IT = "SAE of this size", "TopK SAE of this size that fires 7.2 features a token"


@pytest.mark.parametrize(("more", "of", "lines"), [
    ({}, {"k": 3}, [BEGINS.format("TopK"), BIASED, MOVED.format("FVE rises from 0.800 to 0.900"), STARTS.format(TOPK)]),
    ({"subtracts_b_dec": False}, {"k": 3},
     [BEGINS.format("TopK"), WITHOUT, MOVED.format("FVE rises from 0.800 to 0.900"), STARTS.format(TOPK)]),
    ({"bias_projection": None, "fve": 0.95}, {"rule": "relu"},
     [BEGINS.format("TopK"), MOVED.format("FVE falls from 0.950 to 0.900: they fire, and explain less"),
      STARTS.format(LIKE_IT)]),
    ({"fve": 0.9}, {"k": 3},
     [BEGINS.format("TopK"), BIASED, MOVED.format("FVE rises from 0.900 to 0.900"), STARTS.format(TOPK)]),
    ({"fve": None}, {"k": 3}, [BEGINS.format("TopK"), BIASED, MOVED.format(
        "FVE is not known: the target's activations are not given (--target)"), STARTS.format(TOPK)]),
    ({"dead_features": {"dead_by_topk": [], "dead_by_relu": []}}, {"rule": "threshold"},
     [BEGINS.format("TopK").replace("(4 of", "(0 of"), BIASED, STARTS.format(LIKE_IT)]),
])  # fmt: skip
def test_the_verdict_word_for_word(more, of, lines):
    found = {
        "dead_total": 0.25, "dead_by_relu": 0.0625, "dead_by_topk": 0.1875, "n_features": 16, "n_tokens": 12345,
        "dead_features": {"dead_by_topk": [1, 2, 3], "dead_by_relu": [5]}, "subtracts_b_dec": True, "l0": 7.2,
        "bias_projection": 0.4, "gamma_left": 1.234, "gamma_raw": 2.5, "fve": 0.8,
        "if_centred": {"revived": 2, "dead_total": 0.125, "fve": 0.9},
        "at_init": {key: {"dead_total": dead} for key, dead in (("none", 0.5), ("mean", 0.0),
                                                               ("geometric_median", 0.0625))},
    }  # fmt: skip
    encoder = Encoder(*(np.zeros(1),) * 5, **of)
    lines[0] = lines[0].replace("by TopK.", f"by {encoder.pathway}.")
    said = autopsy._verdict(found | more, Opened(encoder, {}, "ours", ("A note.",)))
    assert said == " ".join([*lines, "A note."])


def test_what_the_bias_lacks_and_where_the_dead_point_is_what_numpy_finds(rng):
    x = rng.normal(size=(3000, 12)) * np.linspace(0.5, 2, 12) + np.linspace(-3, 3, 12)
    W_enc = rng.normal(size=(40, 12))
    sae = SAE(W_enc=np.float32(W_enc), b_enc=np.full(40, -9, np.float32), W_dec=np.float32(W_enc),
              b_dec=np.float32(rng.normal(size=12)), k=3)  # fmt: skip
    found = autopsy.dissect(sae, np.float32(x), n_probes=64)
    mu, sigma = x.mean(axis=0), x.std(axis=0)
    left = mu - sae.b_dec
    assert found["gamma_left"] == pytest.approx(np.linalg.norm(left) / np.linalg.norm(sigma), rel=1e-4)
    order = np.argsort(-(left**2))[:10]
    assert [line["dimension"] for line in found["bias_missing"]] == order.tolist()
    for line, j in zip(found["bias_missing"], order, strict=True):
        expected = mu[j], sae.b_dec[j], left[j] ** 2 / (left @ left)
        assert [line[key] for key in ("mean", "bias", "share_of_missing")] == pytest.approx(expected, rel=1e-4)
    z = (x - sae.b_dec) @ W_enc.T - 9
    kept = np.argsort(-z, axis=1)[:, :3]
    fired = np.zeros_like(z, bool)
    np.put_along_axis(fired, kept, np.take_along_axis(z, kept, axis=1) > 0, axis=1)
    alive, positive = fired.any(axis=0), (z > 0).any(axis=0)
    cosine = W_enc @ mu / np.linalg.norm(W_enc, axis=1) / np.linalg.norm(mu)
    assert [int(which.sum()) > 1 for which in (alive, positive & ~alive, ~positive)] == [True] * 3
    for key, which in (("alive", alive), ("dead_by_topk", positive & ~alive), ("dead_by_relu", ~positive)):
        told = found["alignment_with_mean"][key]
        assert told["n"] == which.sum()
        assert told["cosine"] == pytest.approx(np.quantile(cosine[which], (0.25, 0.5, 0.75)), abs=1e-5)
