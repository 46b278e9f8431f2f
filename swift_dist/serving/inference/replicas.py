"""Servers that `infer` starts for itself as processes of this machine, or one that runs already (`ray_engines`: on the
nodes of a cluster)."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from swift_dist.config.section import part_of, updated
from swift_dist.errors import JobError, RunError
from swift_dist.serving.engines.base import Engine
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.options import EngineOptions, ServedModel
from swift_dist.serving.sources.source import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engines:
    """An engine, and the model that it is to serve."""

    engine: Engine
    served: ServedModel


def engine_for(options: EngineOptions, source: Source, *, use_gpu: bool | None = None) -> Engines:
    """The engine of the options, once it is seen that it can serve the source as asked.

    Args:
        options: may have further keys.
        use_gpu: None: as `options.accelerator` says of this machine.

    Raises:
        JobError: it cannot.
    """
    from swift_dist.cluster.devices import gpus_of_this_machine
    from swift_dist.serving.engines.choose import choose, uses_gpu

    own = updated(part_of(options, EngineOptions), task=source.task)
    use_gpu = uses_gpu(own, gpus_of_this_machine(), "this machine") if use_gpu is None else use_gpu
    engine = choose(own, use_gpu)
    served = ServedModel(source.base_name, source.path, own, source.adapters, use_gpu)
    engine.check(served)
    return Engines(engine, served)


class LocalReplica:
    """A process of this machine. `stop` is final: from any thread, also while `start` waits.

    Args:
        devices: CUDA_VISIBLE_DEVICES of it (None: as inherited).
    """

    is_ours = True

    def __init__(self, engines: Engines, number: int, logs: Path, devices: str | None = None) -> None:
        self.name = f"the {engines.engine.name} engine" + (f" {number}" if number else "")
        log_file = logs / f"engine_{number}.log"
        self._engine = _on_devices(engines.engine, devices)
        self.process = EngineProcess(self._engine, engines.served, log=log_file)
        self._lock, self._stopped = threading.Lock(), False

    def start(self) -> str:
        self.process.stop(grace=0)
        with self._lock:
            if self._stopped:
                raise RunError(f"{self.name} was stopped")
            self.process = EngineProcess(self._engine, self.process.served, log=self.process.log).start()
        return self.process.wait_ready().url

    def alive(self) -> bool:
        return self.process.alive

    def answers(self) -> bool:
        return self.process.healthy()

    def end(self) -> None:
        """End the process that runs; `start` may make another."""
        self.process.stop(grace=2)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
        self.process.stop(grace=5)


def _on_devices(engine: Engine, devices: str | None) -> Engine:
    """The engine with processes that see these GPUs only."""
    if devices is None:
        return engine

    class OnDevices(type(engine)):  # type: ignore[misc]
        def environment(self, served: ServedModel) -> dict[str, str]:
            return {**super().environment(served), "CUDA_VISIBLE_DEVICES": devices}

    return OnDevices()


class OwnedReplica:
    """A server that somebody else started, and will end: for one pass over it."""

    is_ours = True

    def __init__(self, replica: LocalReplica) -> None:
        self.name, self._replica, self._begun = replica.name, replica, False

    def start(self) -> str:
        begun, self._begun = self._begun, True
        return self._replica.start() if begun or not self._replica.alive() else self._replica.process.url

    def alive(self) -> bool:
        return self._replica.alive()

    def answers(self) -> bool:
        return self._replica.answers()

    def end(self) -> None:
        self._replica.end()

    def stop(self) -> None:
        """It goes on."""


class RemoteReplica:
    """A server that runs already."""

    is_ours = False

    def __init__(self, url: str) -> None:
        self.name = url

    def start(self) -> str:
        return self.name

    def alive(self) -> bool:
        return True

    def answers(self) -> bool:
        return True

    def end(self) -> None:
        """It is not ours to end."""

    def stop(self) -> None:
        """It is not ours to end."""


class LogFolder:
    """A folder for engines' logs that goes when all went well, and stays where an error names a file in it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="swift-dist-infer-"))

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not isinstance(error, RunError):
            shutil.rmtree(self.path, ignore_errors=True)


def local_replicas(engines: Engines, count: int, logs: Path) -> list[LocalReplica]:
    """So many processes of this machine; those with GPUs share them out.

    Raises:
        JobError: there are too few GPUs.
    """
    options = engines.served.options
    each = options.tensor_parallel_size * options.pipeline_parallel_size
    if not engines.served.use_gpu or count == 1:
        return [LocalReplica(engines, number, logs) for number in range(count)]
    from swift_dist.cluster.devices import gpus_of_this_machine

    there = gpus_of_this_machine()
    if count * each > there:
        raise JobError("replicas", f"{count} of {each} GPUs each, and this machine has {there}", "use fewer")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(there)]
    shares = [",".join(names[number * each : (number + 1) * each]) for number in range(count)]
    return [LocalReplica(engines, number, logs, share) for number, share in enumerate(shares)]
