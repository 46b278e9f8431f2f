"""Forks gangs of ranks from one process that has imported torch and megatron-core: a case starts in milliseconds.

Run as a program. Each line on stdin is a JSON request; each answer is a line on stdout.
``{"start": case, "world": n, "arguments": {...}, "folder": path}`` forks n ranks that call ``cases.<case>(rank, world,
**arguments)`` with a gloo group open (or ``train_cases.<case>`` without one), and answers with their process ids.
``{"wait": pids, "seconds": s}`` answers with their exit statuses. A rank leaves ``<folder>/result-<rank>.json``.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer would import it in every rank: 2 s of computing
import torch.distributed as dist

from swift_dist.engines.megatron import cpu_shim

cpu_shim.apply()  # before megatron-core is imported
cases, train_cases = importlib.import_module("cases"), importlib.import_module("train_cases")


def _rank(case: str, rank: int, world: int, arguments: dict, folder: Path) -> None:
    os.dup2(os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    faulthandler.enable()
    try:
        function = getattr(train_cases, case, None)
        if function is None:
            store = dist.FileStore(str(folder / "store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            function = getattr(cases, case)
        answer = {"value": function(rank, world, **arguments)}
    except BaseException as error:
        answer = {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    (folder / f"result-{rank}.json").write_text(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)


def _start(request: dict) -> list[int]:
    pids = []
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            _rank(request["start"], rank, request["world"], request["arguments"], Path(request["folder"]))
        pids.append(pid)
    return pids


def _wait(pids: list[int], seconds: float) -> list[int | None]:
    statuses: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(statuses) < len(pids) and time.monotonic() < end:
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = status
        time.sleep(0.005)
    for pid in set(pids) - set(statuses):  # ours, and stuck
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return [statuses.get(pid) for pid in pids]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _start(request) if "start" in request else _wait(request["wait"], request["seconds"])
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
