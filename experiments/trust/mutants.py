"""Does the suite fail when it should? Faults are put into the package one at a time, and its tests run on each.

    python -m experiments.trust.mutants --workdir=runs/mutants --n=150 --seed=0

First every test file runs by itself under coverage: which lines and branches of the package it takes, and how long.
What all of them take together is printed. Then faults are drawn from the kinds of `KINDS`, as many of each as can be,
over the modules of `ROOMS`. Each goes into a copy of the tree, and what runs its statement is run until a test fails:
the tests themselves, of files that import the module and then of the others, those first that take the fewest lines;
then the whole of the files that import it, as a program that one test has traced another may use, and of all files
where it is in no test's own lines, as a constant is. A fault that nothing notices within `LIMIT` seconds each time
survives, so the score is a lower bound; one whose statement no test runs does so untried. Writes covered.json, and
seed0.csv, a line a fault: run again to go on. A draw hangs on the sources: another commit draws others, and those of
an earlier one that it does not draw are not counted. Some one and a half hours for 150 on 2 CPU cores with nothing
beside it, as it pins tests to cores. Those marked `long` are left out. `--named=experiments/trust/named_faults.csv`
tries, in place of drawn faults, some that once went unnoticed (named.csv), with four times the limit.
"""

import ast
import contextlib
import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from experiments import command
from sae_jax.errors import Refused
from sae_jax.reports import tables
from sae_jax.runtime import disk

ROOT = Path(__file__).parents[2]
N = flags.DEFINE_integer("n", 150, "faults to draw", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the draw")
NAMED = flags.DEFINE_string("named", "", "a table of faults to try in place of drawn ones: module, was, is")
WORKERS = flags.DEFINE_integer("workers", 2, "faults tried side by side", lower_bound=1)
ROOMS = ("autoencoder", "outliers", "activations", "training", "runtime", "diagnosis", "exchange", "sweeps")
TREE = ("sae_jax", "tests", "configs", "experiments", "colab", "README.md", "CONTRIBUTING.md", "pyproject.toml",
        "setup.cfg", ".ci", "CHANGELOG.md", "CITATION.cff", "LICENSE")  # fmt: skip
LIMIT = 150  # seconds of tests for one fault, and again of whole files
HANGS = 100  # seconds that no test takes by itself; less than LIMIT, or what hangs would go unnoticed
RUNNING: set[int] = set()  # process groups of tests
FIELDS = ("module", "line", "kind", "was", "is", "caught_by", "seconds")

COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/", ast.Mod: "*"}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "mean", "mean": "sum", "argmax": "argmin",
         "minimum": "maximum", "maximum": "minimum", "zeros": "ones", "ones": "zeros", "floor": "ceil", "sqrt": "abs",
         "zeros_like": "ones_like"}  # fmt: skip
KINDS = ("comparison", "arithmetic", "number", "truth", "condition", "call", "bound")


class Fault(NamedTuple):
    """A stretch of a module, and what stands there in its place."""

    module: str
    line: int
    start: int
    stop: int
    kind: str
    was: str
    new: str


def faults_of(module: str, source: str) -> Iterator[Fault]:
    """Every fault of one module. Annotations, messages, docstrings and zip's `strict`, which guards, are left alone."""
    lines = source.encode().splitlines(keepends=True)
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))
    tree, raw = ast.parse(source), source.encode()
    alone = {id(inner) for node in ast.walk(tree) for outer in _left_alone(node) for inner in ast.walk(outer)}

    def at(node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return begins[node.lineno - 1] + node.col_offset, begins[node.end_lineno - 1] + node.end_col_offset

    def fault(node: ast.expr, start: int, stop: int, kind: str, new: str) -> Fault:
        return Fault(module, node.lineno, start, stop, kind, raw[start:stop].decode(), new)

    for node in ast.walk(tree):
        if id(node) in alone:
            continue
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            yield fault(node, at(node.left)[1], at(node.comparators[0])[0], "comparison",
                        f" {COMPARISONS[type(node.ops[0])]} ")  # fmt: skip
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _text(node):
            start, stop = at(node.left)[1], at(node.right)[0]
            closed, opened = raw[start:stop].count(b")"), raw[start:stop].count(b"(")
            if not closed and not opened:
                yield fault(node, start, stop, "arithmetic", f" {ARITHMETIC[type(node.op)]} ")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield fault(node, *at(node), "truth", str(not node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float) and node.value == node.value:
            yield fault(node, *at(node), "number", repr(node.value + 1 if isinstance(node.value, int)
                                                        else node.value * 2 or 1.0))  # fmt: skip
        elif isinstance(node, ast.BoolOp) and len(node.values) == 2:
            yield fault(node, at(node.values[0])[1], at(node.values[1])[0], "condition",
                        " or " if isinstance(node.op, ast.And) else " and ")  # fmt: skip
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield fault(node, at(node)[0], at(node.operand)[0], "condition", "")
        elif isinstance(node, ast.Call):
            name = node.func
            if isinstance(name, ast.Attribute) and name.attr in CALLS:
                stop = at(name)[1]
                yield fault(node, stop - len(name.attr), stop, "call", CALLS[name.attr])
            elif isinstance(name, ast.Name) and name.id in CALLS:
                yield fault(node, *at(name), "call", CALLS[name.id])
        elif isinstance(node, ast.Slice):
            for bound in (node.lower, node.upper):
                if bound is not None and not isinstance(bound, ast.Constant):
                    yield fault(bound, at(bound)[1], at(bound)[1], "bound", " + 1")


def _left_alone(node: ast.AST) -> list[ast.expr]:
    found = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    if isinstance(node, ast.keyword) and node.arg == "strict":
        found.append(node.value)
    return [one for one in found if one is not None]


def _text(node: ast.BinOp) -> bool:
    """Whether strings or lists are joined, or a type is spelt."""
    plain = (ast.JoinedStr, ast.List, ast.Tuple)
    sides = (node.left, node.right)
    return any(isinstance(side, plain) or (isinstance(side, ast.Constant) and isinstance(side.value, str | bytes))
               for side in sides)  # fmt: skip


def drawn(seed: int) -> list[Fault]:
    """All faults, in an order that takes each kind in turn."""
    rng, of_kind = random.Random(seed), {kind: [] for kind in KINDS}  # type: dict[str, list[Fault]]
    for room in ROOMS:
        for path in sorted((ROOT / "sae_jax" / room).glob("*.py")):
            module = str(path.relative_to(ROOT))
            for fault in faults_of(module, path.read_text()):
                of_kind[fault.kind].append(fault)
    for found in of_kind.values():
        rng.shuffle(found)
    order: list[Fault] = []
    while any(of_kind.values()):
        order += [found.pop() for found in of_kind.values() if found]
    return order


def named(path: str) -> Iterator[Fault]:
    """The faults of a table, whose `was` stands once in its module."""
    for row in disk.read_csv("--named", path, dict.fromkeys(("module", "was", "is"), str)):
        if not row["was"] or not (ROOT / (row["module"] or "/")).is_file():
            raise Refused("--named", path, f"modules that are there, and what stands in them; not {row}")
        before, was, after = (ROOT / row["module"]).read_text().partition(row["was"])
        if not was or was in after:
            raise Refused("--named", path, f"what stands in a module once; in {row['module']} not {row['was']!r}")
        line, start, stop = before.count("\n") + 1, len(before.encode()), len((before + was).encode())
        yield Fault(row["module"], line, start, stop, "named", was, row["is"] or "")


def wanted(fault: Fault) -> set[int]:
    """First lines of statements: what runs one of them runs the fault. Of a default value or a decorator: the body."""

    def first(node: ast.stmt) -> int:
        return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])

    inside = [node for node in ast.walk(ast.parse((ROOT / fault.module).read_text()))
              if isinstance(node, ast.stmt) and first(node) <= fault.line <= (node.end_lineno or 0)]  # fmt: skip
    innermost = max(inside, key=first)
    if isinstance(innermost, ast.FunctionDef | ast.ClassDef):
        return {node.lineno for node in innermost.body}
    return {innermost.lineno}


def imports(name: str, module: str) -> bool:
    """Whether a test file imports a module by its name."""
    room, stem = Path(module).parent.name, Path(module).stem
    written = rf"sae_jax\.{room}(\.{stem}\b| import [^\n]*\b{stem}\b)"
    return bool(re.search(written, (ROOT / "tests" / name).read_text()))


def put(fault: Fault, whole: bytes) -> bytes:
    """The module with the fault in it."""
    return whole[: fault.start] + fault.new.encode() + whole[fault.stop :]


def stands(fault: Fault) -> bool:
    """Whether it is Python: brackets that stand outside of an operand may be cut in half."""
    try:
        ast.parse(put(fault, (ROOT / fault.module).read_bytes()))
    except SyntaxError:
        return False
    return True


def run(copy: Path, words: list[str], seconds: float, core: int, under: Path | None = None) -> tuple[int, str]:
    """Runs tests in a copy of the tree, on one core: pytest's exit code (−1: not done in time), where one failed."""
    wanted = ["-m", "pytest", "-x", "-n0", "-rfE", "--tb=no", "-p", "no:cacheprovider",
              "-o", f"faulthandler_timeout={HANGS}", "-o", "faulthandler_exit_on_timeout=true", *words]  # fmt: skip
    if under is not None:
        wanted = ["-m", "coverage", "run", f"--rcfile={under}", *wanted]
    cache = str(copy.parent / "compiled")
    environment = {**os.environ, "PYTHONPATH": str(copy), "JAX_COMPILATION_CACHE_DIR": cache}
    core = core % (os.cpu_count() or 1)
    begun = subprocess.Popen(
        ["taskset", "-c", str(core), sys.executable, *wanted], cwd=copy, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    RUNNING.add(begun.pid)
    try:
        said, _ = begun.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(begun.pid, signal.SIGKILL)
        begun.communicate()
        return -1, ""
    finally:
        RUNNING.discard(begun.pid)
    failed = re.search(r"^(?:FAILED|ERROR) tests/([\w.]+)", said, re.MULTILINE)
    return begun.returncode, failed[1] if failed else "(hangs)"


def stop(number: int, _: object) -> None:
    """Takes along the tests that run, which are groups of their own."""
    for group in list(RUNNING):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    print("stopped; run again to go on", file=sys.stderr, flush=True)
    os._exit(128 + number)


def copied(folder: Path) -> Path:
    """A copy of the tree, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def state(name: str) -> str:
    """What a test file's coverage is true of: the file, and the package."""
    files = [ROOT / "tests" / name, *sorted((ROOT / "sae_jax").rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def covered(workdir: Path) -> dict[str, dict[str, Any]]:
    """Of every test file: lines and branches of each module that it takes, the lines of each test, and seconds."""
    path = workdir / "covered.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    lock = threading.Lock()

    def one(name: str) -> None:
        now = state(name)
        if known.get(name, {}).get("of") == now:
            return
        folder = copied(workdir / f"cover_{name}")
        rc = folder / "coverage.ini"
        rc.write_text("[run]\nbranch = True\nparallel = True\npatch = subprocess, _exit\nsource = sae_jax\n"
                      "dynamic_context = test_function\n[json]\nshow_contexts = True\n")  # fmt: skip
        began = time.monotonic()
        code, _ = run(folder, [f"tests/{name}"], 3600, zlib.crc32(name.encode()), under=rc)
        seconds = time.monotonic() - began
        report = folder / "covered.json"
        for words in (["combine", f"--rcfile={rc}"], ["json", f"--rcfile={rc}", "-o", str(report)]):
            subprocess.run([sys.executable, "-m", "coverage", *words], cwd=folder, capture_output=True, check=False)
        found = json.loads(report.read_text())["files"] if report.exists() else {}
        entry = {"code": code, "seconds": seconds}
        for what in ("executed_lines", "executed_branches", "missing_branches"):
            entry[what] = {file: of[what] for file, of in found.items()}
        tests: dict[str, dict[str, list[int]]] = {}
        for file, of in found.items():
            for line, contexts in of["contexts"].items():
                for module, _, test in (context.rpartition(".") for context in contexts):
                    if module == Path(name).stem:  # libraries have functions of such names too
                        tests.setdefault(test, {}).setdefault(file, []).append(int(line))
        entry |= {"tests": tests, "of": now}
        shutil.rmtree(folder)
        with lock:
            known[name] = entry
            disk.write_text(epath.Path(path), json.dumps(known))
            print(f"{name}: {seconds:.0f} s, code {code}", flush=True)

    with ThreadPoolExecutor(WORKERS.value) as pool:
        list(pool.map(one, sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))))
    return known


def branches(cover: dict[str, dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Of every module: branches that some test file takes, and all."""
    taken: dict[str, set[tuple[int, int]]] = {}
    every: dict[str, set[tuple[int, int]]] = {}
    for entry in cover.values():
        for what, sets in (("executed_branches", (taken, every)), ("missing_branches", (every,))):
            for file, found in entry[what].items():
                for one in sets:
                    one.setdefault(file, set()).update(map(tuple, found))
    return {file: (len(taken.get(file, ())), len(found)) for file, found in every.items() if found}


def runs(fault: Fault, cover: dict[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
    """What may notice a fault, as words for pytest in the order in which they are run: tests, and whole files."""
    lines = wanted(fault)
    tests: list[tuple[bool, int, str]] = []
    whole: list[tuple[bool, float, str]] = []
    for name, entry in cover.items():
        if entry["code"] not in (0, 5) or not lines.intersection(entry["executed_lines"].get(fault.module, [])):
            continue
        far = not imports(name, fault.module)
        whole.append((far, entry["seconds"], f"tests/{name}"))
        found = sorted((sum(map(len, taken.values())), test) for test, taken in entry["tests"].items()
                       if lines.intersection(taken.get(fault.module, [])))  # fmt: skip
        tests += [(far, found[0][0], f"tests/{name}::{test}") for _, test in found]
    near = [one for one in whole if tests and not one[0]] or whole  # a constant of a module is in no test's own lines
    return [words for *_, words in sorted(tests, key=lambda one: one[:2])], [words for *_, words in sorted(near)]


def tried(fault: Fault, folder: Path, core: int, cover: dict[str, dict[str, Any]]) -> dict[str, object]:
    """The fault in a copy of the tree, and what notices it."""
    path = folder / fault.module
    whole = path.read_bytes()
    path.write_bytes(put(fault, whole))
    caught, began = "", time.monotonic()
    try:
        for words in filter(None, runs(fault, cover)):
            code, failed = run(folder, words, LIMIT * (4 if NAMED.value else 1), core)
            if code not in (-1, 0, 5):
                caught = failed
                break
    finally:
        path.write_bytes(whole)
    return dict(zip(FIELDS, (*_told(fault), caught, round(time.monotonic() - began)), strict=True))


def _told(fault: Fault) -> tuple[str, ...]:
    return fault.module, str(fault.line), fault.kind, fault.was.strip(), fault.new.strip()


def main(workdir: Path) -> None:
    """Draws, covers, tries, and prints the score."""
    if workdir.exists() and not workdir.is_dir():
        raise Refused("--workdir", str(workdir), "a folder")
    workdir = workdir.resolve()
    chosen: dict[tuple[str, ...], Fault] = {}
    for fault in named(NAMED.value) if NAMED.value else filter(stands, drawn(SEED.value)):
        chosen.setdefault(_told(fault), fault)  # the first of those that read alike
        if len(chosen) == N.value and not NAMED.value:
            break
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    workdir.mkdir(parents=True, exist_ok=True)
    cover = covered(workdir)
    taken = branches(cover)
    ways, of = (sum(column) for column in zip(*taken.values(), strict=True))
    print(f"branches of sae_jax/ that the tests take: {ways} of {of} ({ways / of:.1%}); most missing:")
    for file, (some, whole) in sorted(taken.items(), key=lambda item: item[1][0] - item[1][1])[:8]:
        print(f"  {file}: {some} of {whole}")
    table = workdir / ("named.csv" if NAMED.value else f"seed{SEED.value}.csv")
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    done = {tuple(row[field] for field in FIELDS[:5]) for row in rows}
    before, left = len(rows), [fault for told, fault in chosen.items() if told not in done]
    lock, free = threading.Lock(), [(copied(workdir / f"copy{i}"), i) for i in range(WORKERS.value)]

    def one(fault: Fault) -> None:
        with lock:
            folder, core = free.pop()
        row = tried(fault, folder, core, cover)
        with lock:
            free.append((folder, core))
            rows.append({key: str(value) for key, value in row.items()})
            tables.write_csv(table, rows)
            number = len(chosen) - len(left) + len(rows) - before
            print(f"{number}/{len(chosen)}  {row['module']}:{row['line']}  {row['was']} → {row['is']}  "
                  f"{row['caught_by'] or 'SURVIVES'}", flush=True)  # fmt: skip

    with ThreadPoolExecutor(WORKERS.value) as pool:
        list(pool.map(one, left))
    counted = [row for row in rows if tuple(row[field] for field in FIELDS[:5]) in chosen]
    caught, modules = sum(bool(row["caught_by"]) for row in counted), len({row["module"] for row in counted})
    print(f"{caught} of {len(counted)} caught ({caught / len(counted):.0%}), in {modules} modules")
    for row in counted:
        if not row["caught_by"]:
            print(f"survives: {row['module']}:{row['line']}  {row['was']} → {row['is']}")


if __name__ == "__main__":
    command.run(main, "runs/mutants")
