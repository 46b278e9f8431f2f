"""The two ways in which a command fails for its user, and the exit codes that scripts read (docs/cli.md)."""

from __future__ import annotations

from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_JOB_WRONG = 2
EXIT_INTERRUPTED = 130


def listed(problems: Iterable[str], limit: int = 8) -> str:
    """Problems of one message, a line each: the first ones, and how many more there are."""
    unique = list(dict.fromkeys(problems))
    more = [f"and {len(unique) - limit} more"] if len(unique) > limit else []
    return "\n  ".join([*unique[:limit], *more])


class JobError(ValueError):
    """The job is wrong; nothing was started or written. Becomes exit code 2 and one message.

    Args:
        key: the dotted configuration key, or the command-line argument, e.g. ``parallel.tensor_model_parallel_size``.
        message: what is wrong with its value, and what is allowed.
        remedy: what to type or change instead.
    """

    def __init__(self, key: str, message: str, remedy: str = "") -> None:
        self.key, self.message, self.remedy = key, message, remedy
        super().__init__(f"{key}: {message}" + (f"\n  remedy: {remedy}" if remedy else ""))

    def __reduce__(self):
        # Exceptions cross process borders (Ray, multiprocessing); the default would re-call __init__ with one string.
        return (type(self), (self.key, self.message, self.remedy))


class RunError(RuntimeError):
    """The run failed after it had started. Becomes exit code 1 and one message, with the remedy where one is known."""

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message, self.remedy = message, remedy
        super().__init__(message + (f"\n  remedy: {remedy}" if remedy else ""))

    def __reduce__(self):
        return (type(self), (self.message, self.remedy))
