"""Pilots are the run in fewer steps at higher rates; how near they come, experiments/death/pilots_scored.py says."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import cli
from sae_jax import config as config_lib
from sae_jax.diagnosis import pilot
from sae_jax.errors import Refused
from sae_jax.training import step as step_lib

STEPS = 240


@pytest.fixture
def config(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(pilot, "LEAST", 10)
    np.save(tmp_path / "x.npy", np.float32(rng.normal(size=(4000, 16)) * np.linspace(0.2, 2, 16) + 2))
    found = sae_jax.base({
        "data.path": f"{tmp_path}/x.npy", "sae.n_features": 128, "sae.k": 3, "train.steps": STEPS,
        "train.batch_size": 64, "train.learning_rate": 1e-3, "train.devices": 1, "train.warmup_steps": 16,
        "auxk.preset": "none", "eval.n_tokens": 800, "eval.batch_size": 400,
    })  # fmt: skip
    found.members = {
        "plain": {"sae": {"center": "mean"}},
        "fast": {"sae": {"center": "mean"}, "train": {"learning_rate": 2e-3, "warmup_steps": 8}},
        "kept": {"sae": {"center": "mean", "balance": True}, "auxk": {"dead_after_tokens": 800}},
    }
    return found


def total_rate(config, power=1):
    static = step_lib.Static.of(config)
    steps = jnp.arange(config.train.steps)
    return config.train.learning_rate**power * float(sum(step_lib.schedule(static, step) ** power for step in steps))


def test_one_pilot_has_the_drift_of_the_run_and_one_its_noise(config):
    shorter = pilot.shortened(config)
    assert shorter.train.steps == STEPS / 8
    runs, pilots = config_lib.members(config), config_lib.members(shorter)
    assert len(pilots) == 2 * len(runs)
    for name in runs:
        high, low = pilots[name + pilot.HIGH], pilots[name + pilot.LOW]
        assert total_rate(high) == pytest.approx(total_rate(runs[name]), rel=0.05), name
        assert total_rate(low, power=2) == pytest.approx(total_rate(runs[name], power=2), rel=0.05), name
    assert {config_lib.dead_after_tokens(pilots["kept" + kind]) for kind in (pilot.LOW, pilot.HIGH)} == {100}
    for steps in (pilot.LEAST - 1, 0):  # too few to shorten
        config.train.steps = steps
        same = config_lib.members(pilot.shortened(config))
        assert {name: one.train for name, one in same.items()} == {
            name: one.train for name, one in config_lib.members(config).items()
        }  # fmt: skip
    config.members.kept.auxk.dead_after_tokens = 4  # 0 would mean that it is chosen
    config.train.steps = STEPS
    assert config_lib.members(pilot.shortened(config))["kept" + pilot.LOW].auxk.dead_after_tokens == 1


@pytest.mark.parametrize(("low", "high", "found"), [
    (0.09, 0.25, 0.15), (0.4, 0.1, 0.2), (0.3, 0.3, 0.3), (0.0, 0.0, 0.0), (0.0, 0.08, 0.006), (1.0, 1.0, 1.0),
])  # fmt: skip
def test_the_forecast_is_the_geometric_mean_of_the_two(low, high, found):
    assert pilot.between(low, high, 1000) == pytest.approx(found, abs=5e-4)
    assert pilot.between(low, high, 1000) == pilot.between(high, low, 1000)


def test_a_forecast_is_between_its_two_pilots(config, tmp_path):
    """Each pilot by itself, trained alone, is what the pair was."""
    config.members = {}
    found = pilot.forecast(config, f"{tmp_path}/out")
    assert (found["steps"], found["of"], list(found["members"])) == (STEPS / 8, STEPS, ["sae"])
    one, alone = found["members"]["sae"], []
    for name, single in sorted(config_lib.members(pilot.shortened(config)).items(), reverse=True):  # low, high
        single.members = {}
        alone += [member["final"] for member in sae_jax.train(single, f"{tmp_path}/{name}")["members"]]
    assert one["pilots"] == pytest.approx([share["dead_total"] for share in alone], abs=1.5 / 128)
    assert abs(one["pilots"][0] - one["pilots"][1]) > 3 / 128  # so that they are not mistaken for each other
    assert min(one["pilots"]) <= one["dead_total"] <= max(one["pilots"])
    assert 0 <= one["dead_by_topk"] == pytest.approx(one["dead_total"] - one["dead_by_relu"])
    assert one["dead_total"] > 0.05  # or all this would hold of nothing


def stub(config, shares):
    """In place of training: a report of the members that are to be trained, each with its share."""
    names = list(config_lib.members(config))
    members = [{"name": name, "final": dict.fromkeys(("dead_by_relu", "dead_total"), shares[name])} for name in names]
    return {"step": config.train.steps, "n_eval_tokens": 800, "members": members}


def test_members_are_forecast_each_from_its_own_pair(config, monkeypatch):
    """Also where one is called as a pilot of another, in a run that is long and in one that is its own pilot."""
    config.members["plain low"] = {"sae": {"n_features": 4}}
    shares = {"plain low": 0.1, "plain high": 0.4, "plain low low": 0.0, "plain low high": 0.5, "fast low": 0.2,
              "fast high": 0.2, "kept low": 0.0, "kept high": 0.0, "plain": 0.9, "fast": 0.3, "kept": 0.7}  # fmt: skip
    monkeypatch.setattr(pilot.run_lib, "train", lambda given, _: stub(given, shares))
    found = pilot.forecast(config, "nowhere")["members"]
    assert {name: one["pilots"] for name, one in found.items()} == {
        "plain": [0.1, 0.4], "plain low": [0.0, 0.5], "fast": [0.2, 0.2], "kept": [0.0, 0.0],
    }  # fmt: skip
    assert found["plain"]["dead_total"] == pytest.approx(0.2, abs=2e-3)
    assert found["plain low"]["dead_total"] == pytest.approx(np.sqrt(0.125 * 0.625) - 0.125)
    config.train.steps = 2 * pilot.LEAST
    found = pilot.forecast(config, "nowhere")["members"]
    assert {name: one["dead_total"] for name, one in found.items()} == pytest.approx(
        {"plain": 0.9, "plain low": 0.1, "fast": 0.3, "kept": 0.7}
    )


@pytest.mark.parametrize(("member", "field"), [
    ({"train": {"beta2": -0.5}}, "members.odd.train.beta2"), ({"train": {"warmup_steps": -3}}, "members.odd.train"),
    ({"train": {"clip_norm": 0.0}}, "members.odd.train.clip_norm"),
])  # fmt: skip
def test_a_member_that_cannot_be_run_is_refused_by_its_own_name(config, member, field, tmp_path):
    config.members["odd"] = member
    with pytest.raises(Refused, match=field):
        pilot.forecast(config, f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_whole_number_may_be_a_learning_rate(config):
    config.members["plain"] = {"train": {"learning_rate": 1}}
    assert pilot.shortened(config).members["plain high"].train.learning_rate == 8.0


def test_a_diagnosis_tells_what_training_will_leave_dead(config, tmp_path, capsys):
    """A run of few steps is its own pilot, so here what is told is what comes."""
    config.train.steps = pilot.LEAST - 2
    del config.members["fast"]
    flat = config_lib.identity(config)
    (tmp_path / "config.py").write_text(
        f"from sae_jax import config\ndef get_config():\n    return config.from_identity({flat!r})\n"
    )
    assert cli.main(["diagnose", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/out", "--pilot"]) == 0
    shown = capsys.readouterr().out
    assert "after 8 steps of training, by pilots of 8, on" in shown
    found = json.loads((tmp_path / "out/report.json").read_text())["after_training"]
    run = sae_jax.train(config, f"{tmp_path}/run")
    assert (found["steps"], found["of"], found["n_tokens"]) == (8, 8, run["n_eval_tokens"])
    for one in run["members"]:
        told = found["members"][one["name"]]
        assert told.pop("pilots") == pytest.approx(2 * [one["final"]["dead_total"]], rel=1e-5)
        assert told == pytest.approx({key: one["final"][key] for key in told}, rel=1e-5)
        assert f"{100 * told['dead_total']:.1f} %" in shown
    assert len(found["members"]) == 2


@pytest.mark.parametrize(("more", "field"), [
    (["--k=4"], "--k"), (["--selection=relu"], "--selection"), (["--sae=x"], "--pilot"),
])  # fmt: skip
def test_what_a_pilot_cannot_be_asked(config, tmp_path, capsys, more, field):
    words = ["diagnose", "--config=configs/default.py", f"--workdir={tmp_path}/out", "--pilot", *more]
    assert cli.main(words) == 2
    assert f"{field} = " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pilot_is_of_a_configuration(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.ones((40, 4)))
    assert cli.main(["diagnose", f"--activations={tmp_path}/x.npy", f"--workdir={tmp_path}/out", "--pilot"]) == 2
    assert "--pilot = True: of a configuration" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("steps", "of_pilot"), [
    (8000, 1000), (4100, 512), (3000, 500), (1001, 500), (1000, 1000), (400, 400),
])  # fmt: skip
def test_a_pilot_is_an_eighth_of_the_steps_and_at_least_five_hundred(steps, of_pilot):
    one = sae_jax.base({"train.steps": steps, "train.warmup_steps": steps // 10, "train.learning_rate": 1e-3,
                        "checkpoint.every": steps // 5})  # fmt: skip
    shorter, by = pilot.shortened(one), steps / of_pilot
    assert shorter.train.steps == of_pilot
    assert shorter.checkpoint.every == round(steps // 5 / by)
    pair = config_lib.members(shorter)
    assert len(pair) == (2 if by > 1 else 1)
    for name, member in pair.items():
        faster = by**0.5 if name.endswith(pilot.LOW) else by
        assert member.train.learning_rate == pytest.approx(1e-3 * faster)
        assert member.train.warmup_steps == round(steps // 10 / by)
        assert (member.train.beta1, member.train.beta2) == (one.train.beta1, pytest.approx(one.train.beta2**by))
    one.checkpoint.every = 1
    assert pilot.shortened(one).checkpoint.every == 1
