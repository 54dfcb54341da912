"""Processes to be killed, and what to look at when they are dead: the tools of fault_campaign.py.

Children are forked from a process that has imported JAX but not started it: real processes that really die, without
four seconds of imports each.
"""

import csv
import hashlib
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a process with threads, even pyarrow's, must not fork

import jax
import numpy as np
from etils import epath

from sae_jax.__main__ import run
from sae_jax.activations import store, stored
from sae_jax.reports import figures
from sae_jax.runtime import checkpoint, disk, progress

SETTINGS = """
from ml_collections import ConfigDict
from sae_jax.config import base
def get_config():
    config = base()
    config.sae.n_features, config.sae.k, config.seed = 128, 4, 3
    config.data.d_model, config.data.gamma, config.data.n_true_features, config.data.n_active = 16, 4.0, 32, 3
    config.data.statistics_tokens, config.eval.n_tokens, config.eval.batch_size = 1000, 400, 200
    config.train.steps, config.train.batch_size, config.train.steps_per_dispatch = 600, 32, 10
    config.checkpoint.every = 30
    config.data.model.layer, config.data.model.n_tokens, config.data.model.context = 1, 10000, 32
    config.data.model.batch_size = 8
    config.members = ConfigDict({"baseline": {}, "centred": {"sae": {"center": "mean"}}})
    return config
def sweep(add):
    for gamma in (0.0, 2.0, 8.0):
        add({"data.signal": "gaussian", "data.gamma": gamma, "train.steps": 0}, label=f"untrained{gamma:.0f}")
    add({"data.signal": "sparse", "data.gamma": 10.0, "train.steps": 200}, label="trained")
"""
figures.STYLE["figure.dpi"] = 40  # nobody looks at them, and they would take half the time
done = mmap.mmap(-1, 8)  # how far the running child has come: shared with it, and there when it is dead


class Ended(NamedTuple):
    """How a child ended."""

    code: int  # minus the signal's number where a signal ended it
    said: str
    reached: int  # step or token it had come to
    seconds: float  # up to the signal, or the end
    dying: float  # seconds from the signal to the end


class Child:
    """`python -m sae_jax ARGV`, forked; `join` makes it one process of several."""

    def __init__(self, argv: list[str], log: Path, join: tuple[int, int, int] | None = None):
        assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
        done[:] = struct.pack("q", 0)
        self._log, self._pid = log, os.fork()
        if self._pid == 0:
            self._run(argv, join)

    def _run(self, argv: list[str], join: tuple[int, int, int] | None) -> None:
        code = 70
        try:
            file = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            _count_progress()
            store.SHARD_BYTES = 64 * 2**10
            if join:
                jax.distributed.initialize(f"127.0.0.1:{join[0]}", join[1], join[2])
            sys.argv[1:] = argv
            run()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def alive(self) -> bool:
        return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self, after: float = np.inf, at: float = np.inf, by: int = signal.SIGKILL) -> Ended:
        """Waits for the end; sends the signal after some seconds or at some progress, if it is still alive then."""
        start = time.monotonic()
        while self.alive() and time.monotonic() - start < after and struct.unpack("q", done)[0] < at:
            time.sleep(0.002)
        sent = time.monotonic()
        if self.alive():
            os.kill(self._pid, by)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        seconds, reached = time.monotonic() - sent, struct.unpack("q", done)[0]
        return Ended(code, self._log.read_text(errors="replace"), reached, sent - start, seconds)


def _count_progress() -> None:
    """In the child: steps trained and tokens given to a writer are counted where the parent sees them."""

    class Steps(progress.Progress):
        def update(self, count: int, *_: object) -> None:
            super().update(count)
            if self.unit == "steps":
                done[:] = struct.pack("q", self.at)

    progress.Progress = Steps  # type: ignore[misc]
    add = store.Writer.add

    def counted(self: store.Writer, start: int, rows: store.Rows) -> None:
        done[:] = struct.pack("q", start + len(rows.x))
        add(self, start, rows)

    store.Writer.add = counted  # type: ignore[method-assign]


# -- what is looked at ------------------------------------------------------------------------------------------------


def sha(data: bytes) -> str:
    """Of some bytes."""
    return hashlib.sha256(data).hexdigest()


def trained(folder: Path) -> dict[str, str]:
    """Digests of report, figures and the arrays of the last checkpoint, whose files hold times and random names."""
    found = {path.name: sha(path.read_bytes()) for path in folder.iterdir() if path.suffix in (".json", ".png", ".csv")}
    saved = checkpoint.saved(str(folder), whole=True)
    for where, leaf in jax.tree_util.tree_leaves_with_path((saved.groups, saved.statistics)):
        found[jax.tree_util.keystr(where)] = sha(np.asarray(leaf).tobytes())
    return found | {"step": str(saved.step), "history": sha(repr(saved.history).encode())}


def steps(folder: Path) -> int:
    """Step of the newest complete checkpoint."""
    return max(checkpoint.steps(epath.Path(folder / checkpoint.FOLDER)), default=0)


def tokens(folder: Path) -> int:
    """Tokens in whole shards, of the layer that has the fewest."""
    manifests = sorted(folder.glob(f"{store.NAME}/*/*/{store.MANIFEST}"))
    held = [disk.read_json("", epath.Path(path)) for path in manifests]
    return min((m["facts"]["chunk"] * sum(s["chunks"] for s in m["shards"]) for m in held), default=0)


def files(folder: Path, ignore: tuple[str, ...] = ()) -> dict[str, str]:
    """Digest of every file but those of the names to be ignored."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in (disk.LOCK, *ignore)]
    return {str(path.relative_to(folder)): sha(path.read_bytes()) for path in sorted(paths)}


def all_rows(dataset: Path) -> str:
    """Digest of all that a dataset holds, read as training reads it."""
    chunks = stored.StoredChunks(str(dataset))
    return sha(b"".join(part.tobytes() for i in range(len(chunks)) for part in chunks.example(i)))


def not_whole(folder: Path) -> list[str]:
    """Visible files that are not as they should be. Names with .partial or tmp are not there to be seen."""
    bad = []
    for path in folder.rglob("*"):
        hidden = any(".partial" in part or "orbax-checkpoint-tmp" in part for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            try:
                disk.read_json("", epath.Path(path))
            except ValueError:
                bad.append(str(path))
        if path.suffix == ".csv" and len({len(row) for row in csv.reader(data.decode().splitlines())}) != 1:
            bad.append(str(path))
        if path.suffix == ".png" and not data.endswith(b"IEND\xaeB`\x82"):
            bad.append(str(path))
        if path.suffix == ".safetensors" and len(data) < 8 + struct.unpack("<Q", data[:8])[0]:
            bad.append(str(path))
        if path.name == store.MANIFEST:
            for number, shard in enumerate(stored.read_manifest("", epath.Path(path.parent))["shards"]):
                file = stored.template(epath.Path(path.parent)).sharded_filepath(shard_index=number, num_shards=None)
                bad += [] if sha(file.read_bytes()) == shard["sha256"] else [str(file)]
    for step in checkpoint.steps(epath.Path(folder / checkpoint.FOLDER)):
        wrong = checkpoint.damage(epath.Path(folder / checkpoint.FOLDER / str(step)))
        bad += [f"checkpoint {step}: {wrong}"] if wrong else []
    return bad


def in_child(work: Callable[[], Any], to: Path) -> str:
    """The result of some work done in a process of its own, so that this one stays without threads."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            to.write_text(repr(work()))
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1] != 0:
        raise SystemExit("a helper process failed")
    return to.read_text()


def make_model(folder: Path) -> None:
    """A GPT-2 of random weights with a tokenizer of words."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["<unk>", "<s>", *map(str, range(60))])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.GPT2Config(vocab_size=62, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def damage(place: Path, rng: Any) -> None:
    """Flips a bit of a file, or cuts it short; of a file of a folder, where it is one."""
    if place.is_dir():
        inside = [p for p in sorted(place.rglob("*")) if p.is_file() and p.name != checkpoint.COMMITTED]
        place = inside[rng.integers(len(inside))]
    data = bytearray(place.read_bytes())
    if rng.random() < 0.5 and data:
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    else:
        data = data[: rng.integers(max(1, len(data)))]
    place.write_bytes(data)


# -- activities -------------------------------------------------------------------------------------------------------


class Activity(NamedTuple):
    """Something that is killed: its command, the folder it leaves, and how much of its work is safe there."""

    argv: Callable[[Path, Path], list[str]]  # (root, folder)
    kept: Callable[[Path], int]  # steps or tokens that the next start need not do again
    end: Callable[[Path], dict[str, str]]  # what has to be bit-identical: name → digest


ACTIVITIES = {
    "train": Activity(
        lambda root, folder: ["train", f"--config={root}/c.py", "--config.data.signal=sparse", f"--workdir={folder}"],
        steps, trained,
    ),
    "extract": Activity(
        lambda root, folder: ["extract", f"--config={root}/c.py", f"--config.data.model.id={root}/model",
                              f"--config.data.model.text={root}/text.txt", "--layers=1,2", f"--out={folder}"],
        tokens, lambda folder: files(folder, ("dataset_info.json",)),
    ),
    "sweep": Activity(
        lambda root, folder: ["sweep", f"--config={root}/c.py", f"--workdir={folder}"],
        lambda folder: max((steps(job.parent) for job in folder.glob(f"jobs/*/{checkpoint.FOLDER}")), default=0),
        lambda folder: {"results": sha((folder / "results.csv").read_bytes())},
    ),
    "export": Activity(
        lambda root, folder: ["export", f"--workdir={root}/undisturbed/train", "--member=centred",
                              f"--out={folder}/sae"],
        lambda folder: 0, files,
    ),
}  # fmt: skip
