"""Units to worker processes, on this machine or over a Ray cluster, with progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swift_dist.convert.options import WorkOptions
from swift_dist.converters.copying import Facts, Unit
from swift_dist.workers.pool import Task, Worker, from_queue, run_all, start_local
from swift_dist.workers.progress import Progress


def num_workers(options: WorkOptions) -> int:
    """Processes that will be started; of a Ray cluster, at least one."""
    if options.workers or options.launcher == "ray":
        return options.workers or 1
    return len(os.sched_getaffinity(0))


def do_units(
    name: str,
    task: Task,
    units: Sequence[Unit],
    options: WorkOptions,
    folder: Path,
    seen: Callable[[Facts], None],
    done_bytes: int = 0,
) -> None:
    """Do all units; `seen` is called with the facts of each.

    Args:
        name: of what goes on, for the progress that is shown.
        folder: that workers on other nodes must see.
        done_bytes: of an earlier run.

    Raises:
        JobError, RunError: as of `run_all`.
    """
    if not units:
        return
    total = sum(unit.num_bytes for unit in units) + done_bytes
    with Progress(name, total, done_bytes) as progress:

        def note(facts: Any | None) -> None:
            if facts is None:
                progress.add()
                return
            progress.add(facts.num_bytes)
            seen(facts)

        if options.launcher == "ray":
            from swift_dist.workers.ray_pool import RayPool

            pool = RayPool(task, options.ray_address, options.workers, folder)
            try:
                run_all(from_queue(units), pool.workers, note)
            finally:
                pool.close()
            return
        workers: Sequence[Worker] = start_local(task, min(num_workers(options), len(units)))
        run_all(from_queue(units), workers, note)
