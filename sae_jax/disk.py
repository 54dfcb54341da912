"""Writing files so that nobody ever sees half of one."""

from etils import epath


def write_text(path: epath.Path, text: str) -> None:
    """Writes beside the file, then puts the new one in its place."""
    partial = path.parent / (path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
