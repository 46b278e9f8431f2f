"""What the doctor's parts hand to each other: findings, what is examined for, nodes, answers, checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Level = Literal["ok", "warn", "bad"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "bad")

Facts = dict[str, Any]
"""What a check learnt: of a check that looks at each node by itself, by the name of the node."""

ALL = "all"
"""The node of a finding that is about no node in particular."""


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table.

    Attributes:
        check: name of the check.
        node: name of the node, ``a+b`` for a pair, or `ALL`.
        level: "bad" ends a job that begins, and the verb with exit code 1; "warn" does neither.
        found: what was seen, with its numbers.
        advice: what to do about it; empty where it is ok.
        nodes: names of the nodes that a job should avoid because of it; empty: of none in particular.
    """

    check: str
    node: str
    level: Level
    found: str
    advice: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node:
    """A node as the driver knows it.

    Attributes:
        name: its hostname, with its number where several have the same (simulated nodes).
        address: as the other nodes reach it.
        id: Ray's; empty without Ray.
        resources: its totals in Ray's books; empty without Ray.
    """

    name: str
    address: str = "127.0.0.1"
    id: str = ""
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Exam:
    """What the nodes are examined for: plain values, sent to all of them.

    Attributes:
        token: names what this examination writes.
        folder: an existing folder in which the run folder lies or would be made; as the driver sees it.
        nnodes, ranks, cpus: nodes of the job, and ranks and logical CPUs on each.
        gpus: GPUs that a node must have; 0: none is needed.
        simulated: all nodes are this one machine.
        checkpoint_bytes: of one checkpoint of the job (estimated); 0 where nothing is known of its model.
        num_checkpoints: that will lie in the run folder at once.
        held_bytes: of checkpoints that lie there already.
        bands: port bands of the launchers, ``name -> (first, last)``.
        variables: what the ranks get from the driver and the job of the variables that checks look at.
        hub_ids: models and tokenizers that come from the Hugging Face hub.
        trackers: experiment trackers that the job reports to.
        versions: the driver's.
        driver_computes: whether nodes must have the driver's builds too, and nothing that it does not have.
    """

    token: str
    folder: str
    nnodes: int = 1
    ranks: int = 1
    cpus: float = 1.0
    gpus: int = 0
    simulated: bool = False
    checkpoint_bytes: int = 0
    num_checkpoints: int = 0
    held_bytes: int = 0
    bands: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    hub_ids: tuple[str, ...] = ()
    trackers: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    driver_computes: bool = False


@dataclass(frozen=True)
class Here:
    """What the node part of a check gets: the examination, its node, and what earlier calls of the check kept."""

    exam: Exam
    node: Node
    kept: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """Of one node to one question, with the driver's clock (seconds since 1970) around it.

    Attributes:
        value: what the function returned; None if there is an error.
        error: why there is no value.
    """

    value: Any = None
    error: str = ""
    sent: float = 0.0
    received: float = 0.0


class Team(Protocol):
    """The nodes, as the driver part of a check talks to them."""

    nodes: list[Node]
    exam: Exam

    def ask(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        nodes: Sequence[str] | None = None,
        seconds: float | None = None,
    ) -> dict[str, Answer]:
        """Call ``function(here)``, or ``function(here, arguments[node])``, on nodes at once.

        Args:
            function: of a module that the nodes have.
            arguments: by node; asks only these nodes.
            nodes: names; default: all.
            seconds: after which a node has no answer; default: what is left to the check.
        """
        ...

    def values(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        nodes: Sequence[str] | None = None,
    ) -> Facts:
        """As `ask`, the values only: a node without one becomes a finding of its own."""
        ...

    def seconds_left(self) -> float: ...


@dataclass(frozen=True)
class Check:
    """A check, in its file's `CHECK`.

    Attributes:
        judge: facts -> findings; pure.
        examine: what is asked of the team: `everywhere(observe)` for a check that looks at each node by itself.
        short: whether it belongs to the short form.
        seconds: after which what was not answered is not waited for.
        alone: whether it measures what the others would disturb; then it comes after them.
    """

    judge: Callable[[Facts, Exam], list[Finding]]
    examine: Callable[[Team], Facts]
    short: bool = False
    seconds: float = 10.0
    alone: bool = False


def everywhere(observe: Callable[[Here], Any]) -> Callable[[Team], Facts]:
    """The driver part of a check that calls one function on each node."""

    def examine(team: Team) -> Facts:
        return team.values(observe)

    return examine


def on_node(check: str, node: str, level: Level, found: str, advice: str = "") -> Finding:
    """A finding about one node."""
    return Finding(check, node, level, found, advice, (node,))


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1024:.0f} KiB"
