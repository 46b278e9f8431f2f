"""The process of a rank: a plain Ray actor whose main thread runs the engine.

It is told three things, in this order, by calls that all ranks get at once: its construction (environment), `begin`
(its place in an attempt; it imports what the entry needs, and rank 0 opens the store), `run` (the entry). A rank that
survives a peer gets `begin` and `run` again; a spare is only told to `warm`. While `run` runs no call is served: the
process is reached through its beat record and by signals only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.cluster.environment import NodeFacts, environment, num_threads, without_dropped
from swift_dist.cluster.failures import Failure, Kind, describe_exception, is_communication_error, is_device_error
from swift_dist.cluster.heartbeat import Pulse
from swift_dist.cluster.versions import check_versions
from swift_dist.config.job import ClusterSection
from swift_dist.errors import JobError, RunError
from swift_dist.lifetime import end_with_parent
from swift_dist.runs.logs import write_into

if TYPE_CHECKING:
    import torch.distributed

_CONNECT_SECONDS = 2.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """A rank's place in one attempt."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    attempt: int
    device: str
    visible_devices: str | None
    """See `RankProcess.warm`."""


@dataclass(frozen=True)
class Setup:
    """What a process keeps through all attempts.

    Attributes:
        entry: ``module:function``, called as ``function(payload, worker)``; its module may have ``warm(payload)``.
        payload: plain values for the entry.
        run_dir: the run folder.
        settings: the job's cluster section.
        address: of the node it runs on, as the other nodes reach it; 127.0.0.1 where there are no others.
        ranks_on_node: ranks that share the node.
        has_gpu: whether ranks compute on GPUs.
        niceness: the driver's.
    """

    entry: str
    payload: dict[str, Any]
    run_dir: str
    settings: ClusterSection
    address: str
    ranks_on_node: int
    has_gpu: bool
    niceness: int


@dataclass(frozen=True)
class Begun:
    """The answer to `RankProcess.begin`.

    Attributes:
        host, pid: who took the place.
        threads: with which it computes.
        store: its address (rank 0).
        failure: why it could not.
    """

    host: str
    pid: int
    threads: int
    store: str | None
    failure: Failure | None


class GangWorker:
    """`swift_dist.runs.worker.Worker` for one attempt of a gang."""

    def __init__(self, assignment: Assignment, run_dir: str, pulse: Pulse, store: torch.distributed.Store) -> None:
        self.rank = assignment.rank
        self.world_size = assignment.world_size
        self.local_rank = assignment.local_rank
        self.local_world_size = assignment.local_world_size
        self.node_rank = assignment.node_rank
        self.attempt = assignment.attempt
        self.device = assignment.device
        self.run_dir = Path(run_dir)
        self.stop_requested: Callable[[], bool] = pulse.stop_requested
        self._pulse, self._store = pulse, store
        self.step = 0

    def store(self) -> torch.distributed.Store:
        """The attempt's rendezvous store."""
        return self._store

    def beat(self, phase: str, step: int) -> None:
        """Say where this rank is. Microseconds; never waits."""
        self.step = step
        self._pulse.beat(phase, step)


class RankProcess:
    """The actor. Its methods return plain values, never exceptions of the entry."""

    def __init__(self, beat_path: str, parent: Mapping[str, str], setup: Setup) -> None:
        """Set up the process before anything heavy is imported.

        Args:
            beat_path: its record, offered by the agent of its node.
            parent: the driver's environment.
            setup: what is the same for all attempts.
        """
        # The raylet is the parent: if it is gone the job is, and a rank that stands stopped must end as well.
        end_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver alone acts on Ctrl-C
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, setup.niceness)  # Ray starts its workers at niceness 15
        self._pulse = Pulse(beat_path)
        self._pulse.beat("import", 0)
        self._setup = setup
        self._assignment: Assignment | None = None
        self._server: StoreServer | None = None
        facts = NodeFacts(setup.ranks_on_node, len(os.sched_getaffinity(0)), interface_of(setup.address), setup.has_gpu)
        variables = environment(parent, setup.settings, facts)
        for name in set(os.environ) - set(without_dropped(os.environ)):
            del os.environ[name]
        os.environ.update(variables)
        for folder in reversed(variables.get("PYTHONPATH", "").split(os.pathsep)):
            if folder and folder not in sys.path:
                sys.path.insert(0, folder)

    def hello(self) -> list[str]:
        """The ids of the GPUs that Ray set aside for this process."""
        import ray

        return [str(i) for i in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]

    def warm(self, visible_devices: str | None) -> Failure | None:
        """Import the entry and, if its module has a function `warm`, call it: what a spare does while it waits.

        Args:
            visible_devices: value of CUDA_VISIBLE_DEVICES: the GPUs of all ranks of the node, by local rank; None on
                CPU. Must be there before anything asks for a GPU.
        """
        if visible_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices
        try:
            check_versions(os.environ)
            import torch.distributed  # noqa: F401 - for the store

            module = importlib.import_module(self._setup.entry.partition(":")[0])
            getattr(module, "warm", lambda payload: None)(self._setup.payload)
            return None
        except Exception as error:
            return self._failure(error, None)

    def begin(self, assignment: Assignment) -> Begun:
        """Take a place in the next attempt; on rank 0, open a fresh store."""
        self._assignment = assignment
        self._pulse.start_attempt()
        self._pulse.beat("import", 0)
        os.environ["LOCAL_RANK"] = str(assignment.local_rank)
        write_into(Path(self._setup.run_dir) / "logs" / f"rank_{assignment.rank}.log")
        host, pid = socket.gethostname(), os.getpid()
        log.info(
            "attempt %d: rank %d of %d on %s, device %s, process %d",
            assignment.attempt, assignment.rank, assignment.world_size, host, assignment.device, pid,
        )  # fmt: skip
        failure = self.warm(assignment.visible_devices)
        if failure is None and assignment.rank == 0:
            self._server = StoreServer(assignment, self._setup, self._pulse.aborted)
        threads = num_threads(os.environ)
        return Begun(host, pid, threads, self._server.address if self._server else None, failure)

    def run(self, store_address: str) -> dict[str, Any] | Failure:
        """Run the entry to its end: its result, or why there is none."""
        assert self._assignment and threading.current_thread() is threading.main_thread()
        worker: GangWorker | None = None
        try:
            store = _join_store(self._assignment, self._setup, store_address, self._pulse.aborted)
            worker = GangWorker(self._assignment, self._setup.run_dir, self._pulse, store)
            module, _, function = self._setup.entry.partition(":")
            result = getattr(importlib.import_module(module), function)(self._setup.payload, worker)
            self._pulse.beat("ended", worker.step)
            return result
        except BaseException as error:
            failure = self._failure(error, worker)
            log.error("%s\n%s", failure.message, failure.traceback)
            traceback.clear_frames(error.__traceback__)  # they hold the model
            del error
        finally:
            worker = store = None  # what they hold must go before the next attempt
            if self._server:
                self._server.close()
                self._server = None
        return _cleaned_up(failure)

    def _failure(self, error: BaseException, worker: GangWorker | None) -> Failure:
        rank = self._assignment.rank if self._assignment else -1
        kind: Kind = "error"
        if isinstance(error, JobError):
            kind = "job"
        elif is_communication_error(error):
            kind = "communication"
        elif isinstance(error, RunError):
            kind = "run"
        return Failure(
            rank=rank,
            kind=kind,
            message=error.message if isinstance(error, (JobError, RunError)) else describe_exception(error),
            host=socket.gethostname(),
            log=str(Path(self._setup.run_dir) / "logs" / f"rank_{rank}.log"),
            step=worker.step if worker else 0,
            time=time.time(),
            traceback="".join(traceback.format_exception(error)),
            key=getattr(error, "key", ""),
            remedy=getattr(error, "remedy", ""),
            reusable=not is_device_error(error),
        )


def _cleaned_up(failure: Failure) -> Failure:
    """Leave the process groups and free memory; a process that cannot do that is not reusable."""
    import torch
    import torch.distributed as dist

    try:
        if dist.is_initialized():
            if dist.get_backend() == "nccl":
                dist.distributed_c10d._abort_process_group()  # destroy would wait for collectives that never end
            else:
                dist.destroy_process_group()
        else:
            # A start that failed half-way has used up a name; peers that are new would wait under another one.
            dist.distributed_c10d._world.group_count = 0
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return failure
    except Exception:
        log.exception("cannot clean up: this process will be replaced")
        return replace(failure, reusable=False)


class StoreServer:
    """The server of an attempt's store, in rank 0's process, apart from the client with which rank 0 uses it.

    It listens on one address only, at a port that the kernel chose: nobody can take it in between. Ranks that wait
    for a key of a rank that has died would wait until their timeout; so a thread closes the server as soon as the
    attempt is aborted, and all of them get an error at once.
    """

    def __init__(self, assignment: Assignment, setup: Setup, aborted: Callable[[], bool]) -> None:
        from torch.distributed import TCPStore

        with socket.create_server((setup.address, 0)) as listener:
            port = listener.getsockname()[1]
            self._server: Any = TCPStore(
                setup.address,
                port,
                assignment.world_size,
                is_master=True,
                timeout=timedelta(seconds=setup.settings.rendezvous_timeout),
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        self.address = f"{setup.address}:{port}"
        self._closing = threading.Event()
        self._aborted = aborted
        threading.Thread(target=self._watch, name="store", daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._server = None

    def _watch(self) -> None:
        while not self._closing.wait(0.05):
            if self._aborted():
                self._server = None
                return


def _join_store(assignment: Assignment, setup: Setup, address: str, aborted: Callable[[], bool]) -> Any:
    """Connect to the server, which was there before anyone was told.

    TCPStore goes on trying a server that has died: so in short attempts, and no more once the attempt is aborted.
    """
    from torch.distributed import DistError, TCPStore

    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + setup.settings.rendezvous_timeout
    while True:
        try:
            store = TCPStore(
                host,
                int(port),
                assignment.world_size,
                is_master=False,
                timeout=timedelta(seconds=_CONNECT_SECONDS),
                wait_for_workers=False,
            )
        except DistError:
            if aborted() or time.monotonic() > deadline:
                raise
        else:
            store.set_timeout(timedelta(seconds=setup.settings.rendezvous_timeout))
            return store


def interface_of(address: str) -> str | None:
    """The network interface that has this address."""
    if address.startswith("127."):
        return "lo"
    import psutil

    found = (name for name, entries in psutil.net_if_addrs().items() if any(e.address == address for e in entries))
    return next(found, None)
