"""An all-reduce and an all-to-all between each two nodes, and over all ranks: who does not reach whom, who is slow.

Pairs meet in the rounds of a tournament, so that every node has one partner at a time and nobody waits for a pair that
hangs longer than that round. NCCL where the job's ranks have GPUs, else Gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import swift_dist
from swift_dist.cluster.environment import NodeFacts, environment
from swift_dist.cluster.worker import interface_of
from swift_dist.config.job import ClusterSection
from swift_dist.doctor.nvidia import visible_devices
from swift_dist.doctor.values import ALL, Check, Exam, Facts, Finding, Here, Level, Team, on_node

PAIR_SECONDS = 6.0
ALL_SECONDS = 10.0
SLOW = {"gloo": 50e6, "nccl": 1e9}
"""Bytes a second below which a pair of machines is slow whatever the others do: half of what 1 Gbit/s carries with
Gloo; with NCCL what 10 Gbit/s carry."""
SLOW_FACTOR = 2.0
BAD_FACTOR = 5.0
"""A pair is slow at half, and bad at a fifth, of what a good pair has: the upper quartile of all. (Not the
median: of three nodes one that is slow makes two of three pairs slow.)"""

_REACH = "open all TCP ports between the nodes; or name the interface that joins them: cluster.env GLOO_SOCKET_IFNAME"
_SPEED = "look at this link: cable, negotiated speed (ethtool), errors (ip -s link), another job's traffic"


# The node part


def start(here: Here) -> list[str]:
    """Start a process a rank; where each serves its store."""
    address = _address(here)
    on_gpu = here.exam.gpus > 0
    count = here.exam.ranks
    facts = NodeFacts(count, len(os.sched_getaffinity(0)), interface_of(address), on_gpu)
    variables = {**os.environ, **environment(here.exam.variables, ClusterSection(), facts)}
    if on_gpu:
        variables.pop("CUDA_VISIBLE_DEVICES", None)
        variables["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a collective that hangs raises after its timeout
        visible = visible_devices()
        if visible is not None:
            variables["CUDA_VISIBLE_DEVICES"] = visible
    ours = str(Path(swift_dist.__file__).parents[1])  # Ray has put it into this process's path, not into a variable
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [ours, variables.get("PYTHONPATH")]))
    errors = here.kept["errors"] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the processes
    processes = here.kept["processes"] = [
        subprocess.Popen(
            [sys.executable, "-m", "swift_dist.doctor.traffic",
             json.dumps({"address": address, "device": f"cuda:{rank}" if on_gpu else "cpu"})],
            env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    lines = [process.stdout.readline() for process in processes if process.stdout]
    if not all(lines):
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["it says nothing"])[-1]
        raise RuntimeError(f"a process that measures did not start: {last}")
    return [json.loads(line)["store"] for line in lines]


def _address(here: Here) -> str:
    return "127.0.0.1" if here.exam.simulated or here.exam.nnodes == 1 else here.node.address


def measure(here: Here, orders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Have the first processes of this node carry out an order each."""
    busy = list(zip(here.kept["processes"], orders, strict=False))
    for process, order in busy:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
    return [_answer(process, order["key"]) for process, order in busy]


def _answer(process: subprocess.Popen[str], key: str) -> dict[str, Any]:
    assert process.stdout
    for line in process.stdout:
        answer: dict[str, Any] = json.loads(line)
        if answer.pop("key") == key:  # else of an earlier order that nobody waited for
            return answer
    return {"error": f"its process ended with {process.wait()}"}


def end(here: Here) -> None:
    for process in here.kept.get("processes", ()):
        process.kill()
    for process in here.kept.pop("processes", ()):
        process.wait()
    if "errors" in here.kept:
        here.kept.pop("errors").close()


# The driver part


def tournament(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Rounds in which everyone meets everyone once, each at most one other a round (the circle method)."""
    seats: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def examine(team: Team) -> Facts:
    """``pairs``: by "a+b" what was measured or ``{"error"}``; ``all``: the same over all ranks, or None; ``unmeasured``
    pairs for which the time did not last."""
    facts: Facts = {"pairs": {}, "all": None, "unmeasured": 0, "ranks": 0}
    if len(team.nodes) * team.exam.ranks < 2:
        return facts
    try:
        facts["ranks"] = len(team.nodes) * team.exam.ranks
        stores = team.values(start)
        _measure_pairs(team, stores, facts)
        broken = any("error" in pair for pair in facts["pairs"].values())
        if not broken and len(stores) == len(team.nodes) and team.seconds_left() > 2:
            facts["all"] = _measure_all(team, stores)
    finally:
        team.ask(end, seconds=2.0)
    return facts


def _measure_pairs(team: Team, stores: dict[str, list[str]], facts: Facts) -> None:
    for group in tournament(list(stores)) if len(stores) > 1 else []:
        lost = lost_nodes(facts["pairs"])
        group = [pair for pair in group if not lost & set(pair)]
        if team.seconds_left() < PAIR_SECONDS + 1:
            facts["unmeasured"] += len(group)
            continue
        facts["pairs"] |= _meet(team, stores, group, "first")
    if team.exam.simulated:
        return
    for pair, fact in _slow_ones(facts["pairs"], team.exam).items():  # once more, before anyone is accused
        if team.seconds_left() > PAIR_SECONDS + ALL_SECONDS:
            again = _meet(team, stores, [tuple(pair.split("+"))], "again")[pair]  # type: ignore[list-item]
            facts["pairs"][pair] = again if "error" in again else {
                "latency": min(fact["latency"], again["latency"]),
                **{kind: max(fact[kind], again[kind]) for kind in ("all_reduce", "all_to_all")},
            }  # fmt: skip


def _meet(team: Team, stores: dict[str, list[str]], group: list[tuple[str, str]], time: str) -> Facts:
    """Pairs of which no two share a node, at once; by "a+b" what they measured."""
    orders = {
        node: [{"store": stores[a][0], "key": f"{a}+{b} {time}", "rank": rank, "size": 2, "seconds": PAIR_SECONDS}]
        for a, b in group
        for rank, node in enumerate((a, b))
    }
    answers = team.ask(measure, orders, seconds=PAIR_SECONDS + 1)
    return {f"{a}+{b}": _together([_unpack(answers[node])[0] for node in (a, b)]) for a, b in group}


def _measure_all(team: Team, stores: dict[str, list[str]]) -> dict[str, Any]:
    size = team.exam.ranks
    meeting = next(iter(stores.values()))[0]
    seconds = min(ALL_SECONDS, team.seconds_left() - 1)
    orders = {
        node: [
            {"store": meeting, "key": ALL, "rank": place * size + rank, "size": len(stores) * size,
             "seconds": seconds}
            for rank in range(size)
        ]
        for place, node in enumerate(stores)
    }  # fmt: skip
    answers = team.ask(measure, orders, seconds=seconds + 1)
    return _together(list(chain.from_iterable(_unpack(answer) for answer in answers.values())))


def _unpack(answer: Any) -> list[dict[str, Any]]:
    return [{"error": answer.error}] if answer.error else answer.value


def _together(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return next((answer for answer in answers if "error" in answer), answers[0])


def lost_nodes(pairs: dict[str, dict[str, Any]]) -> set[str]:
    """Nodes that met at least two others and reached none of them."""
    tried: dict[str, list[bool]] = {}
    for pair, fact in pairs.items():
        for node in pair.split("+"):
            tried.setdefault(node, []).append("error" not in fact)
    return {node for node, reached in tried.items() if len(reached) > 1 and not any(reached)}


# What it means


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    pairs = facts["pairs"]
    findings = _unreached(pairs)
    if not exam.simulated:  # the loopback of one machine says nothing about a network
        findings += _slow(_reached(pairs), exam)
    over_all = facts["all"]
    if over_all and "error" in over_all:
        text = f"pairs of nodes reach each other, but {facts['ranks']} ranks together do not: {over_all['error']}"
        findings.append(Finding("network", ALL, "bad", text, _REACH))
    if facts["unmeasured"]:
        text = f"not measured for want of time: {facts['unmeasured']} of the pairs of nodes"
        findings.append(
            Finding("network", ALL, "warn", text, "--timeout SECONDS gives more; or --checks network alone")
        )
    measured = pairs or over_all or not facts["ranks"]  # else no node could begin, which is said elsewhere
    if measured and not any(finding.level == "bad" for finding in findings):
        findings.append(Finding("network", ALL, "ok", _summary(facts, exam)))
    return findings


def _summary(facts: Facts, exam: Exam) -> str:
    parts = []
    pairs = list(facts["pairs"].values())
    backend = "NCCL" if exam.gpus else "Gloo"
    if pairs:
        parts.append(
            f"{len(pairs)} pair{'s' * (len(pairs) > 1)} of nodes: all-reduce {_range(pairs, 'all_reduce')}, "
            f"all-to-all {_range(pairs, 'all_to_all')}, {max(p['latency'] for p in pairs) * 1e6:.0f} us"
        )
    if facts["all"]:
        found = facts["all"]
        parts.append(
            f"{facts['ranks']} ranks: all-reduce {_speed(found['all_reduce'])}, "
            f"all-to-all {_speed(found['all_to_all'])}"
        )
    return f"{'; '.join(parts)} ({backend})" if parts else "one process: nothing to measure"


def _unreached(pairs: dict[str, dict[str, Any]]) -> list[Finding]:
    lost = lost_nodes(pairs)
    findings = [on_node("network", node, "bad", f"is reached by no other node: {_errors(pairs, node)}", _REACH)
                for node in sorted(lost)]  # fmt: skip
    for pair, fact in pairs.items():
        nodes = tuple(pair.split("+"))
        if "error" in fact and not lost & set(nodes):
            text = f"do not reach each other: {fact['error']}"
            findings.append(Finding("network", pair, "bad", text, _REACH, nodes))
    return findings


def _errors(pairs: dict[str, dict[str, Any]], node: str) -> str:
    return next(fact["error"] for pair, fact in pairs.items() if node in pair.split("+") and "error" in fact)


def _slow(pairs: dict[str, dict[str, Any]], exam: Exam) -> list[Finding]:
    slow = {pair: _shortfall(fact, pairs, exam) for pair, fact in _slow_ones(pairs, exam).items()}
    findings = []
    for node in sorted({n for pair in slow for n in pair.split("+")}):
        own = [pair for pair in pairs if node in pair.split("+")]
        if len(own) > 1 and len(own) < len(pairs) and all(pair in slow for pair in own):  # the others are not to blame
            worst, text = max(slow.pop(pair) for pair in own)
            findings.append(on_node("network", node, _level(worst), f"is slow with every other node: {text}", _SPEED))
    for pair, (ratio, text) in slow.items():
        findings.append(Finding("network", pair, _level(ratio), text, _SPEED, tuple(pair.split("+"))))
    return findings


def _reached(pairs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {pair: fact for pair, fact in pairs.items() if "error" not in fact}


def _slow_ones(pairs: dict[str, dict[str, Any]], exam: Exam) -> dict[str, dict[str, Any]]:
    pairs = _reached(pairs)
    return {pair: fact for pair, fact in pairs.items() if _shortfall(fact, pairs, exam)[0] > 1}


def _shortfall(fact: dict[str, Any], pairs: dict[str, dict[str, Any]], exam: Exam) -> tuple[float, str]:
    """How many times a pair is slower than it should be, in what it is worst at, and the numbers of that."""
    found = []
    for kind in ("all_reduce", "all_to_all"):
        good = sorted(pair[kind] for pair in pairs.values())[int(0.75 * len(pairs))]
        bound, text = SLOW["nccl" if exam.gpus else "gloo"], f"{kind.replace('_', '-')} {_speed(fact[kind])}"
        if len(pairs) > 2:
            bound = max(bound, good / SLOW_FACTOR)
            text += f"; a good pair has {_speed(good)}"
        found.append((bound / fact[kind], text))
    return max(found)


def _level(ratio: float) -> Level:
    return "bad" if ratio > BAD_FACTOR / SLOW_FACTOR else "warn"


def _range(pairs: list[dict[str, Any]], kind: str) -> str:
    found = [pair[kind] for pair in pairs]
    return _speed(min(found)) if len(found) == 1 else f"{_speed(min(found))} to {_speed(max(found))}"


def _speed(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.2f} GB/s" if bytes_a_second >= 1e9 else f"{bytes_a_second / 1e6:.1f} MB/s"


CHECK = Check(judge, examine, seconds=60.0, alone=True)
