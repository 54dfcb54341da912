"""The example in the README, as it is written there."""

import re
from pathlib import Path

import numpy as np
import pytest

from sae_jax import base
from sae_jax.errors import Refused

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.drawn
def test_the_example_of_five_lines_runs(tmp_path, monkeypatch, rng, capsys):
    code = re.search(r"```python\n(import sae_jax\n.*?)```", README, re.S).group(1)
    assert len(code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    np.save("activations.npy", (rng.normal(size=(6000, 32)) + 3 * rng.normal(size=32)).astype(np.float32))
    exec(compile(code, "README.md", "exec"), {})
    assert {path.name for path in Path("runs/five_saelens").iterdir()} >= {"cfg.json", "sae_weights.safetensors"}
    assert "dead_total" in capsys.readouterr().out


@pytest.mark.parametrize(("overrides", "said"), [
    ({"sae.width": 3}, "sae.width = 3: an existing key"),
    ({"sae.k": "many"}, "sae.k = 'many': type int"),
])  # fmt: skip
def test_overrides_that_are_wrong(overrides, said):
    with pytest.raises(Refused, match=said):
        base(overrides)
