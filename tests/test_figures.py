"""Figures: no text on another or outside, nothing smaller than a page can take, and what titles count is drawn."""

import itertools
import re

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.text import Text

from sae_jax.autoencoder.death import Shift
from sae_jax.outliers.probes import Band
from sae_jax.reports import autopsy_figures, diagnosis_figures, figures, page

LONG = "learning rate of three thousandths, centred on the geometric median of AuxK_of_dictionary_learning"
CASES = {
    "two": (["baseline", "centred"], 6), "one": (["baseline"], 6), "one evaluation": (["baseline", "centred"], 1),
    "eight": (["b", LONG, "baseline", "centred", "centred, whitened", "frozen bias", LONG + " again", "AuxK"], 9),
}  # fmt: skip
LAWS = ("paper", "finite_gamma", "token_integral", "two_gammas", "spectrum", "probe")


def history(names, count, dead=None):
    """Members whose bias does not move; every second one is centred, at a projection of 0.98."""
    def values(i):
        relu, topk = (0.0, 0.0) if i % 2 else (0.4, 0.57)
        relu, topk = (dead / 3, dead - dead / 3) if dead is not None else (relu, topk)
        return {"dead_by_relu": relu, "dead_by_topk": topk, "dead_total": relu + topk, "l0": 8.0,
                "fve": 0.9 if i % 2 else -40.0, "bias_projection": 0.98 * (i % 2),
                "bias_relative_error": 0.02 if i % 2 else 1.0}  # fmt: skip

    return [{"step": 250_000 * t, "members": {n: values(i) for i, n in enumerate(names)}} for t in range(count)]


def shift_of(rng, scale, n=400):
    mean = scale * rng.standard_normal(n)
    return Shift(mean, np.ones(n), mean < -4, (mean >= -4) & (mean < 10) & (scale > 1), 4096)


def outliers(n, carry):
    return [{"dimension": 3 * i + 1, "mean_over_sigma": 5.0, "share_of_mean_square": carry / n} for i in range(n)]


def remedies(dead, counted):
    deaths = {"dead_by_relu": dead / 4, "dead_by_topk": dead - dead / 4, "dead_total": dead}
    names = ("none", "mean", "geometric_median", "layer_norm_centred", "unit_norm_centred", "whitening")
    return {name: {"probe": deaths, "measured": deaths if counted else None} for name in names}


def of_runs(rng):
    for case, (names, count) in CASES.items():
        for dead in (None, 0.0, 1.0) if case == "two" else (None,):
            entries = history(names, count, dead)
            members = [{"name": n, "init": entries[0]["members"][n], "final": entries[-1]["members"][n]} for n in names]
            moved = {n: [("at init", shift_of(rng, 20.0)), ("step 1,000", shift_of(rng, 0.1))] for n in names}
            for narrow in (False, True):
                where = f"{case}, {dead} dead, {'narrow' if narrow else 'wide'}"
                yield f"deaths, {where}", figures.deaths(entries, narrow)
                yield f"bias, {where}", figures.bias_convergence(entries, narrow)
                yield f"curves, {where}", figures.curves(entries, narrow)
                yield f"comparison, {where}", figures.comparison(members, narrow)
                if dead is None and case != "eight":
                    yield f"shifts, {where}", figures.shifts(moved, narrow)


def of_diagnoses(rng):
    x = np.abs(rng.standard_normal((200, 256)))
    for n, count, carry in ((0, 0, 0.0), (1, 1, 0.8), (31, 31, 0.1), (50, 241, 0.4), (3, 3, 1.0)):
        for narrow in (False, True):
            yield f"landscape, {n} of {count}, {narrow}", figures.landscape(x, outliers(n, carry), count, narrow)
    share = np.geomspace(5e-4, 0.5, 20)
    for dead, measured in ((0.0, True), (0.0, False), (0.94, True), (1.0, True)):
        band = Band(share, np.full(20, dead), np.full(20, dead), np.full(20, dead))
        laws = {name: {"dead_by_relu": dead / 4, "dead_total": dead} for name in LAWS}
        curve = diagnosis_figures.death_curve(band, 0.016, laws, laws["probe"] if measured else None)
        yield f"death_curve, {dead}, {measured}", curve
        yield f"remedies, {dead}, {measured}", diagnosis_figures.remedies(remedies(dead, measured))
    for scale in (7.0, 0.01):
        shift, signal = scale * rng.standard_normal(300), 1 + 0.1 * rng.standard_normal(300)
        yield f"shift_signal, {scale}", diagnosis_figures.shift_signal(shift, signal, shift + 4 * signal, 1.0, 4.0)
    yield "spectrum", diagnosis_figures.spectrum({"as they are": 1 / share[::-1], "after LayerNorm": 1 / share[::-1]})


def of_autopsies(rng):
    for narrow, scale, n_tokens in itertools.product((False, True), (0.3, 20.0), (60, 20_000, 3_000_000)):
        shift, case = shift_of(rng, scale)._replace(n_tokens=n_tokens), f"{narrow}, {scale}, {n_tokens}"
        n_fired = np.where(shift.dead_by_relu | shift.dead_by_topk, 0, rng.integers(1, n_tokens, len(shift.mean)))
        yield f"density, {case}", autopsy_figures.density(n_fired, shift, narrow)
        yield f"alignment, {case}", autopsy_figures.alignment(rng.standard_normal(len(shift.mean)) / 20, shift, narrow)
        seen = [*(n for n in 1024 * 2 ** np.arange(12) if n < n_tokens), n_tokens]
        curve = [[int(n), 0.3, 0.3 + 0.6 / (1 + i)] for i, n in enumerate(seen)]
        yield f"dead_over_tokens, {case}", autopsy_figures.dead_over_tokens(curve, 0.02 * (scale > 1), narrow=narrow)


def texts(figure, monkeypatch):
    """Every text that is drawn, with the box it takes."""
    found, draw = [], Text.draw

    def seen(self, renderer):
        if self.get_visible() and self.get_text().strip():
            found.append((self, self.get_window_extent(renderer)))
        draw(self, renderer)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", seen)
        figures.png(figure)
    latest = {id(text): (text, box) for text, box in found}
    return list(latest.values())


@pytest.mark.parametrize("kind", [of_runs, of_diagnoses, of_autopsies])
def test_no_text_lies_on_another_or_outside_or_is_too_small(kind, rng, monkeypatch):
    wrong = []
    for name, figure in kind(rng):
        drawn = texts(figure, monkeypatch)
        width, height = figure.get_size_inches() * figures.STYLE["figure.dpi"]
        slack = 0.02 * figures.STYLE["figure.dpi"]
        for text, box in drawn:
            if box.x0 < -slack or box.y0 < -slack or box.x1 > width + slack or box.y1 > height + slack:
                wrong.append(f"{name}: outside: {text.get_text()!r}")
            if text.get_fontsize() * min(1, 5.5 / figure.get_figwidth()) < 7:
                wrong.append(f"{name}: {text.get_fontsize()} points: {text.get_text()!r}")
        for (a, box), (b, other) in itertools.combinations(drawn, 2):
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            if across > slack and min(box.y1, other.y1) - max(box.y0, other.y0) > slack:
                wrong.append(f"{name}: {a.get_text()!r} on {b.get_text()!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("narrow", [False, True])
def test_all_panels_of_shifts_have_one_axis_that_holds_the_widest(narrow, rng):
    members = {"baseline": [("at init", shift_of(rng, 20.0)), ("later", shift_of(rng, 5.0))],
               "centred": [("at init", shift_of(rng, 0.1)), ("later", shift_of(rng, 0.3))]}  # fmt: skip
    limits = {axis.get_xlim() for axis in figures.shifts(members, narrow).axes}
    assert len(limits) == 1
    low, high = limits.pop()
    widest = members["baseline"][0][1].mean
    assert low <= np.percentile(widest, 1) < np.percentile(widest, 99) <= high


@pytest.mark.parametrize(("n", "count", "carry"), [(1, 1, 0.8), (31, 31, 0.1), (50, 241, 0.4), (2, 63, 1.0)])
def test_a_landscape_marks_as_many_dimensions_as_it_counts(n, count, carry, rng):
    given = outliers(n, carry) + (outliers(8, 1e-6) if (n, count) == (2, 63) else [])  # these carry nothing
    axis = figures.landscape(np.abs(rng.standard_normal((20, 200))), given, count).axes[0]
    (marks,) = [line for line in axis.get_lines() if line.get_label() == "marked"]
    said = re.match(r"(\d+)(?: of (\d+))? outlier dimensions? carr\w+ (\d+) % of ‖mu‖²", axis.get_title())
    marked = len(marks.get_xdata())
    assert (int(said[1]), int(said[2] or said[1])) == (marked, count)
    assert int(said[3]) == round(100 * sum(o["share_of_mean_square"] for o in given[:marked]))
    assert [int(x) for x in marks.get_xdata()] == [o["dimension"] for o in given[:marked]]


def test_only_a_panel_without_deaths_says_so():
    figure = figures.deaths(history(["baseline", "centred"], 4))
    said = ["none dead" in [text.get_text() for text in axis.texts] for axis in figure.axes]
    assert said == [False, True]


def test_a_projection_that_stays_at_098_is_told_from_1_and_from_the_frame():
    axes = figures.bias_convergence([e | {"members": {"c": e["members"]["b"]}} for e in history("ab", 5)]).axes
    for axis, value in zip(axes, (0.98, 0.02, 0.0), strict=True):
        low, high = axis.transData.inverted().transform(axis.transAxes.transform([(0, 0.03), (0, 0.97)]))[:, 1]
        assert low < value < high
    low, high = axes[0].get_ylim()
    assert (1 - 0.98) / (high - low) > 0.2
    assert axes[0].get_lines()[-1].get_ydata()[0] == 1


def test_shift_signal_shows_where_the_points_are(rng):
    shift, signal = 7 * rng.standard_normal(300), 1 + 0.1 * rng.standard_normal(300)
    (axis,) = diagnosis_figures.shift_signal(shift, signal, shift + 4 * signal, 1.0, 4.0).axes
    for values, (low, high) in ((shift, axis.get_xlim()), (signal, axis.get_ylim())):
        assert low < values.min() < values.max() < high
        assert np.ptp(values) > 0.8 * (high - low)


# Machado, Oliveira and Fernandes 2009, full severity; linear RGB.
BLIND = {
    "nobody": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour, blindness):
    """CIE L*a*b* of a colour as they see it."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(BLIND[blindness]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLIND)
@pytest.mark.parametrize(("colours", "least"), [
    ((figures.RELU, figures.TOPK, figures.ALIVE), 25), (figures.MEMBER_COLOURS, 12),
])  # fmt: skip
def test_colours_stay_apart_whoever_looks(colours, least, blindness):
    for a, b in itertools.combinations(colours, 2):
        assert np.linalg.norm(lab(a, blindness) - lab(b, blindness)) > least, (a, b)


def test_the_page_has_the_colours_of_its_pictures():
    for name in ("RELU", "TOPK", "ALIVE"):
        assert f"--{name.lower()}: {getattr(figures, name)};" in page.STYLE
