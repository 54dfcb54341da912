"""Several processes are one run: they compute what one does, stop together, and none waits for one that is gone."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from processes import Processes
from test_running import final_states

import sae_jax
from sae_jax.runtime import checkpoint

TRAIN = """
    import json, os, signal
    from ml_collections import ConfigDict
    import sae_jax
    from sae_jax.training import run as run_lib
    from sae_jax.errors import Preempted

    jax.config.update("jax_enable_x64", True)
    config, disturb = ConfigDict(json.loads({config!r})), {disturb!r}
    advance = run_lib.Run._next_inputs

    def disturbed(self, count):
        if self.step == (45 if disturb == "kill" else 15) and number == 1:
            os.kill(os.getpid(), signal.SIGKILL if disturb == "kill" else signal.SIGTERM)
        return advance(self, count)

    run_lib.Run._next_inputs = disturbed if disturb else advance
    try:
        sae_jax.train(config, "w")
    except Preempted as error:
        print(error, error.exit_code)
        run_lib.Run._next_inputs = advance
        sae_jax.train(config, "w")
"""


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("n", "from_file", "disturb"), [
    (2, False, "ask"), pytest.param(4, True, "", marks=pytest.mark.long),
])
def test_several_processes_equal_one_in_float64(tiny, tmp_path, rng, n, from_file, disturb):
    """50 steps; two of them are stopped on the way, by a signal that one alone gets, and go on together."""
    tiny.train.steps, tiny.train.steps_per_dispatch = 50, 5
    tiny.members = ConfigDict({"a": {"sae": {"center": "mean"}}, "b": {"auxk": {"dead_after_tokens": 64}}})
    if from_file:
        np.save(tmp_path / "x.npy", rng.normal(size=(4000, 16)) + 3)
        tiny.data.path = str(tmp_path / "x.npy")
    started = Processes(TRAIN.format(config=tiny.to_json(), disturb=disturb), n, tmp_path / "several")
    one = sae_jax.train(tiny, str(tmp_path / "one"))
    for code, said in started.wait():
        assert code == 0, said
        assert ("stopped on request at step" in said) == bool(disturb), said
    several = json.loads((tmp_path / "several" / "w" / "report.json").read_text())
    assert (several["devices"], one["devices"]) == (n, 1)
    for ours, theirs in zip(several["members"], one["members"], strict=True):
        for when in ("init", "final"):
            for key, value in theirs[when].items():
                wanted = value if value is None else pytest.approx(np.asarray(value), rel=1e-9)
                assert ours[when][key] == wanted, (when, key)
    a, b = (final_states(tiny, folder) for folder in (tmp_path / "one", tmp_path / "several" / "w"))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left.tokens_since_fired, right.tokens_since_fired)
        assert right.step.tolist() == [50, 50]
        for x, y in zip(jax.tree.leaves(left.sae), jax.tree.leaves(right.sae), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_one_process_killed_stops_the_other_with_a_line_and_not_with_a_hang(tiny, tmp_path):
    tiny.train.steps, tiny.train.steps_per_dispatch = 100_000, 5
    (code, said), (victim, _) = Processes(TRAIN.format(config=tiny.to_json(), disturb="kill"), 2, tmp_path).wait()
    assert victim == -9
    assert code == 3, said
    assert "sae_jax: another process of this run has ended or cannot be reached, so all stop" in said
    assert checkpoint.steps(checkpoint.epath.Path(tmp_path / "w" / "checkpoints"))
