"""The real layers that scripts train on: --layers names them, --activations gives some, the others are extracted.

A layer is a number, of Gemma 3 270M, or MODEL-NUMBER. Models of text are shown `documentation`.
"""

import importlib.util
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments.command import said
from sae_jax.config import base
from sae_jax.errors import Refused
from sae_jax.models import facts, inputs

LAYERS = flags.DEFINE_list("layers", None, "blocks of Gemma 3 270M, or MODEL-BLOCK")
GIVEN = flags.DEFINE_multi_string("activations", [], "LAYER=PATH: those of one layer, in place of extracting them")
PACKAGES = ("numpy", "scipy", "matplotlib", "jax")
SYNTHETIC = "synthetic"  # a layer to scripts that say so


def named(*otherwise: str, synthetic: bool = False) -> list[str]:
    """The layers that the command line names, or else those.

    Raises:
      Refused: one of them is none, or activations are given for another.
    """
    layers = list(said(LAYERS) or otherwise)
    for layer in layers:
        if not (synthetic and layer == SYNTHETIC):
            model_of(layer)
    for given in said(GIVEN):
        if not given.partition("=")[2] or given.partition("=")[0] not in layers:
            raise Refused("--activations", given, f"LAYER=PATH of one of the layers {', '.join(layers)}")
    return layers


def model_of(layer: str, flag: str = "--layers") -> tuple[str, int]:
    """The model and the block of a layer, which `flag` named.

    Raises:
      Refused: it has no such name, or the model no such block.
    """
    model, _, block = layer.rpartition("-")
    if (model or facts.GEMMA) not in facts.MODELS or not block.isdecimal():
        raise Refused(flag, layer, f"a number, or MODEL-NUMBER of {', '.join(facts.MODELS)}")
    c = base().data.model
    c.id, c.layer = model or facts.GEMMA, int(block)
    facts.check(c, [c.layer])
    return c.id, c.layer


def documentation(folder: Path) -> str:
    """The path of a text of some 9M characters: the docstrings of `PACKAGES`, file by file."""
    path = folder / "documentation.txt"
    if not path.exists():
        found: list[str] = []
        for name in PACKAGES:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            (root,) = map(Path, spec.submodule_search_locations or ())
            for file in sorted(root.rglob("*.py")):
                if "tests" not in file.relative_to(root).parts:
                    found += inputs.docstrings(file)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(found), encoding="utf-8")
    return str(path)


def give(c: ConfigDict, layer: str) -> None:
    """Points a run at the activations that are given for its layer, if there are."""
    for given in said(GIVEN):
        name, _, path = given.partition("=")
        if name == layer:
            c.data.path = path


def point(c: ConfigDict, layer: str, folder: Path) -> None:
    """`give`; where nothing is given, a model of text is shown `documentation`."""
    give(c, layer)
    if c.data.model.id and not c.data.path and facts.MODELS[c.data.model.id].inputs == "text":
        c.data.model.text = documentation(folder)
