"""The ways a run can end badly, each with its exit code and its one line for people."""


class Refused(ValueError):
    """Wrong input, found before anything was written (exit code 2).

    Args:
      field: what was wrong, as the user would write it (a config key, a flag, a file).
      value: the value given.
      allowed: what would have been accepted.
    """

    exit_code = 2

    def __init__(self, field: str, value: object, allowed: str):
        super().__init__(f"{field} = {value!r}: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


class RunFailed(RuntimeError):
    """Data or numerics failed while running; the last good checkpoint is kept (exit code 3)."""

    exit_code = 3


class Preempted(RuntimeError):
    """The process was asked to stop and saved its state first (exit code 143)."""

    exit_code, said = 143, "stopped on request"


class Interrupted(Preempted):
    """The same, asked from the keyboard of a command (exit code 130)."""

    exit_code, said = 130, "stopped from the keyboard"


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def missing_extra(module: str, extra: str) -> Refused:
    """An optional dependency is not installed: name the extra that brings it."""
    return Refused(f"import {module}", "not installed", f'install it with: pip install "sae-jax[{extra}]"')
