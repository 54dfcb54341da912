"""Optional dependencies: imported where they are used, missing ones named with the extra that brings them."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from sae_jax.errors import missing_extra


def module(name: str, extra: str) -> ModuleType:
    """The module, or a refusal that names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_extra(name, extra) from error


def package(name: str, extra: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra(name, extra)
    return Path(spec.submodule_search_locations[0])
