"""What a gang is asked to do, what it gives back, and who is told in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from swift_dist.cluster.failures import Failure
from swift_dist.config.job import ClusterSection
from swift_dist.parallel.nodes import Place


class Observer(Protocol):
    """Who wants to know what happens to the gang."""

    def placed(self, hosts: Sequence[str], threads: Sequence[int]) -> None:
        """All ranks of an attempt have begun; by rank their hosts and numbers of threads."""

    def restarting(self, cause: Failure, attempt: int) -> None:
        """Attempt number `attempt` follows because of `cause`."""

    def stop_requested(self) -> bool:
        """Whether someone asked the run to checkpoint and end."""
        return False


@dataclass(frozen=True)
class GangPlan:
    """What to run and where.

    Attributes:
        entry: ``module:function``, called on every rank as ``function(payload, worker)``.
        payload: plain values.
        places: node and local rank of every rank.
        run_dir: the run folder.
        settings: the job's cluster section.
        use_gpu: whether a rank gets a GPU.
    """

    entry: str
    payload: dict[str, Any]
    places: tuple[Place, ...]
    run_dir: Path
    settings: ClusterSection
    use_gpu: bool


@dataclass(frozen=True)
class GangResult:
    """How it ended: the entry's results by rank (none if it was interrupted before it could checkpoint)."""

    state: Literal["done", "interrupted"]
    results: dict[int, dict[str, Any]]
    failures: tuple[Failure, ...] = ()
