"""Ctrl-C at any moment of any verb: one line, exit code 130, and the next run comes to the end.

CTRL_C=20 in the environment stops every verb twenty times, each time elsewhere. What was seen goes to CTRL_C_LOG.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sae_jax.errors import Interrupted, Preempted
from sae_jax.runtime import processes, stopping

TRIES = int(os.environ.get("CTRL_C", "0"))
LINE = "sae_jax: stopped from the keyboard"
CONFIG = """
from ml_collections import ConfigDict
from sae_jax.config import base

def get_config():
    return base({
        "sae.n_features": 64, "sae.k": 4, "data.signal": "sparse", "data.gamma": 4.0, "data.d_model": 16,
        "data.n_true_features": 32, "data.n_active": 3, "data.statistics_tokens": 2000, "train.steps": STEPS,
        "train.batch_size": 32, "train.devices": 1, "eval.n_tokens": 500, "eval.batch_size": 100,
    })

def sweep(add):
    for seed in range(2):
        add({"seed": seed}, f"seed{seed}")
"""
VERBS = {
    "train": "train --config={in}/train.py --workdir={out}",
    "diagnose": "diagnose --activations={in}/x.npy --workdir={out} --n_features=64 --k=4",
    "measure": "diagnose --activations={in}/x.npy --workdir={out} --n_features=64 --k=4 --measure",
    "dissect": "diagnose --activations={in}/x.npy --sae={in}/sae --workdir={out}",
    "extract": "extract --from={in}/x.npy --out={out}",
    "export": "export --from={in}/sae --format=sparsify --out={out}",
    "sweep": "sweep --config={in}/sweep.py --workdir={out}",
}
# Of what an export or an import has finished there is no going on; stopped after that, the next run says so.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    import sae_jax

    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", (rng.normal(size=(3000, 16)) + 2).astype(np.float32))
    for name, steps in (("train", 60), ("sweep", 0)):
        (folder / f"{name}.py").write_text(CONFIG.replace("STEPS", str(steps)))
    rows = rng.normal(size=(64, 16)).astype(np.float32)
    sae = sae_jax.SAE(W_enc=rows, b_enc=np.zeros(64, np.float32), W_dec=rows, b_dec=np.zeros(16, np.float32), k=4)
    sae_jax.export(sae, str(folder / "sae"))
    return folder


def started(verb, inputs, out):
    words = VERBS[verb].format(**{"in": inputs, "out": out}).split()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process inherits what is ignored
    try:
        return subprocess.Popen([sys.executable, "-m", "sae_jax", *words], stdout=-1, stderr=-1, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def is_ours(process):
    """Whether the command has taken the signals over: Python by itself catches SIGINT, and not SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) & 1 << (signal.SIGTERM - 1))


def used(process):
    """Processor seconds so far: the same moment of a run on a busy machine as on an idle one."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def interrupted(verb, inputs, out, after):
    """Exit code, what was said, and whether the signal was sent before the process had ended."""
    process = started(verb, inputs, out)
    while process.poll() is None and not (is_ours(process) and used(process) >= after):
        time.sleep(0.005)
    sent = process.poll() is None
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    stdout, stderr = process.communicate(timeout=300)
    if path := os.environ.get("CTRL_C_LOG"):
        with Path(path).open("a") as log:
            log.write(f"{verb} {after:.2f} {sent} {process.returncode} {time.monotonic() - asked:.2f} {stderr!r}\n")
    return process.returncode, stdout, stderr, sent


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux what a process has caught and used")
@pytest.mark.parametrize("verb", [
    pytest.param(verb, marks=pytest.mark.long) if verb in ("measure", "export") else verb for verb in VERBS
])  # fmt: skip
def test_ctrl_c_at_any_moment_is_one_line_and_the_next_run_comes_to_the_end(verb, inputs, tmp_path):
    rng = np.random.default_rng(None if TRIES else list(verb.encode()))
    for _ in range(max(1, TRIES)):
        code, stdout, stderr, sent = interrupted(verb, inputs, tmp_path / "out", rng.uniform(0, 5))
        assert "Traceback" not in stderr
        if code == 130:
            assert stderr.startswith(LINE)
            assert len(stderr.splitlines()) == 1
        else:  # it was faster
            assert code == 0, stderr
            assert stdout or code
    process = started(verb, inputs, tmp_path / "out")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr


NOTEBOOK = """
import signal, sys
from sae_jax.runtime.stopping import StopRequest
try:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    sys.exit(7)
"""
SAVING = """
import os, signal, sys, time
from sae_jax.runtime import stopping
stopping.end_when_asked()
with stopping.StopRequest() as stop:
    for press in range(int(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGINT)
        while not stop._again or not stop.requested():
            time.sleep(0.01)
        time.sleep(60 * press)
    print("saved", flush=True)
    sys.exit(stop.stopped("at step 3").exit_code) if sys.argv[2] == "asked" else None
print("not reached", flush=True)
"""
LATE = """
import os, signal
from sae_jax.runtime import stopping
stopping.end_when_asked()
with stopping.StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print("saved", flush=True)
print("swallowed", flush=True)
"""
FORKED = """
import os, signal, time, warnings
warnings.simplefilter("ignore")
from sae_jax.runtime import stopping
stopping.end_when_asked()
child = os.fork()
if not child:
    time.sleep(60)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
time.sleep(0.2)
"""
BUSY = """
import hashlib, os, signal, threading
from sae_jax.runtime import stopping
stopping.end_when_asked()
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
hashlib.pbkdf2_hmac("sha256", b"x", b"", 2**31 - 1)
"""


@pytest.mark.parametrize(("script", "words", "code", "out", "err"), [
    (NOTEBOOK, [], 7, "", ""),  # functions in a notebook: as everywhere in Python
    (SAVING, ["1", "asked"], 130, "saved\n", ""),
    (SAVING, ["2", "asked"], 130, "", f"{LINE}; run again to go on\n"),  # pressed again: at once
    (LATE, [], 130, "saved\n", f"{LINE}; run again to go on\n"),  # too late to be asked about
    (BUSY, [], 143, "", "sae_jax: stopped on request; run again to go on\n"),  # minutes between two steps of Python
    (FORKED, [], 0, f"-{signal.SIGTERM.value}\n", ""),  # a worker's end is not ours
])  # fmt: skip
def test_what_is_noted_and_what_ends_at_once(script, words, code, out, err):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=300)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


# -- who takes a signal ------------------------------------------------------------------------------------------------


@pytest.fixture
def handled():
    """Signals that come through to whoever handled them before; in a command that is `stopping.end`."""
    before, seen = {number: signal.getsignal(number) for number in stopping.ENDS}, []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("asked", "fails", "through"), [(False, False, True), (True, False, False),
                                                         (False, True, False)])  # fmt: skip
def test_a_signal_comes_through_only_if_nobody_was_told_and_all_is_saved(handled, asked, fails, through):
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(KeyError), stopping.StopRequest() as stop:
        assert not (asked and stop.requested())
        signal.raise_signal(signal.SIGTERM)
        assert not asked or stop.requested()
        if fails:
            raise KeyError
    assert handled == [signal.SIGTERM] * through
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopping.StopRequest.active == []


@pytest.mark.parametrize(("sent", "kind"), [
    ([signal.SIGTERM], Preempted), ([signal.SIGINT], Interrupted), ([signal.SIGTERM, signal.SIGINT], Preempted),
    ([signal.SIGINT, signal.SIGTERM], Interrupted),
])  # fmt: skip
@pytest.mark.usefixtures("handled")
def test_in_a_command_the_first_signal_says_how_it_ended(sent, kind):
    signal.signal(signal.SIGINT, stopping.end)
    with stopping.StopRequest() as stop:
        for number in sent:
            signal.raise_signal(number)
        assert stop.requested()
        ended = stop.stopped("at step 3")
    assert type(ended) is kind
    assert str(ended) == f"{kind.said} at step 3; run again to go on"


@pytest.mark.usefixtures("handled")
def test_ctrl_c_is_left_to_a_request_once_and_sigterm_always():
    with stopping.StopRequest() as elsewhere:  # SIGINT is not its own
        assert [elsewhere.takes(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)] == [
            True, False, True,
        ]  # fmt: skip
    signal.signal(signal.SIGINT, stopping.end)
    with stopping.StopRequest() as stop:
        order = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT)
        assert [stop.takes(number) for number in order] == [True, True, True, True, False]


@pytest.mark.usefixtures("handled")
def test_several_processes_stop_one_turn_after_it_was_asked_of_any(monkeypatch):
    """What they agree on is looked at a turn later; a request that asks nobody stops at once."""
    monkeypatch.setattr("jax.process_count", lambda: 2)
    asked, answers = [], iter([0, 1, 2, 0])
    monkeypatch.setattr(processes, "any_process", lambda flag: asked.append(flag) or next(answers))
    with stopping.StopRequest(together=True) as stop:
        assert [stop.requested() for _ in range(2)] == [False, False]
        signal.raise_signal(signal.SIGTERM)
        assert [stop.requested() for _ in range(2)] == [True, True]
    assert asked == [False, False, True, True]
    with stopping.StopRequest() as alone:
        assert not alone.requested()
        signal.raise_signal(signal.SIGTERM)
        assert alone.requested()
