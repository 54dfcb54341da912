"""The command line: flags in, a table and a report out, and one line with an exit code where something is wrong."""

import difflib
import sys
from collections.abc import Callable

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from sae_jax import config as config_lib
from sae_jax.errors import Preempted, Refused, RunFailed
from sae_jax.runtime import disk

USAGE = """usage:
  python -m sae_jax train    --config=configs/X.py --workdir=DIR [--config.a.b=value ...]
  python -m sae_jax diagnose --activations=PATH --workdir=DIR [--k=64 --n_features=8192 --measure]
  python -m sae_jax diagnose --activations=PATH --workdir=DIR --sae=SAE [--member=NAME]
  python -m sae_jax export   --workdir=RUN --format=saelens --out=DIR [--member=NAME] [--push=OWNER/NAME]
  python -m sae_jax export   --from=SAE --format=sparsify --out=DIR
  python -m sae_jax extract  --config=configs/X.py --out=DIR [--layers=1,2,9] [--config.a.b=value ...]
  python -m sae_jax extract  --from=FILE_OR_SAELENS_CACHE --out=DIR [--dtype=float32]
  python -m sae_jax sweep    --config=configs/sweep.py --workdir=DIR [--filter=model=gpt2] [--grid=seed=0,1] [--dry_run]
                             [--shard=0/8 | --merge] [--launcher=local|ray]

verbs:
  train      train the SAEs a configuration describes; run it again to go on where it stopped
  diagnose   outlier severity, predicted death and the remedy, before any training. PATH is a .npy, .npz or .safetensors
             file or a dataset folder; --config=configs/X.py in its place takes the activations a configuration names.
             With --sae: which features of that SAE are dead, by which pathway, and what centring would have saved. SAE
             is a run; the folder or file of an SAE of saelens, dictionary_learning, sparsify, Gemma Scope, OpenAI and
             others; hf://OWNER/NAME/PLACE; or saelens:RELEASE/ID, a release that SAELens lists
  export     write an SAE of a run, or of another format, as saelens, dictionary_learning or sparsify; --push puts the
             folder on the Hugging Face hub as well
  extract    write a model's activations, many layers in one pass, or those in a file, as datasets to train on
  sweep      many models and layers into one table, results.csv; run it again to go on. --filter: model, domain or layer
"""


def main(argv: list[str]) -> int:
    """Runs one verb; returns the exit code."""
    if not argv or argv[0] == "help" or {"-h", "--help"} & set(argv):
        print(USAGE, end="")
        return 0 if argv else 2
    try:
        verb = VERBS.get(argv[0])
        if verb is None:
            raise Refused("verb", argv[0], "one of " + ", ".join(VERBS))
        return verb(argv)
    except (Refused, RunFailed, Preempted) as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say("stopped from the keyboard; run again to go on", 130)
    except (OSError, MemoryError) as error:
        return _say(f"{type(error).__name__}: {error}", RunFailed.exit_code)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        return _say(f"out of memory: fewer sae.n_features or a smaller batch may fit ({error})", RunFailed.exit_code)


def _say(message: str, exit_code: int) -> int:
    print(f"sae_jax: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def train(argv: list[str]) -> int:
    """sae_jax train --config --workdir"""
    given, config = _parse(argv, lambda values: None)
    if config is None:
        raise Refused("--config", None, "a configuration file, as configs/synthetic.py")
    from sae_jax.reports import tables
    from sae_jax.training import run as run_lib

    logging.set_verbosity(logging.FATAL)  # the libraries below narrate every save, and what they raise a second time
    print(tables.table(run_lib.train(config, given.workdir)))
    print(f"report, figures, checkpoints: {given.workdir}")
    return 0


def diagnose(argv: list[str]) -> int:
    """sae_jax diagnose --activations | --config, --workdir"""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("activations", None, "file or dataset folder", flag_values=values)
        flags.DEFINE_integer("n_features", None, "n of the SAE in question", flag_values=values)
        flags.DEFINE_integer("k", None, "its k", flag_values=values)
        flags.DEFINE_bool("measure", False, "also count deaths in untrained SAEs", flag_values=values)
        flags.DEFINE_integer("n_probes", 512, "random directions to forecast with", flag_values=values)
        flags.DEFINE_integer("seed", 0, "of probes and measured SAEs", flag_values=values)
        flags.DEFINE_string("sae", None, "an SAE to examine", flag_values=values)
        flags.DEFINE_string("member", None, "which SAE of a run", flag_values=values)

    given, config = _parse(argv, define)
    if (given.activations is None) == (config is None):
        raise Refused("--activations", given.activations, "a file or a dataset folder, or --config=FILE in its place")
    if given.member is not None and given.sae is None:
        raise Refused("--member", given.member, "--sae=RUN beside it")
    from sae_jax.diagnosis import autopsy, diagnosis
    from sae_jax.reports import tables

    logging.set_verbosity(logging.FATAL)
    if given.sae is not None:
        for flag in ("n_features", "k"):
            if given[flag].value is not None:
                raise Refused(f"--{flag}", given[flag].value, "left out: the SAE has its own")
        found = autopsy.dissect(
            given.sae, given.activations if config is None else config, given.workdir,
            member=given.member, n_probes=given.n_probes, seed=given.seed,
        )  # fmt: skip
        print(tables.autopsy_table(found))
        print(f"report, features.csv, figures: {given.workdir}")
        return 0
    sae = config_lib.base().sae if config is None else config.sae
    found = diagnosis.diagnose(
        given.activations if config is None else config,
        given.workdir,
        n_features=sae.n_features if given.n_features is None else given.n_features,
        k=sae.k if given.k is None else given.k,
        measure=given.measure,
        n_probes=given.n_probes,
        seed=given.seed,
    )
    print(tables.diagnosis_table(found))
    print(f"report, figures: {given.workdir}")
    return 0


def export(argv: list[str]) -> int:
    """sae_jax export --workdir | --from, --format, --out"""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", None, "a new folder", flag_values=values)
        flags.DEFINE_string("from", None, "an SAE of any format", flag_values=values)
        flags.DEFINE_string("format", "saelens", "saelens, dictionary_learning or sparsify", flag_values=values)
        flags.DEFINE_string("member", None, "which SAE of a run", flag_values=values)
        flags.DEFINE_string("push", None, "a repository on the Hugging Face hub", flag_values=values)

    given, _ = _parse(argv, define, folder="out")
    source: str | None = given["from"].value
    if (source is None) == (given.workdir is None):
        raise Refused("--workdir", given.workdir, "the folder of a run, or --from=SAE in its place")
    from sae_jax.exchange import sharing

    logging.set_verbosity(logging.FATAL)
    sharing.export(
        given.workdir if source is None else source, given.out, given.format, member=given.member, push=given.push
    )
    print(f"{given.format}: {given.out}" + (f", pushed to {given.push}" if given.push else ""))
    return 0


def extract(argv: list[str]) -> int:
    """sae_jax extract --config | --from, --out"""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", None, "folder for datasets", flag_values=values)
        flags.DEFINE_string("from", None, "a file to import", flag_values=values)
        flags.DEFINE_list("layers", None, "layers, as 1,2,9", flag_values=values)
        flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "of what is kept", flag_values=values)

    given, config = _parse(argv, define, folder="out")
    source: str | None = given["from"].value
    if (source is None) == (config is None):
        raise Refused("--from", source, "a file, or --config=FILE in its place")
    from sae_jax.activations import store
    from sae_jax.models import extraction

    if config is None or source is not None:
        folders = [store.import_file(str(source), given.out, given.dtype or "float32")]
    else:
        config_lib.check(config)
        model = config.data.model
        if not model.id:
            raise Refused("data.model.id", model.id, "a model")
        if given.dtype:
            model.dtype = given.dtype
        try:
            layers = sorted({int(layer) for layer in given.layers or [model.layer]})
        except ValueError as error:
            raise Refused("--layers", ",".join(given.layers), "numbers, as 1,2,9") from error
        if layers[0] < 0:
            raise Refused("--layers", layers[0], "numbers ≥ 0")
        folders = list(extraction.extract(model, layers, given.out).values())
    print("\n".join(folders))
    return 0


def sweep(argv: list[str]) -> int:
    """sae_jax sweep --config --workdir; exit code 4 where some jobs failed"""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_multi_string("filter", [], "model=…, domain=… or layer=…", flag_values=values)
        flags.DEFINE_multi_string("grid", [], "KEY=VALUE,VALUE,…", flag_values=values)
        flags.DEFINE_bool("dry_run", False, "list the jobs and what they cost", flag_values=values)
        flags.DEFINE_string("shard", "", "i/N: do this part only, and leave the table to --merge", flag_values=values)
        flags.DEFINE_bool("merge", False, "write the table from what the shards have done", flag_values=values)
        flags.DEFINE_enum("launcher", "local", ["local", "ray"], "where jobs run", flag_values=values)
        flags.DEFINE_string("address", None, "of a Ray cluster; none: this machine", flag_values=values)
        flags.DEFINE_float("cpus", 1, "a Ray task needs", flag_values=values)
        flags.DEFINE_float("gpus", 0, "a Ray task needs", flag_values=values)

    given, config = _parse(argv, define)
    if config is None:
        raise Refused("--config", None, "a configuration file with sweep(add), as configs/sweep.py")
    from sae_jax.sweeps import cluster, combinations
    from sae_jax.sweeps import jobs as jobs_lib

    logging.set_verbosity(logging.FATAL)
    every = combinations.jobs(config_flags.get_config_filename(given["config"]), config, given.grid)
    chosen = combinations.selected(every, given.filter)
    if given.shard:
        chosen = combinations.share(chosen, given.shard)
    if given.dry_run:
        print(combinations.plan(chosen))
        return 0
    ray = given.launcher == "ray" and not given.merge
    launch = cluster.launcher(given.address, given.cpus, given.gpus) if ray else jobs_lib.local
    jobs_lib.check_workdir(given.workdir, every)
    if not given.merge:
        jobs_lib.run(given.workdir, chosen, launch, given.shard.replace("/", "-of-") or "all")
    if not given.shard:
        jobs_lib.merge(given.workdir, every)
    print(jobs_lib.summary(given.workdir, chosen))
    print(f"table: {given.workdir}/{jobs_lib.RESULTS}" if not given.shard else "table: run with --merge")
    return 0 if all(jobs_lib.finished(given.workdir, job) for job in chosen) else 4


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train, "diagnose": diagnose, "extract": extract, "export": export, "sweep": sweep,
}  # fmt: skip
Define = Callable[[flags.FlagValues], None]


def _parse(argv: list[str], define: Define, folder: str = "workdir") -> tuple[flags.FlagValues, ConfigDict | None]:
    """The flags, and the configuration with its overrides if one is given. Wrong flags are refused in one line."""
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    others = [argument for argument in argv if argument not in overrides]
    values, plain = _read(others, define)
    if not values[folder].value:
        raise Refused(f"--{folder}", values[folder].value, "a folder to write to")
    for name in ("workdir", "out", "activations", "from"):
        if name in values and values[name].value:
            disk.check_reachable(f"--{name}", str(values[name].value))
    if plain is None:
        if overrides:
            raise Refused(overrides[0], "", "--config=FILE before its overrides")
        return values, None
    keys = config_lib.flatten(plain)
    for override in overrides:  # one by one, so that the one that is wrong can be named
        key, equals, value = override.removeprefix("--config.").partition("=")
        if not equals:
            raise Refused(override, "", "written as --config.KEY=VALUE")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=3, cutoff=0.4) or sorted(keys)
            raise Refused(key, value, "an existing key, as " + ", ".join(near))
        try:
            _read([*others, override], define)
        except Refused as error:
            raise Refused(key, value, f"a value of type {type(keys[key]).__name__}") from error
    return _read(argv, define)


def _read(argv: list[str], define: Define) -> tuple[flags.FlagValues, ConfigDict | None]:
    values = flags.FlagValues()
    try:
        config = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
        flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
        define(values)
        rest = values(argv)
        found = config.value
        if found is not None:
            config_lib.flatten(found)  # a file that could not be loaded speaks up here
    except (Exception, SystemExit) as error:  # a configuration file is code: what it raises, the user sees in one line
        raise Refused("flags", " ".join(argv[1:]), f"flags that can be read ({error})") from error
    if len(rest) > 1:
        raise Refused("argument", rest[1], "flags only, as --config.train.steps=1000")
    return values, found
