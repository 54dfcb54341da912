"""The Hugging Face hub: SAEs from there, one folder or file of a repository at a time, and put there."""

from typing import Any

from etils import epath

from sae_jax.errors import Refused, RunFailed, first_line
from sae_jax.exchange import registry
from sae_jax.runtime.optional import module

HUB = "hf://"


def library() -> Any:
    """huggingface_hub, of the extra `hub`."""
    found = module("huggingface_hub", "hub")
    found.logging.set_verbosity_error()  # it tells of every attempt without a network
    return found


def fetch(path: str) -> str:
    """The folder or file hf://OWNER/NAME/PLACE, downloaded into the hub's cache.

    Raises:
      Refused: it cannot be reached, or there are several SAEs at that place, which are listed.
    """
    owner, _, rest = path.removeprefix(HUB).strip("/").partition("/")
    name, _, place = rest.partition("/")
    if ".." in place.split("/"):
        raise Refused("--sae", path, "hf://OWNER/NAME/FOLDER, a folder inside the repository")
    repository = f"{owner}/{name}"
    try:
        try:
            files = library().HfApi().list_repo_files(repository)
        except Refused:
            raise
        except Exception as unreachable:  # no network: what was downloaded before is there all the same
            patterns = [f"{place}/*", place] if place else None
            try:
                root = library().snapshot_download(repository, allow_patterns=patterns, local_files_only=True)
            except Exception:
                raise unreachable from None
            return f"{root}/{place}".rstrip("/")
        below = [file for file in files if not place or file == place or file.startswith(f"{place}/")]
        places = sorted(set(registry.found(below)))
        if place not in places and place not in below and places:
            raise Refused("--sae", path, registry.listing(places))
        root = library().snapshot_download(repository, allow_patterns=_needed(files, below, place))
    except Refused:
        raise
    except Exception as error:  # no network, no such repository, no permission: each has errors of its own
        raise Refused("--sae", path, f"a repository on the hub that can be reached ({first_line(error)})") from error
    return f"{root}/{place}".rstrip("/")


def _needed(files: list[str], below: list[str], place: str) -> list[str]:
    """A folder's files; those of the root where that is one; a file with the configurations and decoders beside it."""
    if place and place not in below:
        return [f"{place}/*"]
    folder = place.rpartition("/")[0]
    beside = [file for file in files if file.rpartition("/")[0] == folder]
    if not place:
        return beside
    decoders = place.replace("W_enc_", "W_dec_")
    return [file for file in beside if file in (place, decoders) or file.endswith((".json", ".yaml"))]


# -- put there ---------------------------------------------------------------------------------------------------------


def repository(name: str) -> Any:
    """The hub's API, once a repository of that name is there to write to."""
    api = library().HfApi()
    try:
        api.create_repo(name, exist_ok=True)
    except Exception as error:
        raise Refused("--push", name, f"a repository on the hub that can be reached ({first_line(error)})") from error
    return api


def commit(api: Any, name: str, folder: epath.Path) -> None:
    """The folder under its own name, in one commit; its card for the whole repository, if that has none."""
    try:
        files = commit_files(folder, with_card=not api.file_exists(name, "README.md"))
        operations = [library().CommitOperationAdd(where, content) for where, content in files.items()]
        api.create_commit(name, operations, commit_message=f"Add {folder.name}")
    except Exception as error:
        raise RunFailed(f"upload to {name}: {first_line(error)}; {folder} is complete") from error


def commit_files(folder: epath.Path, with_card: bool) -> dict[str, str | bytes]:
    """Path in the repository → the file of an exported folder, or the bytes, of everything that `push` commits."""
    files: dict[str, str | bytes] = {f"{folder.name}/{path.name}": str(path) for path in sorted(folder.iterdir())}
    if with_card:
        files["README.md"] = (folder / "README.md").read_text().replace("![](", f"![]({folder.name}/").encode()
    return files
