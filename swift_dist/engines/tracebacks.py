"""Errors that hold nothing alive. Shared by the engines."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator


@contextlib.contextmanager
def no_references_in_tracebacks() -> Iterator[None]:
    """Let an error pass without the local variables of the frames it came through.

    They hold process groups, and as long as somebody holds the error, the groups' sockets would stay open after
    `close`: ranks that wait for this one would wait on.
    """
    try:
        yield
    except BaseException as error:
        seen: BaseException | None = error
        while seen is not None:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__context__
        raise
