"""Files that nobody sees half written, JSON that may have been damaged, folders that one process at a time works in."""

import contextlib
import csv
import fcntl
import json
import os
import resource
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from etils import epath

from sae_jax.errors import Refused, first_line

LOCK = ".lock"
MANY = 64  # files that are opened together, from which on the limit is raised
HELD_OUT = "held_out"  # in a run's data: how held-out chunks are chosen; runs of before, evenly spaced, do not have it
SAMPLED = "sampled_sha256"  # key of the checksum by which a file of activations is known again


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes beside the file, then puts the new one in its place."""
    partial = path.parent / (path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def write_text(path: epath.Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def read_json(field: str, path: epath.Path, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object that has the given keys.

    Raises:
      Refused: the file is damaged; `field` is how the user named the folder it lies in.
    """
    try:
        found = json.loads(path.read_text())
        missing = [key for key in keys if key not in found]
        if not isinstance(found, dict) or missing:
            raise ValueError(f"no {', '.join(missing)}" if missing else "not an object")
        return found
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise Refused(field, str(path), f"a whole file, as it was written; this one is damaged ({error})") from error


def read_csv(field: str, path: str | Path, columns: Mapping[str, type]) -> list[dict[str, Any]]:
    """The lines of a table that has at least these columns, each cell of them as its type; None where it is empty.

    Raises:
      Refused: it is not there, is no such table, or has no line; `field` is how the user named it.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:  # -sig: as some spreadsheets write it
            reader = csv.DictReader(file, strict=True)
            rows, names = list(reader), reader.fieldnames or ()
        missing = [name for name in columns if name not in names]
        if not missing and any(None in row or None in row.values() for row in rows):
            raise ValueError("a line has another number of columns than the first")
        found = [{k: columns.get(k, str)(v) if v else None for k, v in row.items()} for row in rows if not missing]
    except (OSError, ValueError, csv.Error) as error:
        raise Refused(field, str(path), f"a table (CSV) that can be read ({first_line(error)})") from error
    if missing or not rows:
        lacks = f"the columns {', '.join(missing)}" if missing else "a line or more"
        raise Refused(field, str(path), f"a table (CSV) of this kind, with {lacks}")
    return found


def check_reachable(field: str, path: str) -> None:
    """Refuses a path that nothing here can look at, as gs:// without the package for it or a scheme that is none."""
    try:
        epath.Path(path).exists()
    except Exception as error:  # from the libraries behind the schemes: missing packages, networks, rights
        allowed = "a path on this machine, or of an object store whose package is installed, as gs:// with gcsfs"
        raise Refused(field, path, f"{allowed} ({first_line(error)})") from error


def unwritable(field: str, path: str, error: OSError) -> Refused:
    """What is raised where a folder cannot be made or written to."""
    return Refused(field, path, f"a folder that can be written ({error.strerror})")


def check_free(folder: epath.PathLike, field: str) -> None:
    """Refuses a folder that another process works in, and leaves no trace."""
    with contextlib.suppress(OSError), (Path(folder) / LOCK).open() as file:
        _take(file, folder, field)


def open_files(count: int) -> None:
    """Lets this process keep `count` more files open, as far as the system allows; it begins with 1,024 or fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count >= MANY and soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        with contextlib.suppress(ValueError, OSError):  # some systems have a limit below the one that they tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def sole_user(folder: epath.PathLike, field: str) -> Iterator[None]:
    """Keeps everybody else out of a local folder that exists, for as long as the context lasts.

    The kernel lets go of the lock when its process ends, however it ends: the file that a killed one leaves behind does
    no harm. Object stores (paths with ://) and file systems without locks are not guarded.

    Raises:
      Refused: somebody works in the folder; says which process on which host.
    """
    if "://" in str(folder):
        yield
        return
    with (Path(folder) / LOCK).open("a+") as file:
        _take(file, folder, field)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _take(file: IO[str], folder: epath.PathLike, field: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read() or "another process"
        raise Refused(field, str(folder), f"a folder that nobody works in: {holder} does") from error
    except OSError:
        pass  # no locks on this file system
