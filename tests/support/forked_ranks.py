"""Forks ranks from one process that has imported torch, megatron-core and the engine: a case starts in milliseconds.

`fork_server.py`, a program of `gang.Gang`, runs `main`; its arguments are further modules to import. Each line on
stdin is a JSON request, each answer a line on stdout:
``{"start": {"file", "function", "world", "folder", "arguments"}}`` forks the ranks and answers with their process ids;
each calls ``function(worker, **arguments)`` and leaves ``<folder>/result-<rank>.pickle``.
``{"wait": pids, "seconds": s}`` answers with exit statuses; a rank that is not done by then is killed (null).
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer would import it in every rank: 2 s of computing
import torch.distributed as dist

from swift_dist.engines.megatron import cpu_shim

cpu_shim.apply()

from swift_dist.engines.megatron import engine, groups, model, optimizer, rng, settings, state, step, weights  # noqa: E402

WARM = (engine, groups, model, optimizer, rng, settings, state, step, weights)


class ForkedWorker:
    """A `swift_dist.runs.worker.Worker` whose ranks find each other through files in the case's folder."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.rank = self.local_rank = rank
        self.world_size = self.local_world_size = world_size
        self.node_rank = self.attempt = 0
        self.device = "cpu"
        self.run_dir = folder
        self._store: dist.Store | None = None

    def store(self) -> dist.Store:
        port_file = self.run_dir / f"port-{self.attempt}"
        wait = timedelta(seconds=60)
        if self.rank == 0:
            self._store = dist.TCPStore("127.0.0.1", 0, self.world_size, True, wait, wait_for_workers=False)
            temporary = port_file.with_suffix(".new")
            temporary.write_text(str(self._store.port))
            temporary.rename(port_file)
        else:
            while not port_file.exists():
                time.sleep(0.005)
            self._store = dist.TCPStore("127.0.0.1", int(port_file.read_text()), self.world_size, False, wait)
        return self._store

    def beat(self, phase: str, step: int) -> None: ...

    def stop_requested(self) -> bool:
        return False


def load(file: str) -> Any:
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_rank(rank: int, request: dict[str, Any]) -> None:
    folder = Path(request["folder"])
    os.dup2(os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(2, 1)
    tempfile.tempdir = str(folder)  # what a helper that is killed leaves goes with it
    torch.set_num_threads(1)
    try:
        function = getattr(load(request["file"]), request["function"])
        worker = ForkedWorker(rank, request["world"], folder)
        answer = {"value": function(worker, **request["arguments"])}
    except BaseException as error:
        answer = {"error": error, "traceback": traceback.format_exc()}
    (folder / f"result-{rank}.pickle").write_bytes(pickle.dumps(answer))
    if rank == 0:  # its store serves the others until they are done
        others = [folder / f"result-{other}.pickle" for other in range(1, request["world"])]
        end = time.monotonic() + 3
        while not all(path.exists() for path in others) and time.monotonic() < end:
            time.sleep(0.005)
    for helper in multiprocessing.active_children():  # megatron's own save starts one, which would outlive this rank
        helper.kill()
    os._exit(0)


def start(request: dict[str, Any]) -> list[int]:
    pids = []
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            run_rank(rank, request)
        pids.append(pid)
    return pids


def wait(pids: list[int], seconds: float) -> list[int | None]:
    statuses: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(statuses) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = status
        time.sleep(0.002)
    for pid in set(pids) - statuses.keys():  # ours, and stuck
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return [statuses.get(pid) for pid in pids]


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = start(request["start"]) if "start" in request else wait(request["wait"], request["seconds"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and taking all those modules down takes seconds
