"""What the driver shows while a run goes on: a bar on a terminal, plain lines elsewhere, both on stderr."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, Protocol, TextIO

from swift_dist.runs.folder import HEARTBEAT_SECONDS, RunFolder
from swift_dist.runs.metrics import Row, follow

MIN_SECONDS_BETWEEN_LINES = 1.0
_STATUS_SECONDS = 2.0
_WINDOW_SECONDS = 20.0


class View(Protocol):
    """Shows rows. Called from one thread."""

    def show(self, row: Row) -> None: ...
    def close(self) -> None: ...


def human_count(value: float) -> str:
    """1234567 -> ``1.23M``."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def human_seconds(seconds: float) -> str:
    """75 -> ``1:15``; 3700 -> ``1:01:40``."""
    total = max(0, round(seconds))
    hours, rest = divmod(total, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def describe(row: Row, steps: int | None, seconds_left: float | None) -> str:
    """A row as one plain line."""
    step = f"step {row['step']}" + (f"/{steps}" if steps else "")
    if "prepared" in row:
        return f"{step}  reference model {row['prepared']:.0%}"
    if "eval_loss" in row:
        return f"{step}  eval loss {_number(row['eval_loss'], '.4f')}"
    parts = [step, f"loss {_number(row.get('loss'), '.4f')}"]
    if row.get("grad_norm") is not None:
        parts.append(f"grad norm {row['grad_norm']:.3f}")
    if row.get("tokens_per_second") is not None:
        parts.append(f"{human_count(row['tokens_per_second'])} tok/s")
    if row.get("tflops_per_device") is not None and row["tflops_per_device"] >= 0.1:
        parts.append(f"{row['tflops_per_device']:.1f} TFLOP/s per device")
    if seconds_left is not None:
        parts.append(f"{human_seconds(seconds_left)} left")
    if row.get("skipped"):
        parts.append(f"SKIPPED: {row.get('reason', '')}")
    return "  ".join(parts)


def _number(value: Any, form: str) -> str:
    return "nan" if value is None else format(value, form)


class TimeLeft:
    """Seconds to the last step, from the pace of the last 20 seconds, or 10 steps where those take longer."""

    def __init__(self, steps: int | None) -> None:
        self.steps = steps
        self._marks: list[tuple[float, int]] = []

    def seen(self, step: int, at: float) -> float | None:
        """Note that `step` was done at time `at`; None while it cannot be told."""
        if self._marks and step <= self._marks[-1][1]:
            self._marks.clear()  # a restart went back
        self._marks.append((at, step))
        while len(self._marks) > 10 and self._marks[1][0] < at - _WINDOW_SECONDS:
            self._marks.pop(0)
        (then, first) = self._marks[0]
        if self.steps is None or step <= first or at <= then:
            return None
        return (self.steps - step) * (at - then) / (step - first)


class LineView:
    """Plain lines: every `interval` steps, at most one a second; evaluations, skipped and last steps always."""

    def __init__(self, steps: int | None, interval: int, stream: TextIO) -> None:
        self._steps, self._interval, self._stream = steps, interval, stream
        self._left = TimeLeft(steps)
        self._shown_at = float("-inf")

    def show(self, row: Row) -> None:
        at = time.monotonic()
        is_step = "eval_loss" not in row and "prepared" not in row
        left = None if not is_step else self._left.seen(row["step"], at)
        must = not is_step or row.get("skipped") or row["step"] == self._steps
        due = row["step"] % self._interval == 0 and at - self._shown_at >= MIN_SECONDS_BETWEEN_LINES
        if must or due:
            self._shown_at = at
            print(describe(row, self._steps, left), file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class BarView:
    """A bar with step, loss, tokens/s and time left, redrawn in place."""

    def __init__(self, steps: int | None, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._steps = steps
        self._left = TimeLeft(steps)
        self._bar = Progress(
            TextColumn("step {task.fields[at]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            console=Console(file=stream),
            refresh_per_second=4,
            # Log records and warnings go on through their own handlers; rich must not swap sys.stdout under the driver.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("train", total=steps, at=f"0/{steps or '?'}", text="starting")
        self._eval = ""
        self._bar.start()

    def show(self, row: Row) -> None:
        if "eval_loss" in row:
            self._eval = f"  eval {_number(row['eval_loss'], '.4f')}"
            return
        if "prepared" in row:
            self._bar.update(self._task, text=f"reference model {row['prepared']:.0%}")
            return
        if row.get("skipped"):
            self._bar.console.print(describe(row, self._steps, None), highlight=False)
        left = self._left.seen(row["step"], time.monotonic())
        text = f"loss {_number(row.get('loss'), '.4f')}{self._eval}"
        if row.get("tokens_per_second") is not None:
            text += f"  {human_count(row['tokens_per_second'])} tok/s"
        text += f"  {human_seconds(left)} left" if left is not None else ""
        self._bar.update(self._task, completed=row["step"], at=f"{row['step']}/{self._steps or '?'}", text=text)

    def close(self) -> None:
        self._bar.stop()


class Monitor:
    """The driver's eye on a run: a thread that follows metrics.jsonl, shows it and keeps status.json fresh.

    It reads the shared run folder, so it does not matter where rank 0 lives, and no rank ever waits for it. Rows that
    an earlier attempt left are not shown. Enter it before the ranks start.

    Args:
        folder: the run, begun by this process.
        steps: the last step.
        log_interval: steps between plain lines.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        steps: int | None,
        log_interval: int = 1,
        stream: TextIO | None = None,
    ) -> None:
        self._folder = folder
        stream = sys.stderr if stream is None else stream
        self._view: View = BarView(steps, stream) if stream.isatty() else LineView(steps, log_interval, stream)
        self._ending = threading.Event()
        self._rows = follow(folder.metrics_path, self._ending.is_set, only_new=True)
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        next(self._rows)  # the first look, which tells old rows from new ones, is over before a rank may write
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Shows what is still unread, then gives the terminal back."""
        self._ending.set()
        self._thread.join()
        self._view.close()

    def _watch(self) -> None:
        written_at = time.monotonic()
        unwritten: Row = {}
        for row in self._rows:
            if row is not None:
                self._view.show(row)
                if "loss" in row:
                    unwritten = {"step": row["step"], "loss": row["loss"]}
            quiet = time.monotonic() - written_at
            if quiet >= HEARTBEAT_SECONDS or (unwritten and quiet >= _STATUS_SECONDS):
                self._update(unwritten)
                written_at, unwritten = time.monotonic(), {}
        if unwritten:
            self._update(unwritten)

    def _update(self, changes: Row) -> None:
        try:
            self._folder.update(**changes)
        except OSError as error:  # a full disk: the run itself will say so where it matters
            print(f"status.json cannot be written: {error}", file=sys.stderr)
