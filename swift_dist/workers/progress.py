"""How far a long verb is, on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_OF_NOTHING = 30.0  # before a line says that nothing is finished: workers take seconds to start


class Progress:
    """Counts bytes of the work, and what became of them: text and tokens, where the verb has such.

    Args:
        name: what is going on.
        total: bytes to work through; done: of those, finished by an earlier run.
    """

    def __init__(self, name: str, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self._name, self._total, self._done = name, max(1, total), done
        self._first = done
        self._tokens = self._text = 0
        self._stream = sys.stderr if stream is None else stream
        self._begin = self._shown = time.monotonic()
        self._bar: Any = None
        if self._stream.isatty():
            self._bar, self._task = _bar(name, self._total, done, self._stream)
            self._bar.start()

    def add(self, done_bytes: int = 0, text_bytes: int = 0, tokens: int = 0) -> None:
        """Note finished work, and show where we are if it is time (call it now and then without arguments)."""
        self._done += done_bytes
        self._text += text_bytes
        self._tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, text=self._rates(now))
        elif self._done < self._total and now - self._shown >= (
            _SECONDS_BETWEEN_LINES if self._done > self._first else _SECONDS_OF_NOTHING
        ):
            self._shown = now
            share = min(1.0, self._done / self._total)
            print(f"{self._name}: {share:4.0%}  {self._rates(now)}", file=self._stream, flush=True)

    def _rates(self, now: float) -> str:
        seconds = max(now - self._begin, 1e-9)
        finished = self._done - self._first
        text = _rate((self._text if self._text or self._tokens else finished) / seconds)
        if self._tokens:
            text += f"  {self._tokens / seconds / 1e6:.2f} Mtok/s"
        if finished > 0:
            left = round(seconds * max(0, self._total - self._done) / finished)
            text += f"  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        return text

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rate(bytes_per_second: float) -> str:
    if bytes_per_second < 1e9:
        return f"{bytes_per_second / 1e6:.1f} MB/s"
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def _bar(name: str, total: int, done: int, stream: TextIO) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(name), BarColumn(bar_width=None), TextColumn("{task.percentage:3.0f} %  {task.fields[text]}"))
    console = Console(file=stream)
    bar = Bar(*columns, console=console, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False)
    return bar, bar.add_task(name, total=total, completed=done, text="")
