"""README: every command and snippet in it is run, in its order, and what it shows is what comes out."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from sae_jax import base, cli
from sae_jax.errors import Refused

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
SMALL = ["--config.train.steps=2", "--config.eval.n_tokens=500", "--config.data.statistics_tokens=2000"]
OTHERWISE = {  # how the commands are run that would take minutes, or need the network: with these flags, or not
    "git clone": None,  # the network
    'pip install -e ".[test]"': None,  # what .ci/run does, in an environment of its own
    # 240 MB of weights and minutes: its configuration on synthetic activations
    'pip install -e ".[demo]"': [
        *SMALL, "--config.data.model.id=", "--config.data.signal=gaussian", "--config.data.d_model=16",
        "--config.sae.n_features=64", "--config.sae.k=4", "--config.train.batch_size=64",
    ],
    # two minutes, and shows nothing: its start
    "python -m sae_jax train --config=configs/synthetic.py": [*SMALL, "--config.train.steps=0"],
}  # fmt: skip
NUMBER = re.compile(r"[-−]?\d[\d,]*\.?\d*")


def blocks():
    """(code, what README shows of its output) of every fence that can be run."""
    found = [match.groups() for match in FENCE.finditer(README)]
    assert {kind for kind, _ in found} == {"sh", "python", "text"}
    for (kind, code), after in zip(found, [*found[1:], ("", "")], strict=True):
        if kind != "text":
            yield kind, code, after[1] if after[0] == "text" else ""


def run_command(line):
    special = [flags for start, flags in OTHERWISE.items() if line.startswith(start)]
    if special == [None]:
        return
    words = shlex.split(line.split(" && ")[-1])
    assert words[:3] == ["python", "-m", "sae_jax"], line
    assert cli.main([*words[3:], *(special[0] if special else [])]) == 0, line


def same(shown, came):
    """Words are the same; numbers within ten units of their last digit: training goes apart between machines."""
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", came).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(came), strict=True)
    return all(abs(float(a.replace(",", "")) - float(b.replace(",", ""))) <= tolerance(a) for a, b in pairs)


def tolerance(number):
    return 10.001 * 10.0 ** -len(number.partition(".")[2]) if "." in number else 0


def test_what_counts_as_the_same():
    assert same("centred  200  0.386 1.0 %", "centred 200 0.391 1.4 %")
    assert not same("centred 200 0.386", "centred 201 0.386")
    assert not same("centred 200 0.386", "centred 200 0.286")
    assert not same("centred 200", "centered 200")


def test_everything_in_it_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    names = {}
    for kind, code, shown in blocks():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if kind == "python":
                exec(compile(code, "README.md", "exec"), names)
            else:
                for line in code.replace("\\\n", " ").splitlines():
                    run_command(line)
        came = printed.getvalue().splitlines()
        for line in shown.splitlines():
            # What a sweep takes is this machine's minutes, so README leaves them out.
            assert any(same(line, re.sub(r", \d+ min$", "", other)) for other in came), (line, came)
    assert {path.name for path in Path("runs/mine").iterdir()} >= {"report.json", "fates.csv", "checkpoints"}
    assert {path.name for path in Path("mine_saelens").iterdir()} >= {"cfg.json", "sae_weights.safetensors"}
    assert not list(Path().glob("runs/sweep/*"))  # --dry_run


def test_it_is_short_and_has_the_lines_that_checks_look_for():
    lines = README.splitlines()
    assert len(lines) <= 130
    assert 'pip install -e ".[test]" && pytest' in lines
    quickstart = "python -m sae_jax train --config=configs/quickstart.py --workdir=runs/quickstart"
    assert f'pip install -e ".[demo]" && {quickstart}' in lines


def test_the_map_names_every_module():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    room, named = "", {}
    for row in re.findall(r"^\|(.*?)\|(.*?)\|", page, re.M):
        room = row[0].strip("`/ ") or room
        named.setdefault(room, set()).update(re.findall(r"`(\w+\.py)`", row[1]))
    for path in (ROOT / "sae_jax").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in named[path.parent.name], path


@pytest.mark.parametrize(("overrides", "said"), [
    ({"sae.width": 3}, "sae.width = 3: there is no such setting"),
    ({"sae.k": "many"}, "sae.k = 'many': type int"),
])  # fmt: skip
def test_overrides_that_are_wrong(overrides, said):
    with pytest.raises(Refused, match=said):
        base(overrides)
