"""Every script runs from end to end at its smallest scale, with one of what is alike, and writes what it says."""

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import sae_jax
from experiments.death import architectures, bias_timescales, pilots_scored, race, rivals
from experiments.paper import regimes, toys
from experiments.trust import ce_recovered
from sae_jax import config as config_lib
from sae_jax.activations import synthetic
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.errors import Refused
from sae_jax.models.facts import MODELS, PAPER
from sae_jax.sweeps import jobs
from sae_jax.training import step as step_lib

ROOT = Path(__file__).parents[1]
FEWER = {
    "paper.fig6_centering": {"DIRECTIONS": ("one",)},
    "death.remedies_compared": {"GAMMAS": (20.0,), "ARMS": ("none", "AuxK", "encoder bias", "whitening", "batch norm",
                                                      "resampling", "ghost gradients")},
    "death.race": {"ARMS": {name: race.ARMS[name] for name in ("balance", "annealed_d", "multi_topk", "resampling",
                                                               "ghost_gradients")}},
    "death.architectures": {"ARCHITECTURES": {name: architectures.ARCHITECTURES[name] for name in ("topk", "relu")},
                            "WEIGHTS": (0.1, 1.0), "AGAIN": 1, "SEEDS": (0,)},
    "trust.concept_f1": {"SEEDS": (0,), "ARMS": {"centred 1": {"sae": {"center": "mean"}, "share": 1}}},
    "death.one_dimension": {"VARIANTS": {}},
    "paper.regimes": {"PARTS": ("base", "k_aux", "frozen", "long_20")},
    "death.auxk_idle": {"ARMS": {"AuxK on the encoder": (4, True, False)}},
    "speed.bench_ensemble": {"SHAPES": ((32, 128, 3, 32),), "MEMBERS": 2},
}  # fmt: skip


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("arm", race.ARMS)
def test_every_arm_of_the_race_can_be_run(arm, tmp_path):
    config_lib.check(race.settings("9", "smoke", race.ARMS[arm], tmp_path))


def test_forecasts_are_scored_against_the_runs_of_the_same_size(tmp_path, monkeypatch):
    head = "layer,arm,seed,n,learning_rate,dead_total\n"
    runs = ["2,plain,0,100,0.0003,0.2", "2,plain,1,100,0.0003,0.3", "2,plain,0,4096,1,0.9", "9,plain,0,100,1,0.5"]
    pairs = ["2,plain,0,100,0.0024,0.4", "2,plain,0,100,0.0008,0.1", "2,plain,1,100,0.0008,0.2",
             "2,plain,1,100,0.0024,0.2", "13,plain,0,100,1,0", "13,plain,0,100,2,0"]  # fmt: skip
    (tmp_path / "race.csv").write_text(head + "\n".join(runs))
    (tmp_path / "pilots.csv").write_text(head + "\n".join(pairs))
    monkeypatch.setattr(pilots_scored, "HERE", tmp_path)
    (found,) = pilots_scored.scored().values()
    expected = 100 * (np.sqrt(0.405 * 0.105) - 0.005 + 0.2) / 2
    assert found == pytest.approx({"low": 15, "high": 30, "forecast": expected, "run": 25})
    off = pytest.approx(25 - expected)
    assert pilots_scored.errors(pilots_scored.scored()) == {"plain": (off, off), "all": (off, off)}
    (tmp_path / "pilots.csv").write_text(head + "\n".join([*pairs, pairs[0]]))
    with pytest.raises(Refused, match="pilots.csv = 3: 2 rows for seed 0"):
        pilots_scored.scored()


def test_the_page_says_of_forecasts_what_the_tables_say():
    text = (ROOT / "experiments/death/alive.md").read_text()
    rows = pilots_scored.scored()
    assert "\n".join(pilots_scored.table(rows)) in text
    mean = {arm: f"{found[0]:.1f}" for arm, found in pilots_scored.errors(rows).items()}
    said = "over all {}: {all} points (asked: 5); plain {plain}, balance {balance}, AuxK {auxk}."
    assert said.format(len(rows), **mean) in " ".join(text.split())


@pytest.mark.parametrize(("script", "tables", "pictures"), [
    ("paper.fig1_mechanism", ["fig1_mechanism"], ["fig1_mechanism"]),
    ("paper.fig2b_landscape", ["fig2b_landscape"], ["fig2b_gemma-3-270m", "fig2b_minilm-l6"]),
    pytest.param("paper.fig4a_theory", ["fig4a_theory"], ["fig4a_theory"], marks=pytest.mark.long),
    pytest.param("paper.fig6_centering", ["fig6_rates", "fig6_synthetic"], ["fig6_centering"], marks=pytest.mark.long),
    pytest.param("paper.figS7_real_dynamics", ["figS7_real_dynamics"], ["figS7_real_dynamics"], marks=pytest.mark.long),
    pytest.param("paper.lr_sensitivity", ["lr_sensitivity"], ["lr_sensitivity"],
                 marks=[pytest.mark.drawn, pytest.mark.long]),
    pytest.param("paper.auxk_when", ["auxk_when"], [], marks=pytest.mark.long),
    pytest.param("paper.regimes", ["regimes", "regimes_auxk"], ["regimes"], marks=pytest.mark.long),
    pytest.param("death.remedies_compared", ["remedies_compared"], [], marks=pytest.mark.long),
    pytest.param("death.bias_timescales", ["bias_timescales", "bias_interventions"], [], marks=pytest.mark.long),
    ("death.auxk_idle", ["auxk_idle"], []),
    pytest.param("death.race", ["race"], [], marks=pytest.mark.long),
    pytest.param("death.architectures", ["architectures"], ["architectures"], marks=pytest.mark.long),
    pytest.param("trust.concept_f1", ["concept_f1"], [], marks=pytest.mark.long),
    pytest.param("death.one_dimension", ["one_dimension"], [], marks=pytest.mark.long),
    pytest.param("speed.bench_ensemble", ["bench_ensemble"], [], marks=pytest.mark.long),
    ("speed.bfloat16_error", ["bfloat16_error"], []),
])  # fmt: skip
def test_a_script_writes_its_table_and_its_picture(script, tables, pictures, tmp_path, monkeypatch):
    module = importlib.import_module(f"experiments.{script}")
    for name, value in FEWER.get(script, {}).items():
        monkeypatch.setattr(module, name, value)
    module.main(tmp_path, "smoke")
    for name in tables:
        assert rows(tmp_path / f"{name}.csv")
    for name in pictures:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("words", "said"), [
    ("death.race --workdir={tmp}/w --layers=99", "data.model.layer = 99: 0 to 18 for gemma-3-270m"),
    ("death.race --layers=9,gpt-3", "--layers = 'gpt-3': a number, or MODEL-NUMBER of {models}"),
    ("death.race --arms=plain,pain", "--arms = 'pain': {arms}"),
    ("paper.figS7_real_dynamics --workdir={tmp}/w --layers=synthetic",
     "--layers = 'synthetic': a number, or MODEL-NUMBER of {models}"),
    ("paper.figS7_real_dynamics --activations=13=x",
     "--activations = '13=x': LAYER=PATH of one of the layers 9"),
    ("paper.auxk_when --workdir={tmp}/w --layers=13,99", "data.model.layer = 99: 0 to 18 for gemma-3-270m"),
    ("death.race {there}", "words = '{there}': flags alone, as --workdir=PATH (--help lists them)"),
    ("paper.fig2a_death_by_model --tabel=x",
     "Unknown command line flag 'tabel'. Did you mean: table ? (--help lists the flags)"),
    ("paper.fig2a_death_by_model --table={there}",
     "--table = '{there}': a table (CSV) of this kind, with a line or more"),
])  # fmt: skip
def test_a_script_refuses_in_one_line(tmp_path, words, said):
    there = tmp_path / "there.csv"
    there.write_text(",".join(jobs.COLUMNS) + "\n")
    known = {"there": there, "tmp": tmp_path, "models": ", ".join(MODELS), "arms": ", ".join(race.ARMS)}
    name, *rest = words.format(**known).split()
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *rest], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, f"sae_jax: {said.format(**known)}\n")
    assert os.listdir(tmp_path) == ["there.csv"]


def test_no_script_reads_its_flags_but_through_command():
    for path in (ROOT / "experiments").glob("*/*.py"):
        assert "app.run" not in path.read_text(), path


def test_help_lists_the_flags_of_a_script():
    command = [sys.executable, "-m", "experiments.paper.figS7_real_dynamics", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    for flag in ("--workdir", "--scale", "--condition", "--layers", "--activations"):
        assert f"  {flag}:" in done.stdout


COLUMNS = ",".join(jobs.COLUMNS)
GOOD = {float: "1", str: "a", int: "2"}


def test_a_table_of_a_sweep_is_read_as_what_it_holds_or_has_none_of_what_is_wanted(tmp_path):
    path = tmp_path / "results.csv"
    line = ",".join("" if key == "fve" else GOOD[kind] for key, kind in jobs.KINDS.items())
    path.write_text(f"\ufeff{COLUMNS}\n{line}\n", encoding="utf-8")  # as spreadsheets save it
    (row,) = jobs.read_table(path)
    assert (row["name"], row["gamma"], row["steps"], row["fve"]) == ("a", 1.0, 2, None)
    with pytest.raises(Refused, match="results.csv of a sweep, with untrained layers"):
        jobs.read_table(path, "untrained layers", lambda row: row["steps"] == 0)


@pytest.mark.parametrize(("text", "said"), [
    (None, "that can be read"),
    ("", f"of this kind, with the columns {', '.join(jobs.COLUMNS)}"),
    (COLUMNS.replace(",gamma,", ",gama,") + "\n", "of this kind, with the columns gamma"),
    (COLUMNS + "\n", "of this kind, with a line or more"),
    (COLUMNS + "\n1,2\n", "another number of columns"),
    (COLUMNS + "\n" + "," * len(jobs.COLUMNS) + "\n", "another number of columns"),
    (COLUMNS + "\n" + ",".join("x" for _ in jobs.COLUMNS) + "\n", "invalid literal for int"),
    (COLUMNS + "\n" + ",".join("1.5" for _ in jobs.COLUMNS) + "\n", "invalid literal for int"),
    (COLUMNS + "\n" + ",".join("x" if kind is float else GOOD[kind] for kind in jobs.KINDS.values()) + "\n",
     "could not convert"),
    ("\udcff", "that can be read"),
])  # fmt: skip
def test_a_table_that_is_none_of_a_sweep_is_refused(tmp_path, text, said):
    path = tmp_path / "results.csv"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Refused, match=re.escape(said)):
        jobs.read_table(path)


@pytest.mark.long
def test_an_export_at_work_in_a_hooked_model(tmp_path):
    command = [sys.executable, "-m", "experiments.trust.consumers", f"--out={tmp_path}/out.csv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert {row["what"] for row in rows(tmp_path / "out.csv") if row["tool"] == "hooked"} >= {"L0", "x_hat, distance"}


@pytest.mark.long
def test_a_slice_of_the_fault_campaign(tmp_path):
    """An export killed ten times, in a process of its own, which forks."""
    command = [sys.executable, "-m", "experiments.trust.fault_campaign", f"--workdir={tmp_path}", "--tries=1",
               "--only=export"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "fault_campaign.csv")
    assert [row["what"] for row in found] == ["export: SIGTERM", "export: SIGKILL"]
    for row in found:
        assert (row["resumed"], row["identical"], row["half_visible"]) == ("1", "1", "0"), row
        assert int(row["kills"]) + int(row["too_late"]) >= 5
    assert f"| export: SIGKILL | 1 | {found[1]['kills']} | 0 | 1 | 1 | 0 |" in done.stdout


@pytest.mark.long
def test_recovery_trains_its_parts_and_draws_what_there_is(tmp_path, monkeypatch, capsys):
    script = importlib.import_module("experiments.paper.fig5_recovery")
    monkeypatch.setattr(script, "GAMMAS", (20.0, 40.0))
    script.main(tmp_path, "smoke", "1_plain")
    script.main(tmp_path, "smoke", "0_auxk")
    found = rows(tmp_path / "fig5_recovery.csv")
    assert {row["condition"] for row in found} == set(script.CONDITIONS)
    frozen = [row for row in found if "frozen" in row["condition"]]
    assert all(float(row["bias_projection"]) == 0 for row in frozen)
    assert "gamma 40  condition AuxK, frozen bias" in capsys.readouterr().out
    assert len(rows(tmp_path / "fig5_claims.csv")) == 2 * len(script.CONDITIONS)
    assert (tmp_path / "fig5_recovery.png").stat().st_size > 0


def test_figure_5_has_means_and_bands_over_the_seeds_up_to_where_all_have_come(tmp_path):
    script = importlib.import_module("experiments.paper.fig5_recovery")
    for seed, steps, topk in ((0, (0, 10, 100), (0.8, 0.4, 0.0)), (3, (0, 10), (0.6, 0.6))):
        of = script.members(f"{seed}_plain")
        entries = [{"step": step, **dict.fromkeys(toys.MEASURES, 9 * [0.1 * at]), "dead_by_topk": 9 * [dead]}
                   for at, (step, dead) in enumerate(zip(steps, topk, strict=True))]  # fmt: skip
        told = {"members": [member._asdict() for member in of], "history": entries}
        (tmp_path / f"{seed}_plain.json").write_text(json.dumps(told))
    found = script.curves(tmp_path)
    assert {condition for condition, _ in found} == set(script.HALVES["plain"])
    assert [row["step"] for row in script.table(found)] == [0, 10] * 9
    last = script.table(found)[1]
    assert (last["seeds"], last["dead_by_topk"], last["dead_by_topk_low"], last["dead_by_topk_high"]) == (
        2, "0.5", "0.4", "0.6"
    )  # fmt: skip
    assert (last["dead_total"], last["dead_total_high"]) == ("0.6", "0.7")
    row = script.claims(found)[0]
    assert (row["dead_by_topk"], row["dead_by_topk_end"], row["bias_projection"]) == (
        "70 → 70 → 50", "40 to 60", "0.10 (0.10 to 0.10)"
    )  # fmt: skip
    assert (row["steps"], row["tenth"], row["lowest"]) == ("10", "0", "50")
    assert row["half"] == "–"  # one of them has not fallen
    assert script.first(np.array([0, 10, 100]), np.array([[0, 1, 1], [0, 0, 0]], bool)) == [10, None]
    assert (script.told([10, 200, 3000], 1), script.told([7], 7), script.told([10, None], 1)) == (
        "10 to 3,000", "≤7", "–"
    )  # fmt: skip
    other = json.loads((tmp_path / "3_plain.json").read_text())
    other["history"][1]["step"] = 11
    (tmp_path / "3_plain.json").write_text(json.dumps(other))
    with pytest.raises(Refused, match="of one scale"):
        script.curves(tmp_path)


def test_a_figure_of_layers_has_each_arm_of_each_architecture_by_pathway():
    """Means of two seeds, whiskers over them; a dash where a library has no such arm."""
    arms = {"topk": ["baseline", "balance"], "relu": ["baseline"]}
    rows = [
        {"on": on, "architecture": kind, "arm": arm, "dead_by_relu": relu, "dead_by_topk": 0.25,
         "dead_total": relu + 0.25, "l0": 8.2 if kind == "topk" else 41 * (1 + relu)}
        for on in ("9", "minilm-l6-3") for kind, those in arms.items() for arm in those for relu in (0.25, 0.75)
    ]  # fmt: skip
    axes = architectures.of_layers(rows).axes
    assert [axis.get_title() for axis in axes[:2]] == ["gemma-3-270m\nblock 9", "minilm-l6\nblock 3"]
    assert [axis.get_ylabel() for axis in axes[::2]] == ["TopK", "ReLU"]
    for axis, places in zip(axes, ([0, 3], [0, 3], [0], [0]), strict=True):
        bars = [(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in axis.patches]
        assert bars == [bar for place in places for bar in ((place, 0, 50), (place, 50, 25))]
        dashes = [text.get_position()[0] for text in axis.texts if text.get_text() == "–"]
        assert dashes == [place for place in range(4) if place not in places]
        off = [(text.get_position()[0], text.get_text()) for text in axis.texts if text.get_text() != "–"]
        assert off == ([(0, "L0 62")] if axis in axes[2:] else [])  # which is 8 where nothing is said
        low, high = axis.collections[0].get_segments()[0][:, 1]
        assert (low, high) == (50, 100)


def closed_form(l0_of):
    """Stands for training: members' ends by a closed form; a folder is of one run alone."""
    dead, begun = dict.fromkeys(architectures.KEYS, 0.0), {}

    def trained(c, members, folder):
        assert begun.setdefault(folder, (c.to_json(), members)) == (c.to_json(), members)
        return {name: {"init": dead, "final": dead | {"l0": l0_of(c, one)}} for name, one in members.items()}

    trained.begun = begun
    return trained


@pytest.mark.parametrize(("per_seed", "scale"), [
    ((1.0, 1.0, 1.0), 1.0), ((1.0, 0.75, 1.05), 1.0), ((1.0, 1.3, 1.6), 30.0),
])  # fmt: skip
def test_a_weight_brings_the_mean_of_all_initialisations_to_the_target(per_seed, scale, tmp_path, monkeypatch):
    def l0_of(c, one):
        return per_seed[one["seed"]] * 40 * (one["sparsity"]["weight"] / scale) ** -0.6

    monkeypatch.setattr(architectures, "trained", closed_form(l0_of))
    c = architectures.settings("9", "cpu", "relu", "baseline")
    known = architectures.looked(c, architectures.grid(c, ["9"]), tmp_path / "run_weights_0", (0,))
    weights, found = architectures.held(c, known, 8.0, tmp_path / "run", (0,))
    assert np.mean([one["final"]["l0"] for one in found["9"]]) == pytest.approx(8, rel=0.05)
    assert weights["9"] == pytest.approx(scale * (np.mean(per_seed) * 5) ** (1 / 0.6), rel=0.09)


@pytest.mark.parametrize(("end", "power"), [(41.0, 0.25), (7.0, 0.5)])
def test_where_no_weight_brings_a_baseline_to_the_target_the_other_arms_come_to_it(end, power, tmp_path, monkeypatch):
    """A baseline whose L0 does not hang on the weight; the others' falls slowly with it, and they are trained at both.
    Of those who select nothing is trained again, though their L0 is off."""
    drawn = {}

    def l0_of(c, one):
        if c.sparsity.preset == "none":
            return 7.0
        return end if c.sae.center == "none" else 20 * one["sparsity"]["weight"] ** -power

    monkeypatch.setattr(architectures.figures, "save", lambda figure, path: drawn.update({path.name: figure}))
    monkeypatch.setattr(architectures, "trained", trained := closed_form(l0_of))
    monkeypatch.setattr(architectures, "ON", SimpleNamespace(value=["9"], default=["9"]))
    architectures.main(tmp_path, "cpu")
    assert not [folder for folder in trained.begun if "of_all" in folder.name]  # the first alone is as far off
    table = rows(tmp_path / "architectures.csv")
    ends = {}
    for row in table:
        ends.setdefault((row["architecture"], row["arm"], row["target_l0"]), []).append(float(row["l0"]))
    assert all(len(of) == 3 for of in ends.values())
    assert {kind: target for kind, _, target in ends if target != "8"}.keys() == {"jumprelu", "relu"}
    for kind, arms in (("jumprelu", ("centred", "balance")), ("relu", ("centred",))):
        (baseline,) = {float(row["l0"]) for row in table if (row["architecture"], row["arm"]) == (kind, "baseline")}
        assert baseline == end
        for arm in arms:
            at = [np.mean(of) for key, of in ends.items() if key[:2] == (kind, arm)]
            assert at == pytest.approx([8, baseline], rel=0.05)
    (figure,) = drawn.values()
    for axis, arms in zip(figure.axes[3:], (("centred", "balance"), ("centred",)), strict=True):
        at = {text.get_position()[0]: float(text.get_text()[3:]) for text in axis.texts if text.get_text() != "–"}
        assert at.keys() == {0, *(list(architectures.ARMS).index(arm) for arm in arms)}
        assert list(at.values()) == pytest.approx([end] * len(at), rel=0.06)  # of two digits


TOY = toys.Toy(d=16, n_true=32, active=3, n=64, k=3, batch=16, steps=12, held_out=1000)


@pytest.mark.parametrize("hold", ["", "along", "all"])
def test_held_weights_do_not_move_where_they_are_held(hold):
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (2, 5, 4), "b_enc": (2, 5), "W_dec": (2, 5, 4), "b_dec": (2, 4)}
    old, new = (sae_lib.SAE(**{key: rng.normal(size=shape) for key, shape in shapes.items()}, k=3) for _ in range(2))
    direction = np.array([0.6, 0.0, 0.8, 0.0])
    found = bias_timescales.kept(new, old, hold, direction)
    np.testing.assert_array_equal(found.b_dec, new.b_dec)
    for key in ("W_enc", "W_dec"):
        moved, wanted = (np.asarray(getattr(sae, key) - getattr(old, key)) for sae in (found, new))
        along = np.outer(direction, direction)
        kept = {"": np.eye(4), "along": np.eye(4) - along, "all": np.zeros((4, 4))}[hold]
        np.testing.assert_allclose(moved, wanted @ kept, atol=1e-12)


def test_a_toy_is_the_package_s_own_step_on_its_own_tokens(x64):
    member = toys.Member(4.0, rate=1e-2, size=0.25, direction="spread", condition="AuxK", seed=3)
    others = [toys.Member(40.0), toys.Member(9.0, condition="AuxK"), toys.Member(5.0, clip=toys.FREE, seed=3)]
    several = toys.Toys(TOY, [*others, member])  # one of the others in a group with it
    assert sorted(map(len, several.groups)) == [1, 1, 2]
    index = several.members.index(member)
    states = several.run(several.states(), 0, TOY.steps)
    config = toys.config(TOY, member)
    static, spec = step_lib.Static.of(config), synthetic.build(config.data, 3)
    mu = 4.0 * np.sqrt(TOY.d) * np.asarray(spec.direction)
    alone = step_lib.init_group([config], jnp.zeros((1, TOY.d)))
    for t in range(TOY.steps):
        x = (synthetic.sample(spec, 0, t, jnp.arange(TOY.batch)) + mu) / 4
        alone, _ = step_lib.group_step(alone, x, static=static, allsum=lambda tree: tree)
    whole = jnp.concatenate([state.sae.W_enc for state in states])
    np.testing.assert_allclose(whole[index], alone.sae.W_enc[0], atol=1e-9)
    found, _ = several.record(states)
    x = (np.concatenate([synthetic.sample(spec, 2, t, jnp.arange(500)) for t in range(2)]) + mu) / 4
    sae = jax.tree.map(lambda a: np.asarray(a[0]), alone.sae)
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    assert found["dead_by_relu"][index] == pytest.approx((z <= 0).all(axis=0).mean(), abs=1e-5)
    codes = np.where(z >= np.sort(z, axis=1)[:, [-TOY.k]], np.maximum(z, 0), 0)
    assert found["dead_by_topk"][index] == pytest.approx(((z > 0).any(axis=0) & ~codes.any(axis=0)).mean(), abs=1e-5)
    error = np.sum((x - codes @ sae.W_dec - sae.b_dec) ** 2)
    about = np.sum((x - mu / 4) ** 2)
    assert found["fve"][index] == pytest.approx(1 - error / about, abs=1e-5)
    assert found["bias_projection"][index] == pytest.approx(4 * sae.b_dec @ mu / (mu @ mu), abs=1e-5)


@pytest.mark.repeats
def test_toys_that_are_stopped_go_on_as_if_they_were_not(tmp_path, monkeypatch):
    members = [toys.Member(5.0, seed=seed, condition=of) for seed in (0, 1) for of in ("AuxK of 5", "baseline")]
    toys.train(TOY, members, tmp_path / "whole", points=4)
    given = toys.Toys.run

    def cut(self, states, first, count):
        if first >= 3:
            raise KeyboardInterrupt
        return given(self, states, first, count)

    monkeypatch.setattr(toys.Toys, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        toys.train(TOY, members, tmp_path / "cut", points=4)
    begun = []
    monkeypatch.setattr(toys.Toys, "run", lambda self, states, first, count: (
        begun.append(first), given(self, states, first, count))[1])  # fmt: skip
    toys.train(TOY, members, tmp_path / "cut", points=4)
    assert begun == [5]
    assert toys.read(tmp_path / "cut") == toys.read(tmp_path / "whole")
    with pytest.raises(Refused, match="it holds others"):
        toys.train(TOY, [member._replace(rate=1e-2) for member in members], tmp_path / "cut", points=4)


def test_a_row_of_regimes_is_the_mean_of_its_seeds_and_when_what_came():
    members = [toys.Member(20.0, seed=seed) for seed in (0, 1)]
    curves = {
        "dead_by_relu": [(0.4, 0.4), (0.6, 0.4), (0.1, 0.2)], "dead_by_topk": [(0.5, 0.6), (0.1, 0.6), (0.2, 0.1)],
        "bias_projection": [(0, 0), (0.55, 0.1), (0.9, 0.65)],
    }  # fmt: skip
    history = [{"step": step, **{key: [0.0, 1.0] for key in toys.MEASURES}, **{k: v[i] for k, v in curves.items()}}
               for i, step in enumerate((0, 10, 100))]  # fmt: skip
    (row,) = regimes.rows("base", members, history)
    assert (row["dead_by_relu_start"], row["dead_by_relu_10"], row["dead_by_relu_end"]) == (0.4, 0.5, 0.15)
    assert (row["dead_by_relu_low"], row["dead_by_relu_high"], row["collateral_end"]) == (0.1, 0.2, 0.5)
    assert (row["half_low"], row["half_high"]) == (100, 100)  # of 0.9 → 0.7 → 0.3, and of 1.0 → 1.0 → 0.3
    assert row["relu_at_b_0.5"] == pytest.approx((0.6 + 0.2) / 2)
    assert row["relu_at_b_0.6"] == pytest.approx((0.1 + 0.2) / 2)
    assert row.get("relu_at_b_0.7", "") == ""  # one of them never comes there
    assert regimes.half([0.5, 0.45, 0.44]) is None


def test_what_auxk_does_is_told_by_the_fve_of_its_own_baseline():
    members = [toys.Member(gamma, condition=condition) for gamma in (5.0, 20.0) for condition in ("AuxK", "baseline")]
    nobodys = toys.Member(40.0)  # a baseline without AuxK beside it
    found = {
        "fve": (0.0, 0.65, 0.0, 0.25, 0.65), "mmcs": (0.9, 0.8, 0.5, 0.6, 0),
        "dead_by_relu": (0.3, 0.1, 0.5, 0.4, 1), "dead_by_topk": (0.1, 0.5, 0.25, 0.3, 1),
    }  # fmt: skip
    history = [{"step": step, **{key: list(values) for key, values in found.items()}} for step in (10, 11, 20)]
    low, high = regimes.by_fve([([*members, nobodys], history)], wakes=10)
    assert (low["fve_from"], low["fve_to"], high["fve_from"], high["fve_to"]) == (0.2, 0.3, 0.6, 0.7)
    assert (low["pairs"], low["evaluations"], high["evaluations"]) == (1, 2, 2)
    assert (low["fewer"], low["more"], low["dead_total"], low["dead_by_relu"]) == ("0", "100", "5.0", "10.0")
    assert (high["fewer"], high["more"], high["dead_total"], high["dead_by_relu"]) == ("100", "0", "-20.0", "20.0")
    assert (low["mmcs"], high["mmcs"]) == ("-0.100", "0.100")
    again = [({**entry, "fve": [9, 0.65, 9, 0.65 if i else 0.25, 9]}) for i, entry in enumerate(history)]
    *_, row = regimes.by_fve([(members, again)], wakes=9)  # a pair counts once, whatever its evaluations
    assert (row["pairs"], row["evaluations"], row["dead_total"]) == (2, 5, "-7.5")
    assert (row["fewer"], row["more"]) == ("50", "50")
    assert regimes.by_fve([([nobodys], history)], wakes=10) == []


def test_auxk_is_compared_with_its_baseline_after_it_wakes():
    script = importlib.import_module("experiments.paper.auxk_when")
    base = [{"on": "13", "step": step, "fve": 0.5, "dead_total": 0.5, "dead_by_relu": 0.1, "dead_total_low": 0.4,
             "dead_total_high": 0.6} for step in (1, 2, 3)]  # fmt: skip
    auxk = [row | {"dead_total": 0.7, "dead_total_low": low, "dead_total_high": 0.8, "dead_by_relu": 0.3}
            for row, low in zip(base, (0.65, 0.65, 0.55), strict=True)]  # fmt: skip
    rows = script.compared(1, base, auxk)
    assert [(row["step"], row["apart"]) for row in rows] == [("2", "yes"), ("3", "no")]
    assert [rows[0][key] for key in ("dead_total", "dead_total_auxk", "dead_by_relu_auxk", "more")] == [
        "50.0", "70.0", "30.0", "20.0"
    ]  # fmt: skip
    assert [row["apart"] for row in script.compared(1, auxk, base)] == ["yes", "no"]
    assert script.compared(1, auxk, base)[0]["more"] == "-20.0"


def test_ghost_gradients_move_the_dead_and_change_nothing_where_none_is(x64):
    script = importlib.import_module("experiments.death.remedies_compared")
    config = script.settings("smoke", 20.0, 0)
    static, spec = step_lib.Static.of(config), synthetic.build(config.data, 0)
    x = synthetic.sample(spec, 0, 0, jnp.arange(32))
    start = step_lib.init_group([config], jnp.zeros((1, 16)))

    def after(step, state):
        return jax.jit(lambda state: step(state, x, static=static, allsum=lambda tree: tree)[0].sae)(state)

    plain, ghost = (partial(after, step) for step in (step_lib.group_step, rivals.ghost_gradients))
    for a, b in zip(jax.tree.leaves(plain(start)), jax.tree.leaves(ghost(start)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    dead = jnp.arange(64) >= 60
    late = start.replace(tokens_since_fired=jnp.where(dead, 10**6, 0)[None])
    moved = jnp.abs(ghost(late).W_dec - plain(late).W_dec)[0].sum(axis=1)
    assert jnp.isfinite(moved).all()
    assert moved[60:].max() > 1e-3


def test_the_table_of_models_is_that_of_the_facts():
    table = rows(ROOT / "experiments/trust/models.csv")
    assert [row["name"] for row in table] == list(MODELS)
    for row in table:
        known = MODELS[row["name"]]
        layers = known.interior if row["name"] in PAPER else range(1, known.blocks + 1)
        assert row["layers"] == "–".join(map(str, dict.fromkeys((layers[0], layers[-1]))))
        widths = (known.width,) if isinstance(known.width, int) else known.width
        assert row["d"] == "–".join(map(str, dict.fromkeys((min(widths), max(widths)))))
        assert (row["weights"], row["domain"]) == (known.id, known.domain)
        assert row["licence"].startswith(known.licence)
        assert ("gated" in row["licence"]) == known.gated
        said = {"class": "random weights", "stand-in": "a stand-in", "weights": "the weights"}[known.checked]
        assert row["adapter_tested_on"].startswith("a file" if known.family == "activations" else said)


def test_runs_are_compared_on_one_model_and_none_of_their_members_passes_for_the_stream(tiny, tmp_path, monkeypatch):
    tiny.train.steps, tiny.members = 4, ConfigDict({"mean": {"sae": {"center": "mean"}}})
    sae_jax.train(tiny, str(tmp_path / "one"))
    flat = json.loads((tmp_path / "one/config.json").read_text())

    def read(given, text="", **other):
        for name in given:
            path = tmp_path / name / "config.json"
            changed = {"data.signal": "", "data.model.id": "gpt2", "data.model.text": "a.txt"} | other.get(name, {})
            if path.exists():
                path.write_text(json.dumps(flat | changed))
        monkeypatch.setattr(ce_recovered, "RUNS", SimpleNamespace(value=[str(tmp_path / name) for name in given]))
        monkeypatch.setattr(ce_recovered, "TEXT", SimpleNamespace(value=text))
        model, packed = ce_recovered.runs()
        return model, list(packed)

    for name in ("two", "b/one"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
    fewer = {"two": {"data.model.n_tokens": flat["data.model.n_tokens"] + 1}}
    assert read(["one"])[1] == ["one/mean"]  # and "mean" is the mean of the tokens
    model, names = read(["one", "two"], **fewer)
    assert names == ["one/mean", "two/mean"]
    assert model.n_tokens == flat["data.model.n_tokens"] + 1  # what neither has seen
    other = {"two": {"data.model.text": "b.txt"}}
    assert read(["one", "two"], text="c.txt", **other)[0].text == "c.txt"
    for given, changed, said in [
        (["one", "two"], other, "data.model.text 'b.txt'"),
        (["one", "two"], {"two": {"data.model.layer": 3}}, "data.model.layer 3"),
        (["one", "two"], {"two": {"data.model.id": ""}}, "a run whose data.model.id names"),
        (["one", "b/one"], {}, "folders of different names"),
        (["one", "none"], {}, "the folder of a run"),
    ]:
        with pytest.raises(Refused, match=said):
            read(given, **changed)
