"""The protocol of a serving engine: a command that runs an OpenAI server in a process of its own.

Everything above an engine (replicas, the front, `infer`) talks OpenAI's HTTP API to that process, so no token passes
through code of ours on its way out of vLLM or LMDeploy, an engine may live in an environment of its own, and killing
one process tree ends all of it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from swift_dist.errors import JobError
from swift_dist.serving.options import EngineOptions, ServedModel


@dataclass(frozen=True)
class Load:
    """What an engine is doing: sequences in the batch, and requests that wait for a place in it."""

    running: int
    waiting: int


class Engine(ABC):
    """A serving engine: what it is called with. Holds no state; the process is `process.EngineProcess`'s.

    Attributes:
        name: the file's.
        health_path: answers 200 once requests are served.
        start_seconds: how long loading may take before a start counts as failed.
        running_metric, waiting_metric: gauges in its ``/metrics``.
        gauge_seconds: how old they may be.
    """

    name: ClassVar[str]
    health_path: ClassVar[str] = "/health"
    start_seconds: ClassVar[float] = 1800.0
    running_metric: ClassVar[str] = "swift_dist:num_requests_running"
    waiting_metric: ClassVar[str] = "swift_dist:num_requests_waiting"
    gauge_seconds: ClassVar[float] = 0.0

    @abstractmethod
    def why_not(self) -> str | None:
        """Why it cannot run in this environment on this machine; None where it can. Cheap: imports nothing heavy."""

    def why_not_on(self, use_gpu: bool) -> str | None:
        """Why it cannot compute on GPUs, or on a CPU, in this environment; None where it can."""
        return None

    @abstractmethod
    def check(self, served: ServedModel) -> None:
        """Refuse what this engine cannot honour.

        Raises:
            JobError: an option that it has no counterpart of, an adapter it cannot load.
        """

    def ignored(self, served: ServedModel) -> Mapping[str, tuple[str, str]]:
        """Options that change nothing of this model -> why, remedy. `check` refuses them where they were given."""
        return {}

    @abstractmethod
    def command(self, served: ServedModel, host: str, port: int) -> list[str]:
        """The server's command line; it listens on `host`:`port` and on nothing else that is reachable from outside."""

    def environment(self, served: ServedModel) -> dict[str, str]:
        """Variables of that process, beside the inherited ones."""
        return {}

    def prepare(self) -> None:  # noqa: B027 - most engines need nothing
        """Whatever must exist before the first start, such as an environment of its own. Idempotent; may take minutes.

        Raises:
            RunError: it cannot be made.
        """

    def cache_gib(self, options: EngineOptions) -> float:
        """What a replica on a CPU takes for keys and values."""
        return options.cpu_cache_gib

    def adapter_request(self, name: str, path: str | None) -> tuple[str, dict[str, Any]]:
        """What to POST (path, JSON) so that adapter `name` is loaded from folder `path`, or unloaded (None).

        Raises:
            JobError: the engine cannot apply that adapter, or loads none while it runs.
        """
        if path is None:
            return "/v1/unload_lora_adapter", {"lora_name": name}
        return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}

    def load(self, metrics: str) -> Load:
        """What the engine is doing, from the text of its ``/metrics``."""
        return Load(int(gauge(metrics, self.running_metric)), int(gauge(metrics, self.waiting_metric)))


def gauge(metrics: str, name: str) -> float:
    """The sum of a gauge over its labels in Prometheus' text format; 0 where it is absent."""
    pattern = rf"^{re.escape(name)}(?:\{{[^}}]*\}})?\s+(\S+)"
    return sum(float(value) for value in re.findall(pattern, metrics, re.MULTILINE))


def refuse_changed(options: EngineOptions, refused: Mapping[str, tuple[str, str]]) -> None:
    """Refuse options that an engine would ignore, where they are not their defaults.

    Args:
        refused: key -> why, remedy.

    Raises:
        JobError: the first of them.
    """
    for key, (why, remedy) in refused.items():
        if getattr(options, key) != EngineOptions.model_fields[key].default:
            raise JobError(key, why, remedy)


def engine_variables(served: ServedModel) -> Mapping[str, str]:
    """Variables that every engine's process gets."""
    return {"TOKENIZERS_PARALLELISM": "false"}
