"""The flags of every verb, what is wrong with those that were given, and the configuration they name."""

import difflib
import re
import sys
import textwrap
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_jax.errors import Refused

if TYPE_CHECKING:  # help is there at once
    from ml_collections import ConfigDict

PROGRAM = "python -m sae_jax"


class Flag(NamedTuple):
    """One flag: int, float, bool, str, list (of words between commas), `EACH` (may be repeated), or its few words."""

    kind: Any
    default: Any
    meaning: str


class Verb(NamedTuple):
    """What a verb does, an example, and its flags in the order of its help."""

    about: str
    example: str
    flags: dict[str, Flag]


EACH = "each"  # a string that may be given several times
FORMATS = ("saelens", "dictionary_learning", "sparsify")
CONFIG = Flag(str, None, "a configuration file, as configs/synthetic.py")
ACTIVATIONS = "a file or folder of activations, PATH::NAME for one of several arrays, a dataset, or a cache"
AN_SAE = "a run, a folder or file of any library, hf://OWNER/NAME/PLACE, or saelens:RELEASE/ID"
MEMBER = Flag(str, None, "which SAE of a run that trained several")

VERBS = {
    "train": Verb(
        "train the SAEs a configuration describes; run it again to go on where it stopped",
        "train --config=configs/synthetic.py --workdir=runs/first --config.train.steps=1000",
        {"config": CONFIG, "workdir": Flag(str, None, "folder of the run, new or one that stopped")},
    ),
    "diagnose": Verb(
        "outlier severity, predicted death and the remedy, before training; with --sae: who is dead in it, and why",
        "diagnose --activations=layer12.npy --workdir=runs/layer12 --k=64 --n_features=8192 --measure",
        {
            "activations": Flag(str, None, ACTIVATIONS),
            "config": Flag(str, None, "in place of --activations: those that a configuration names"),
            "workdir": Flag(str, None, "folder for report.json and figures, in place of those that are there"),
            "n_features": Flag(int, None, "n of the SAE in question; not given: that of the configuration, or 8192"),
            "k": Flag(int, None, "its k; not given: that of the configuration, or 64"),
            "selection": Flag(("topk", "batch_topk", "jumprelu", "relu"), None,
                              "how it selects; not given: as in the configuration, or topk"),
            "threshold": Flag(float, None, "with --selection=jumprelu: in the units of the activations"),
            "measure": Flag(bool, False, "also count deaths in untrained SAEs"),
            "pilot": Flag(bool, False, "with --config: also what dies in training, by two runs of fewer steps"),
            "n_probes": Flag(int, None, "random directions to forecast with; not given: 512, more where not clear"),
            "seed": Flag(int, 0, "of probes and measured SAEs"),
            "sae": Flag(str, None, "to examine: " + AN_SAE),
            "member": MEMBER,
            "target": Flag(str, None, "of a transcoder: the activations that it is to reconstruct, token by token"),
        },
    ),
    "extract": Verb(
        "write a model's activations, many layers in one pass, or those in a file, as datasets to train on",
        "extract --config=configs/quickstart.py --out=data --layers=1,9 --config.data.model.n_tokens=100000",
        {
            "config": Flag(str, None, "a configuration that names a model, as configs/quickstart.py"),
            "from": Flag(str, None, "in its place, a file to import: " + ACTIVATIONS),
            "out": Flag(str, None, "folder for datasets"),
            "layers": Flag(list, None, "of the model, as 1,2,9; not given: data.model.layer of the configuration"),
            "dtype": Flag(("float32", "bfloat16", "float16"), None,
                          "of what is kept; not given: data.model.dtype, or float32 with --from"),
        },
    ),
    "export": Verb(
        "write an SAE of a run, or of another format, as saelens, dictionary_learning or sparsify",
        "export --workdir=runs/first --member=centred --format=saelens --out=exported",
        {
            "workdir": Flag(str, None, "a run to take the SAE from"),
            "from": Flag(str, None, "in its place, an SAE of any format: " + AN_SAE),
            "member": MEMBER,
            "format": Flag(FORMATS, "saelens", "of what is written"),
            "out": Flag(str, None, "a new or empty folder"),
            "model_name": Flag(str, None, "what the SAE is of, where it does not say so itself, as gpt2-small"),
            "hook_name": Flag(str, None, "its hook point, as any library spells it: blocks.3.hook_resid_post"),
            "layer": Flag(int, None, "number of its block, from 0; not given: read off the hook point"),
            "context_size": Flag(int, None, "tokens a sequence"),
            "prepend_bos": Flag(bool, None, "sequences began with a BOS token, or not: --noprepend_bos (for SAEBench)"),
            "push": Flag(str, None, "OWNER/NAME on the Hugging Face hub, which gets the folder as well"),
        },
    ),
    "sweep": Verb(
        "many models and layers into one table, results.csv; run it again to go on",
        "sweep --config=configs/sweep.py --workdir=runs/sweep --filter=model=gpt2 --dry_run",
        {
            "config": Flag(str, None, "a configuration file with sweep(add), as configs/sweep.py"),
            "workdir": Flag(str, None, "folder of the jobs and their table"),
            "filter": Flag(EACH, (), "only some: model=NAME,…, domain=NAME,… or layer=1,4-6; may be repeated"),
            "grid": Flag(EACH, (), "every job with each of these, KEY=VALUE,VALUE,…; may be repeated"),
            "dry_run": Flag(bool, False, "list the jobs and what they cost"),
            "shard": Flag(str, "", "i/N: do this part only, and leave the table to --merge"),
            "merge": Flag(bool, False, "write the table from what the shards have done"),
            "launcher": Flag(("local", "ray"), "local", "where jobs run"),
            "address": Flag(str, None, "with --launcher=ray: of a cluster; not given: RAY_ADDRESS, or this machine"),
            "cpus": Flag(float, 1.0, "with --launcher=ray: that a task needs"),
            "gpus": Flag(float, 0.0, "with --launcher=ray: that a task needs"),
        },
    ),
}  # fmt: skip


# -- help ------------------------------------------------------------------------------------------------------------

PLACEHOLDERS = {int: "INTEGER", float: "NUMBER", list: "A,B,…", EACH: "TEXT"}
PATHS = {"config": "FILE", "activations": "PATH", "workdir": "DIR", "out": "DIR", "from": "PATH", "sae": "SAE",
         "target": "PATH", "member": "NAME", "push": "OWNER/NAME", "shard": "i/N", "address": "ADDRESS"}  # fmt: skip


def usage() -> str:
    """The help of the command: its verbs, a line each."""
    verbs = "".join(f"  {name:9} {verb.about}\n" for name, verb in VERBS.items())
    return (f"usage: {PROGRAM} VERB --flag=value …   (or: sae-jax VERB …)\n\n{verbs}\n"
            f"{PROGRAM} VERB --help: its flags, with an example.   {PROGRAM} --version\n")  # fmt: skip


def usage_of(name: str) -> str:
    """The help of one verb: its flags with types and defaults, and an example."""
    verb, lines = VERBS[name], []
    for flag, (kind, default, meaning) in verb.flags.items():
        value = PLACEHOLDERS.get(kind, PATHS.get(flag, "TEXT")) if not isinstance(kind, tuple) else "|".join(kind)
        standard = f" (default: {default})" if kind is not bool and default not in (None, (), "") else ""
        lines.append((f"--{flag}" if kind is bool else f"--{flag}={value}", meaning + standard))
    if "config" in verb.flags:
        lines.append(("--config.KEY=VALUE", "any of its settings, as --config.sae.k=32 (sae_jax/config.py)"))
    width = max(len(left) for left, _ in lines if len(left) < 26)
    shown = "".join(
        textwrap.fill(right, 118, initial_indent=f"  {left:{width}}  ", subsequent_indent=" " * (width + 4)) + "\n"
        for left, right in lines
    )
    return f"usage: {PROGRAM} {name} --flag=value …\n\n{verb.about}\n\n{shown}\nexample:\n  {PROGRAM} {verb.example}\n"


# -- what was given --------------------------------------------------------------------------------------------------


@dataclass
class Given:
    """Values of all flags of a verb; which of them were typed; settings of the configuration, as text."""

    values: dict[str, Any]
    typed: set[str]
    overrides: list[tuple[str, str]]

    def __getitem__(self, flag: str) -> Any:
        return self.values[flag]

    def refuse(self, why: str, *flags: str) -> None:
        """Refuses those of the flags that were typed."""
        for flag in flags:
            if flag in self.typed:
                raise Refused(f"--{flag}", self[flag], why)


def read(name: str, words: list[str]) -> Given:
    """The words after a verb; both --flag=value and --flag value are understood."""
    known, left = VERBS[name].flags, list(words)
    given = Given({flag: kind.default for flag, kind in known.items()}, set(), [])
    while left:
        word = left.pop(0)
        found = re.fullmatch(r"--?([A-Za-z][^=]*)(?:=(.*))?", word, re.DOTALL)
        if found is None:
            raise Refused("argument", word, "flags only, as --config.train.steps=1000")
        flag, text = found[1], found[2]
        if flag.startswith("no") and text is None and known.get(flag[2:], CONFIG).kind is bool:
            flag, text = flag[2:], "false"
        if flag not in known and not (flag.startswith("config.") and "config" in known):
            raise Refused(f"--{flag}", text or "", _meant(name, flag.partition(".")[0]))
        if text is None and known.get(flag, CONFIG).kind is bool:
            text = "true"
        if text is None:
            if not left or left[0].startswith("--"):
                raise Refused(f"--{flag}", "", f"a value, as --{flag}=VALUE")
            text = left.pop(0)
        if flag.startswith("config."):
            given.overrides.append((flag.removeprefix("config."), text))
            continue
        value = _value(flag, known[flag].kind, text)
        given.values[flag] = (*given[flag], value) if known[flag].kind is EACH else value
        given.typed.add(flag)
    return given


def _meant(name: str, flag: str) -> str:
    others = [other for other, verb in VERBS.items() if flag in verb.flags]
    if others:
        return f"leave it out: a flag of {' and '.join(others)}, not of {name}"
    near = difflib.get_close_matches(flag, VERBS[name].flags, n=1)
    if near:
        return f"{name} has no such flag; the nearest is --{near[0]}"
    every = [*VERBS[name].flags, *(["config.KEY"] if "config" in VERBS[name].flags else [])]
    return f"{name} has no such flag, but " + ", ".join(f"--{each}" for each in every)


def _value(flag: str, kind: Any, text: str) -> Any:
    if isinstance(kind, tuple):
        if text not in kind:
            raise Refused(f"--{flag}", text, "one of " + ", ".join(kind))
        return text
    if kind is bool:
        if text.lower() not in ("true", "t", "1", "false", "f", "0"):
            raise Refused(f"--{flag}", text, "true or false")
        return text.lower() in ("true", "t", "1")
    if kind is list:
        return text.split(",")
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError as error:
        raise Refused(f"--{flag}", text, "an integer" if kind is int else "a number") from error


# -- the configuration -----------------------------------------------------------------------------------------------


def configuration(given: Given) -> "ConfigDict | None":
    """The configuration of --config with its overrides, None where none is given."""
    if given["config"] is None:
        for key, value in given.overrides:
            raise Refused(f"--config.{key}", value, "--config=FILE beside it")
        return None
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    from sae_jax import config as config_lib

    config = load(given["config"])
    keys, plain = config_lib.flatten(config), ConfigDict(config.to_dict())
    for key, value in given.overrides:  # one by one, so that the one that is wrong can be named
        member, own = config_lib.split_member(plain, key)
        if own not in keys:
            near = difflib.get_close_matches(key, keys, n=3, cutoff=0.4) or sorted(keys)
            raise Refused(key, value, "there is no such setting; the nearest are " + ", ".join(near))
        read = ConfigDict(config.to_dict()) if member else config  # read as the setting of all is
        values, argv = flags.FlagValues(), ["", f"--config.{own}={value}"]
        try:
            config_flags.DEFINE_config_dict("config", read, flag_values=values, sys_argv=argv)
            values(argv)
        except Exception as error:  # from the parsers of many types
            raise Refused(key, value, f"a value of type {type(keys[own]).__name__}") from error
        if member:
            config_lib.lay_over_member(config, member, own, config_lib.flatten(read)[own])
    return config


def load(named: str) -> "ConfigDict":
    """What get_config() of a file returns; of FILE:TEXT, get_config("TEXT").

    A configuration file is code: what it raises, the user sees in one line, with the line of the file.
    """
    from ml_collections import ConfigDict

    path, _, argument = named.partition(":")
    if not Path(path).is_file():
        raise Refused("--config", named, "an existing file, as configs/synthetic.py")
    module = types.ModuleType("sae_jax_configuration")
    module.__file__, sys.modules[module.__name__] = path, module
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
        if not hasattr(module, "get_config"):
            raise Refused("--config", named, "a file with get_config(), as configs/synthetic.py")
        config = module.get_config(argument) if argument else module.get_config()
    except (Exception, SystemExit) as error:
        if isinstance(error, Refused) and error.field == "--config":
            raise
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else next(reversed(own), None)
        where = f"{path}, line {line}" if line else path
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Refused("--config", named, f"a file that runs; {said} ({where})") from error
    if not isinstance(config, ConfigDict):
        raise Refused("--config", named, f"get_config() that returns a ConfigDict, not {type(config).__name__}")
    return config.lock()
