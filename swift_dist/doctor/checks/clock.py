"""Clocks of the nodes against the driver's.

A node's clock is read several times between two looks at the driver's. With t0 and t1 the driver's times before and
after and t the node's, the offset is t - (t0 + t1) / 2, wrong by at most (t1 - t0) / 2 (Cristian's algorithm). The
shortest round trip counts.
"""

from __future__ import annotations

import time

from swift_dist.doctor.values import Answer, Check, Exam, Facts, Finding, Here, Team, on_node

ROUNDS = 5
WARN_SECONDS = 0.5
BAD_SECONDS = 5.0
"""Failures of ranks are put in order by their nodes' clocks, and a driver counts as dead by its file's time."""


def observe(here: Here) -> float:
    return time.time()


def examine(team: Team) -> Facts:
    """By node ``{"offset", "error"}`` in seconds."""
    facts: Facts = {}
    team.values(observe)  # a node that does not answer is named once
    for _ in range(ROUNDS):
        for node, answer in team.ask(observe).items():
            if not answer.error and (node not in facts or _error(answer) < facts[node]["error"]):
                facts[node] = {"offset": offset(answer), "error": _error(answer)}
    return facts


def offset(answer: Answer) -> float:
    return answer.value - (answer.sent + answer.received) / 2


def _error(answer: Answer) -> float:
    return (answer.received - answer.sent) / 2


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    for node, fact in facts.items():
        least = max(0.0, abs(fact["offset"]) - fact["error"])
        if least > WARN_SECONDS:
            text = f"{abs(fact['offset']):.2f} s {'ahead of' if fact['offset'] > 0 else 'behind'} the driver's clock"
            findings.append(
                on_node("clock", node, "bad" if least > BAD_SECONDS else "warn", text,
                        "set the clock: start chronyd or systemd-timesyncd on this node (chronyc makestep)")
            )  # fmt: skip
    if not findings and facts:
        worst = max(abs(fact["offset"]) for fact in facts.values())
        findings.append(Finding("clock", "all", "ok", f"within {worst * 1000:.0f} ms of the driver's"))
    return findings


CHECK = Check(judge, examine, short=True, seconds=5.0)
