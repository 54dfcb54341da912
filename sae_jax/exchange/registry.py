"""What lies at a path: whose SAE it is, by the names of its files, and what else is there."""

import re
from collections.abc import Iterable, Iterator

from etils import epath

from sae_jax.errors import Refused
from sae_jax.exchange import dictionary_learning, saelens, scopes, sparsify
from sae_jax.exchange.arrays import listed
from sae_jax.exchange.encoders import COUNTED, Opened
from sae_jax.exchange.scopes import Reader

# File of a folder that is an SAE → reader; the first that is there counts.
FOLDERS: dict[str, Reader] = {
    saelens.WEIGHTS: saelens.read,
    dictionary_learning.WEIGHTS: dictionary_learning.read,
    sparsify.WEIGHTS: sparsify.read,
    "params.npz": scopes.gemma_scope_1,
    "params.safetensors": scopes.gemma_scope_2,
    "checkpoints/final.safetensors": scopes.llama_scope,
    "latest_ckpt.safetensors": saelens.temporal,
}
# Name of a file that is an SAE by itself → reader.
FILES: dict[str, Reader] = {
    r"layer\d+\.sae\.pt": scopes.qwen_scope,
    r"W_enc_\d+\.safetensors": scopes.cross_layer,
    r"layer_\d+\.safetensors": scopes.layer_file,
    r".+\.pth?": scopes.by_keys,
}
SHOWN, DEPTH, MOST = 12, 5, 2000  # SAEs named in a message, folders gone down and files looked at to find them


def read(path: epath.Path) -> Opened:
    """The SAE of a folder or a file, in whatever format its files say.

    Raises:
      Refused: no SAE is there, it is of a kind that is not supported, a key is missing, shapes disagree, values are not
        finite, or a file holds anything but arrays. Where there are several SAEs, they are listed.
    """
    if not path.exists():
        raise Refused("--sae", str(path), "a folder or file, of an SAE or of a run (there is none of that name)")
    opened = _folder(path) if path.is_dir() else _file(path)
    encoder = opened.encoder
    n = encoder.W_enc.shape[0]
    if n < 1 or encoder.W_enc.shape[1] < 1:
        raise Refused(f"{path}: W_enc", encoder.W_enc.shape, "at least one feature of one dimension")
    if encoder.rule in COUNTED and not 1 <= (encoder.k or 0) <= n:
        raise Refused(f"{path}: k", encoder.k, f"1 to the {n} features")
    return opened


def is_sae(folder: epath.Path) -> bool:
    """Whether a folder is that of one SAE, by its files."""
    return any((folder / name).exists() for name in FOLDERS)


def _folder(path: epath.Path) -> Opened:
    for name, reader in FOLDERS.items():
        if (path / name).exists():
            if name == saelens.WEIGHTS and not (path / "cfg.json").exists() and (path / "config.json").exists():
                reader = scopes.llama_scope_r1
            return reader(path / name)
    places = sorted(set(found(_walk(path))))
    if len(places) == 1 and not (path / places[0]).is_dir():
        return _file(path / places[0])
    if places:
        raise Refused("--sae", str(path), listing(places))
    files = ", ".join(list(FOLDERS)[:-1])
    raise Refused("--sae", str(path), f"a folder with one of {files}, that of a run, or the file of an SAE")


def _file(path: epath.Path) -> Opened:
    if path.name in (name.rpartition("/")[2] for name in FOLDERS):
        folder = path.parents[1] if path.name == "final.safetensors" else path.parent
        for name in FOLDERS:
            if folder / name == path:
                return _folder(folder) if name == saelens.WEIGHTS else FOLDERS[name](path)
    for pattern, reader in FILES.items():
        if re.fullmatch(pattern, path.name):
            return reader(path)
    if path.suffix in (".safetensors", ".npz"):
        return scopes.by_keys(path)
    raise Refused("--sae", str(path), "a folder, that of an SAE or of a run, or a .safetensors, .npz, .pt or .pth file")


# -- several ---------------------------------------------------------------------------------------------------------


def found(files: Iterable[str]) -> Iterator[str]:
    """Where SAEs lie, of the paths of files relative to a root: folders, and files that are one by themselves."""
    for file in files:
        place = next((file.removesuffix(name).rstrip("/") for name in FOLDERS if f"/{file}".endswith(f"/{name}")), None)
        if place is not None:
            yield place
        elif any(re.fullmatch(pattern, file.rpartition("/")[2]) for pattern in FILES):
            yield file


def listing(places: list[str]) -> str:
    """What is allowed where a path holds several SAEs."""
    return f"one of the {len(places)} SAEs in it: " + listed(places, SHOWN)


def _walk(root: epath.Path) -> Iterator[str]:
    waiting, seen = [("", 0)], 0
    while waiting and seen < MOST:
        here, depth = waiting.pop(0)
        try:
            children = sorted((root / here).iterdir(), key=lambda path: path.name)
        except OSError:
            continue
        for child in children:
            seen += 1
            name = f"{here}/{child.name}".lstrip("/")
            if not child.is_dir():
                yield name
            elif depth < DEPTH and not child.name.startswith("."):
                waiting.append((name, depth + 1))
