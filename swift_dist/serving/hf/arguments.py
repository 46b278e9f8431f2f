"""The hf engine's command line; the standard library only, because whoever starts an engine reads it too."""

from __future__ import annotations

import argparse
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """The words of ``python -m swift_dist.serving.hf.server``; ValueError for wrong ones."""
    words = _Parser(prog="hf engine", add_help=False, allow_abbrev=False)
    words.add_argument("--served", required=True, help="the ServedModel as JSON")
    words.add_argument("--host", required=True)
    words.add_argument("--port", required=True, type=int)
    words.add_argument("--grace", type=float, default=30.0, help="seconds that answers get to end after SIGTERM")
    words.add_argument("--log_level", default="info", choices=("debug", "info", "warning", "error"))
    return words
