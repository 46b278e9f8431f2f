"""The gang: one actor a rank, run attempt after attempt until all ranks return or a policy gives up.

Survivors of a lost rank keep their processes. Nothing here is on the path of a step: ranks are watched through their
beat records and through Ray's news of a finished call or a dead actor.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift_dist.cluster.agent import NodeAgent
from swift_dist.cluster.agents import Agents
from swift_dist.cluster.environment import PASSED, check_environment, matches
from swift_dist.cluster.failures import Failure
from swift_dist.cluster.heartbeat import Beat
from swift_dist.cluster.interrupts import Interrupts
from swift_dist.cluster.placement import Placement
from swift_dist.cluster.plan import GangPlan, GangResult, Observer
from swift_dist.cluster.policy import Finish, GiveUp, StallLimits, decide, find_stall, name_laggards
from swift_dist.cluster.spares import Process, Spares
from swift_dist.cluster.worker import Assignment, Begun, RankProcess, Setup
from swift_dist.errors import JobError, RunError

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_BEATS_SECONDS = 0.2
_GRACE_SECONDS = 10.0
"""How long a rank may take to come back after a peer failed (or two steps, if that is longer)."""


@dataclass
class _Attempt:
    """What is known about the attempt under way."""

    number: int
    began: float = field(default_factory=time.monotonic)
    results: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    deadline: float | None = None


class Gang:
    """See the module. A context manager: leaving it ends every process it started.

    Attributes:
        spares_used: lost ranks that went on in a warm spare.
    """

    def __init__(self, plan: GangPlan, placement: Placement, interrupts: Interrupts, observer: Observer) -> None:
        check_environment(plan.settings)
        self._plan, self._placement, self._observer = plan, placement, observer
        self._interrupts = interrupts
        self._world_size = len(plan.places)
        self._names = (f"process_{n}" for n in itertools.count())
        self._ranks: dict[int, Process] = {}
        self._spares = Spares(plan.settings.spares, plan.settings.nnodes, self._start_spare, self._end)
        self._failures_left = plan.settings.max_failures
        self._gpus: dict[int, list[str]] = {}
        self._beats: dict[str, Beat] = {}
        self._beats_read = 0.0
        self._stop_sent = False
        self.spares_used = 0
        self._limits = StallLimits(plan.settings.stall_timeout, plan.settings.rendezvous_timeout)
        # What a rank may see of the driver's environment: filtered here, so that no secret travels for nothing.
        self._parent = {name: value for name, value in os.environ.items() if matches(name, PASSED)}
        self._agents = Agents([self._agent(node) for node in range(plan.settings.nnodes)])

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end([*self._ranks.values(), *self._spares.waiting])
        self._agents.close()

    def run(self) -> GangResult:
        """Run to the end.

        Raises:
            JobError: a rank found the job wrong.
            RunError: the run failed, and another attempt would not help or is not allowed.
            KeyboardInterrupt: interrupted twice, or before anything could be saved.
        """
        history: list[Failure] = []
        self._interrupts.graceful = True
        try:
            for number in itertools.count():
                attempt = self._attempt(number)
                decision = decide(list(attempt.failures.values()), history, self._plan.settings.max_failures)
                if isinstance(decision, Finish):
                    state = "interrupted" if _stopped(attempt.results) else "done"
                    return GangResult(state, attempt.results, tuple(history))  # type: ignore[arg-type]
                if isinstance(decision, GiveUp):
                    raise _as_error(decision)
                log.warning("%s", decision.cause.describe())
                history.append(decision.cause)
                self._failures_left -= 1
                if self._stop_wanted():
                    log.warning("the run was asked to end: what the newest checkpoint does not hold is lost")
                    return GangResult("interrupted", {}, tuple(history))
                log.warning(
                    "starting again, from the newest whole checkpoint if there is one (failure %d, "
                    "cluster.max_failures %d)",
                    len(history), self._plan.settings.max_failures,
                )  # fmt: skip
                self._observer.restarting(decision.cause, number + 1)
                self._replace(decision.replace)
            raise AssertionError("unreachable")
        finally:
            self._interrupts.graceful = False

    # Processes

    def _agent(self, node: int) -> Any | None:
        """None where this process can be the agent: on its own node."""
        import ray

        if self._placement.node_ids[node] == ray.get_runtime_context().get_node_id():
            return None
        return ray.remote(NodeAgent).options(**self._placement.options(node, 0, 0)).remote()

    def _new_process(self, node: int, rank: int | None) -> Process:
        import ray

        name = next(self._names)
        settings = self._plan.settings
        setup = Setup(
            entry=self._plan.entry,
            payload=self._plan.payload,
            run_dir=str(self._plan.run_dir),
            settings=settings,
            address=self._address(node),
            ranks_on_node=sum(place.node == node for place in self._plan.places),
            has_gpu=self._plan.use_gpu,
            niceness=os.getpriority(os.PRIO_PROCESS, 0),
        )
        is_rank = rank is not None
        options = self._placement.options(
            node, settings.cpus_per_rank if is_rank else 0, int(self._plan.use_gpu and is_rank)
        )
        path = self._agents.offer(node, [name])[name]
        actor = ray.remote(RankProcess).options(max_restarts=0, **options).remote(path, self._parent, setup)
        return Process(name, node, actor, rank)

    def _address(self, node: int) -> str:
        """How the other ranks reach a node: the loopback where all nodes are on one machine."""
        addresses = self._placement.addresses
        return addresses[node] if len(set(addresses)) > 1 else "127.0.0.1"

    def _start_spare(self, node: int) -> Process:
        spare = self._new_process(node, None)
        spare.warm = spare.actor.warm.remote(self._visible_devices(node))
        return spare

    def _replace(self, ranks: Sequence[int]) -> None:
        """Give lost ranks a spare of their node, else a new process (created by `_attempt`)."""
        lost = [self._ranks.pop(rank) for rank in ranks if rank in self._ranks]
        self._end(lost)
        self._spares.drop_dead(self._agents.read())
        for process in lost:
            assert process.rank is not None
            spare = self._spares.take(process.node)
            if spare is not None:
                if spare.is_warm:
                    self.spares_used += 1
                    log.warning("rank %d goes on in a warm spare", process.rank)
                spare.rank = process.rank
                self._ranks[process.rank] = spare

    def _prepare_replacement(self, rank: int, attempt: _Attempt) -> None:
        """Begin one for a rank that died, unless the run will not go on, or a spare waits there."""
        node = self._plan.places[rank].node
        dead = sum(f.kind == "died" and self._plan.places[f.rank].node == node for f in attempt.failures.values())
        if self._failures_left and self._spares.on(node) < dead and not self._stop_wanted():
            with contextlib.suppress(RunError):  # the node is gone as well
                self._spares.begin(node)

    def _end(self, processes: Sequence[Process]) -> None:
        """SIGKILL processes, also stopped ones, and take their actors off Ray's books."""
        import ray

        self._agents.kill([p.name for p in processes])
        for process in processes:
            ray.kill(process.actor, no_restart=True)
        self._agents.forget([p.name for p in processes])

    # One attempt

    def _attempt(self, number: int) -> _Attempt:
        if number:
            self._move_lost_nodes()
        attempt = _Attempt(number)
        self._agents.abort(False)
        fresh = [rank for rank in range(self._world_size) if rank not in self._ranks]
        for rank in fresh:
            self._ranks[rank] = self._new_process(self._plan.places[rank].node, rank)
        if self._plan.use_gpu and not self._learn_gpus(attempt):
            return attempt
        calls = {rank: p.actor.begin.remote(self._assignment(rank, number)) for rank, p in self._ranks.items()}
        self._collect(attempt, calls, can_stop=False)
        begun: dict[int, Begun] = attempt.results
        for rank, answer in begun.items():
            self._ranks[rank].host = answer.host
            if answer.failure is not None:
                attempt.failures[rank] = answer.failure
        if attempt.failures:
            return attempt
        ranks = range(self._world_size)
        self._observer.placed([begun[rank].host for rank in ranks], [begun[rank].threads for rank in ranks])
        store = begun[0].store
        attempt.results = {}
        calls = {rank: p.actor.run.remote(store) for rank, p in self._ranks.items()}
        self._collect(attempt, calls, can_stop=True)
        return attempt

    def _move_lost_nodes(self) -> None:
        """What was on lost nodes begins anew on those in their place; so does all on nodes whose agent is silent."""
        import ray

        moved = self._placement.move_lost(self._agents.silent, self._raise_if_to_stop)
        for node in sorted({*moved, *self._agents.silent}):
            log.warning("node %d of the job begins anew on %s", node, self._placement.addresses[node])
            for process in (*self._ranks.values(), *self._spares.waiting):
                if process.node == node:
                    ray.kill(process.actor, no_restart=True)
            self._ranks = {rank: process for rank, process in self._ranks.items() if process.node != node}
            self._spares.leave(node)
            self._gpus.pop(node, None)
            self._agents.replace(node, self._agent(node))

    def _raise_if_to_stop(self) -> None:
        if self._stop_wanted():
            raise KeyboardInterrupt

    def _learn_gpus(self, attempt: _Attempt) -> bool:
        """The GPUs of each node by local rank, as Ray set them aside for the first processes there; False: one died."""
        asked = {r: place.node for r, place in enumerate(self._plan.places) if place.node not in self._gpus}
        self._collect(attempt, {rank: self._ranks[rank].actor.hello.remote() for rank in asked}, can_stop=False)
        if not attempt.failures:
            for rank, node in asked.items():
                self._gpus.setdefault(node, []).extend(attempt.results[rank])
        attempt.results = {}
        return not attempt.failures

    def _assignment(self, rank: int, attempt: int) -> Assignment:
        place = self._plan.places[rank]
        use_gpu = self._plan.use_gpu
        return Assignment(
            rank=rank,
            world_size=self._world_size,
            local_rank=place.local_rank,
            local_world_size=sum(p.node == place.node for p in self._plan.places),
            node_rank=place.node,
            attempt=attempt,
            device=f"cuda:{place.local_rank}" if use_gpu else "cpu",
            visible_devices=self._visible_devices(place.node),
        )

    def _visible_devices(self, node: int) -> str | None:
        return ",".join(self._gpus[node]) if self._plan.use_gpu else None

    def _collect(self, attempt: _Attempt, calls: dict[int, Any], can_stop: bool) -> None:
        """Wait until every call has an answer, a failure, or was given up on; fills `attempt`."""
        import ray

        pending = {call: rank for rank, call in calls.items()}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_SECONDS)
            for call in done:
                rank = pending.pop(call)
                try:
                    answer = ray.get(call)
                except ray.exceptions.RayError as error:
                    answer = self._died(rank, error)
                if isinstance(answer, Failure):
                    self._failed(attempt, answer)
                else:
                    attempt.results[rank] = answer
            self._watch(attempt, set(pending.values()), can_stop)

    def _watch(self, attempt: _Attempt, waiting: set[int], can_stop: bool) -> None:
        now = time.monotonic()
        if now - self._beats_read >= _BEATS_SECONDS:
            self._beats, self._beats_read = self._agents.read(), now
            self._spares.keep(self._beats, [self._beats.get(p.name, Beat()) for p in self._ranks.values()])
        if self._interrupts.insistent:
            raise KeyboardInterrupt
        if self._stop_wanted() and not self._stop_sent:
            if not can_stop:
                raise KeyboardInterrupt  # nothing has been trained that could be saved
            log.warning("stopping after a checkpoint at the next step boundary (once more ends it at once)")
            self._agents.request_stop()
            self._stop_sent = True
        if not waiting:
            return
        if attempt.deadline is not None and can_stop:
            if now > attempt.deadline:
                self._give_up_on(attempt, waiting - set(attempt.failures))
            return
        stall = find_stall(
            {r: self._beat(r, now - attempt.began) for r in waiting - set(attempt.failures)}, self._limits
        )
        if stall is not None:
            stacks = self._save_stacks(attempt.number, sorted(waiting))
            named = name_laggards(stall, stacks)
            for rank in named or sorted(waiting):
                text = f"no step for {stall.seconds:.0f} s (phase {stall.phase}); " + (
                    "this rank is behind the others" if named else "no rank stands out"
                )
                if self._beat(rank).state in ("T", "t"):
                    text += ": its process is stopped (SIGSTOP)"
                self._failed(attempt, self._failure(rank, "stalled", text))
            self._kill(named or waiting)

    def _beat(self, rank: int, age: float = 0.0) -> Beat:
        """A rank's last beat; one that has not spoken is `age` seconds old."""
        beat = self._beats.get(self._ranks[rank].name, Beat())
        return beat if beat.pid else Beat(age=age)

    def _failed(self, attempt: _Attempt, failure: Failure) -> None:
        if failure.rank in attempt.failures:
            return  # killed by us after we had given up on it
        attempt.failures[failure.rank] = failure
        if attempt.deadline is None:
            self._agents.abort()  # waits for nodes that do not answer; the grace begins after it
            medians = [b.median_step for b in self._beats.values() if b.median_step]
            attempt.deadline = time.monotonic() + max(_GRACE_SECONDS, 2 * max(medians, default=0.0))
        if failure.kind == "died":
            self._prepare_replacement(failure.rank, attempt)

    def _give_up_on(self, attempt: _Attempt, ranks: set[int]) -> None:
        for rank in sorted(ranks):
            text = "it did not come back after another rank had failed; its process was ended"
            self._failed(attempt, self._failure(rank, "unresponsive", text))
        self._kill(ranks)

    def _kill(self, ranks: Collection[int]) -> None:
        """SIGKILL ranks. Ray gives up one that has not spoken yet (its process is unknown) or whose agent is silent."""
        import ray

        self._agents.kill([self._ranks[rank].name for rank in ranks])
        for rank in ranks:
            if not self._beat(rank).pid or self._ranks[rank].node in self._agents.silent:
                ray.kill(self._ranks[rank].actor, no_restart=True)

    def _died(self, rank: int, error: Exception) -> Failure:
        log.debug("rank %d: %s", rank, error)
        text = "its process ended without a word (killed, out of memory, or crashed; its log may say more)"
        if "creation task" in str(error):  # Ray's words for an actor whose making raised; its traceback follows
            text = f"its process could not start: {str(error).strip().splitlines()[-1]}"
        return self._failure(rank, "died", text)

    def _failure(self, rank: int, kind: Any, message: str) -> Failure:
        self._beats = self._agents.read()
        return Failure(
            rank=rank,
            kind=kind,
            message=message,
            host=self._ranks[rank].host,
            log=str(self._plan.run_dir / "logs" / f"rank_{rank}.log"),
            step=self._beat(rank).step,
            time=time.time(),
        )

    def _save_stacks(self, attempt: int, ranks: Sequence[int]) -> dict[int, str]:
        folder = self._plan.run_dir / "logs" / f"stall-{attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        found = self._agents.dump_stacks([self._ranks[rank].name for rank in ranks])
        stacks = {rank: found.get(self._ranks[rank].name, "") for rank in ranks}
        for rank, text in stacks.items():
            (folder / f"rank_{rank}.txt").write_text(text)
        log.warning("the gang has stalled: the stacks of all ranks are in %s", folder)
        return stacks

    def _stop_wanted(self) -> bool:
        return self._interrupts.requested or self._observer.stop_requested()


def _stopped(results: dict[int, Any]) -> bool:
    return any(isinstance(r, dict) and r.get("stopped") for r in results.values())


def _as_error(decision: GiveUp) -> Exception:
    cause = decision.cause
    if cause.kind == "job":
        return JobError(cause.key, cause.message, cause.remedy)
    lines = [cause.describe()]
    if decision.reason:
        lines.append(decision.reason)
    if cause.traceback and cause.kind != "run":
        lines.append(cause.traceback.rstrip())
    if cause.log:
        lines.append(f"log: {cause.log}")
    return RunError("\n".join(lines), cause.remedy)
