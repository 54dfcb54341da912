"""The command line: flags in, a table and a report out, and one line with an exit code where something is wrong.

Nothing that takes time to import is imported before it is needed: help is there at once.
"""

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterator

from sae_jax import flags as flags_lib
from sae_jax.errors import Interrupted, Preempted, Refused, RunFailed
from sae_jax.flags import Given


def main(argv: list[str]) -> int:
    """Runs one verb; returns the exit code."""
    if not argv or argv[0] in ("help", "-h", "--help"):
        print(flags_lib.usage_of(argv[1]) if argv[1:2] and argv[1] in flags_lib.VERBS else flags_lib.usage(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        import importlib.metadata

        try:
            print(f"sae-jax {importlib.metadata.version('sae-jax')}")
        except importlib.metadata.PackageNotFoundError:
            print("sae-jax, not installed")
        return 0
    try:
        _check_alike(argv)
        if argv[0] not in VERBS:
            near = difflib.get_close_matches(argv[0], VERBS, n=1)
            nearest = f" (the nearest is {near[0]})" if near else ""
            raise Refused("verb", argv[0], "one of " + ", ".join(VERBS) + nearest)
        if {"-h", "--help"} & set(argv):
            print(flags_lib.usage_of(argv[0]), end="")
            return 0
        return VERBS[argv[0]](argv[1:])
    except (Refused, RunFailed, Preempted) as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say(f"{Interrupted.said}; run again to go on", Interrupted.exit_code)
    except (OSError, MemoryError) as error:
        return _say(f"{type(error).__name__}: {error}", RunFailed.exit_code)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        return _say(f"out of memory: fewer sae.n_features or a smaller batch may fit ({error})", RunFailed.exit_code)


def _check_alike(argv: list[str]) -> None:
    """Where this is one of several processes of a run, refuses what the others were not told."""
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        from sae_jax.runtime import processes

        with processes.together():
            processes.check_alike("command line", "command line", argv)


def _say(message: str, exit_code: int) -> int:
    print(f"sae_jax: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


# -- the verbs -------------------------------------------------------------------------------------------------------


def train(words: list[str]) -> int:
    """sae_jax train --config --workdir"""
    given = _read("train", words, "workdir")
    config = flags_lib.configuration(given)
    if config is None:
        raise Refused("--config", None, "a configuration file, as configs/synthetic.py")
    from sae_jax.reports import tables
    from sae_jax.training import run as run_lib

    _quiet()
    print(tables.table(run_lib.train(config, given["workdir"])))
    print(f"report, figures, checkpoints: {given['workdir']}")
    return 0


def diagnose(words: list[str]) -> int:
    """sae_jax diagnose --activations | --config, --workdir"""
    given = _read("diagnose", words, "workdir")
    _one_of(given, "activations", "config", "a file or a dataset folder")
    if given["sae"] is None:
        given.refuse("--sae=RUN beside it", "member")
        given.refuse("--sae=TRANSCODER beside it", "target")
    else:
        given.refuse("leave it out: the SAE has its own", "n_features", "k", "selection", "threshold")
        given.refuse("leave it out: of an SAE that is there, deaths are always counted", "measure")
        given.refuse("leave it out: an SAE that is there has been trained", "pilot")
    if given["pilot"]:
        given.refuse("leave it out with --pilot: settings of the configuration, --config.sae", "n_features", "k")
        given.refuse("leave it out with --pilot, which trains TopK SAEs", "selection", "threshold")
    config = flags_lib.configuration(given)
    selection = given["selection"] or ("topk" if config is None else config.sae.activation)
    if selection in ("jumprelu", "relu"):
        given.refuse("leave it out: topk and batch_topk keep k", "k")
    activations = given["activations"] if config is None else config
    names = ("n_features", "k", "threshold", "n_probes", "seed", "target", "pilot")
    typed: dict[str, str] = {name: f"--{name}" for name in names}
    if config is None:
        typed["activations"] = "--activations"
    from sae_jax.reports import tables

    _quiet()
    with _named(typed):
        if given["sae"] is not None:
            from sae_jax.diagnosis import autopsy, diagnosis

            found = autopsy.dissect(
                given["sae"], activations, given["workdir"], target=given["target"], member=given["member"],
                n_probes=diagnosis.N_PROBES if given["n_probes"] is None else given["n_probes"], seed=given["seed"],
            )  # fmt: skip
            print(tables.autopsy_table(found))
            print(f"report, page, features.csv, figures: {given['workdir']}")
            return 0
        from sae_jax import config as config_lib
        from sae_jax.diagnosis import diagnosis

        sae = config_lib.base().sae if config is None else config.sae
        found = diagnosis.diagnose(
            activations, given["workdir"],
            n_features=sae.n_features if given["n_features"] is None else given["n_features"],
            k=(sae.k or config_lib.base().sae.k) if given["k"] is None else given["k"],
            selection=selection, threshold=given["threshold"], measure=given["measure"],
            n_probes=given["n_probes"], seed=given["seed"], pilot=given["pilot"],
        )  # fmt: skip
    print(tables.diagnosis_table(found))
    print(f"report, figures: {given['workdir']}")
    return 0


def export(words: list[str]) -> int:
    """sae_jax export --workdir | --from, --format, --out"""
    given = _read("export", words, "out")
    _one_of(given, "workdir", "from", "the folder of a run")
    source = "from" if given["from"] is not None else "workdir"
    from etils import epath

    from sae_jax.exchange import hub, saelens, sharing
    from sae_jax.runtime import checkpoint

    _quiet()
    local = not given[source].startswith((hub.HUB, saelens.HUB))
    folder = epath.Path(given[source])
    if given["member"] is not None and local and folder.exists() and not (folder / checkpoint.FOLDER).is_dir():
        raise Refused("--member", given["member"], f"leave it out: {given[source]} is no run, and has no members")
    out = epath.Path(given["out"])
    held = out.is_dir() and any(out.iterdir())
    with _named({"--sae": f"--{source}"}):
        of = {name: given[name] for name in ("member", "push", *sharing.SAID)}
        sharing.export(given[source], given["out"], given["format"], **of)
    there = " is there already, as it would be written" if held else ""
    print(f"{given['format']}: {given['out']}{there}" + (f", pushed to {given['push']}" if given["push"] else ""))
    return 0


def extract(words: list[str]) -> int:
    """sae_jax extract --config | --from, --out"""
    given = _read("extract", words, "out")
    _one_of(given, "from", "config", "a file")
    if given["from"] is not None:
        given.refuse("leave it out: a file has one layer", "layers")
    config = flags_lib.configuration(given)
    if config is None:
        from sae_jax.activations import store

        with _named({"data.path": "--from"}):
            folders = [store.import_file(given["from"], given["out"], given["dtype"] or "float32")]
    else:
        from sae_jax import config as config_lib
        from sae_jax.models import extraction

        config_lib.check(config)
        model = config.data.model
        if not model.id:
            raise Refused("data.model.id", model.id, "a model")
        model.dtype = given["dtype"] or model.dtype
        try:
            layers = sorted({int(layer) for layer in given["layers"] or [model.layer]})
        except ValueError as error:
            raise Refused("--layers", ",".join(given["layers"]), "numbers, as 1,2,9") from error
        if layers[0] < 0:
            raise Refused("--layers", layers[0], "numbers ≥ 0")
        folders = list(extraction.extract(model, layers, given["out"]).values())
    print("\n".join(folders))
    return 0


def sweep(words: list[str]) -> int:
    """sae_jax sweep --config --workdir; exit code 4 where some jobs failed"""
    given = _read("sweep", words, "workdir")
    if given["launcher"] != "ray":
        given.refuse("leave it out, or give --launcher=ray beside it", "address", "cpus", "gpus")
    if given["merge"]:
        given.refuse("leave it out with --merge, which does no job", "shard", "dry_run")
    config = flags_lib.configuration(given)
    if config is None:
        raise Refused("--config", None, "a configuration file with sweep(add), as configs/sweep.py")
    from sae_jax.sweeps import cluster, combinations
    from sae_jax.sweeps import jobs as jobs_lib

    _quiet()
    every = combinations.jobs(given["config"], config, given["grid"])
    chosen = combinations.selected(every, given["filter"])
    if given["shard"]:
        chosen = combinations.share(chosen, given["shard"])
    if given["dry_run"]:
        print(combinations.plan(chosen))
        return 0
    ray = given["launcher"] == "ray" and not given["merge"]
    launch = cluster.launcher(given["address"], given["cpus"], given["gpus"]) if ray else jobs_lib.local
    if not (ray or given["merge"]):
        jobs_lib.check_memory(given["workdir"], chosen)
    jobs_lib.check_workdir(given["workdir"], every, begun=given["merge"])
    if not given["merge"]:
        jobs_lib.run(given["workdir"], chosen, launch, given["shard"].replace("/", "-of-") or "all")
    if not given["shard"]:
        jobs_lib.merge(given["workdir"], every)
    print(jobs_lib.summary(given["workdir"], chosen))
    print(f"table: {given['workdir']}/{jobs_lib.RESULTS}" if not given["shard"] else "table: run with --merge")
    return 0 if all(jobs_lib.finished(given["workdir"], job) for job in chosen) else 4


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train, "diagnose": diagnose, "extract": extract, "export": export, "sweep": sweep,
}  # fmt: skip


# -- what they share -------------------------------------------------------------------------------------------------


def _read(verb: str, words: list[str], folder: str) -> Given:
    """The flags, with a folder to write to; paths that nothing here can look at are refused."""
    given = flags_lib.read(verb, words)
    if not given[folder]:
        raise Refused(f"--{folder}", given[folder], "a folder to write to")
    from etils import epath

    from sae_jax.runtime import disk

    for name in ("workdir", "out", "activations", "target", "from"):
        if given.values.get(name):
            disk.check_reachable(f"--{name}", given[name])
    if (path := epath.Path(given[folder])).exists() and not path.is_dir():
        raise Refused(f"--{folder}", given[folder], "a folder to write to; this is a file")
    return given


def _one_of(given: Given, one: str, other: str, what: str) -> None:
    if given[one] is not None and given[other] is not None:
        raise Refused(f"--{one} and --{other}", f"{given[one]}, {given[other]}", "one of the two")
    if given[one] is None and given[other] is None:
        raise Refused(f"--{one}", None, f"{what}, or --{other} in its place")


@contextlib.contextmanager
def _named(typed: dict[str, str]) -> Iterator[None]:
    """What functions refuse by a name of their own, under that of the flag."""
    try:
        yield
    except Refused as error:
        if error.field not in typed:
            raise
        raise Refused(typed[error.field], error.value, error.allowed) from error


def _quiet() -> None:
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # the libraries narrate every save, and what they raise a second time
