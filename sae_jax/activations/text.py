"""English text that every Python has: the language reference's topics and the standard library's docstrings."""

import ast
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

MIN_DOCSTRING = 200  # characters: shorter ones are labels, not prose


def documents(path: str = "") -> Iterator[str]:
    """The text of a file, or Python's own documentation, one topic or docstring at a time, always in one order."""
    if path:
        yield Path(path).read_text(encoding="utf-8")
        return
    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    for file in sorted(library.rglob("*.py")):
        if not skipped & set(file.relative_to(library).parts):
            yield from _docstrings(file)


def identity(path: str = "") -> str:
    """What text `documents` yields, without reading it all."""
    if path:
        return "sha256 " + hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return f"documentation of Python {platform.python_version()}"


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_DOCSTRING:
                yield text
