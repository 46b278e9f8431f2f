"""How much the parts of an answer weigh in the loss.

``default`` and ``last_round`` weigh what the assistant would generate 1, ``all`` every token of the conversation. The
others are for agents' answers and weigh parts of them more, as ms-swift's files of the same names do: a *field* such as
``Action:`` has a weight of its own and one for what follows it up to the next field (introduced with ModelScope-Agent,
arXiv:2309.00986; agentflan's after Agent-FLAN, arXiv:2403.12881; alpha_umi's after arXiv:2401.07324); a *pattern* has
one for all that it matches. What stands before the first field, and the token that ends the turn, weighs 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest


@dataclass(frozen=True)
class LossScale:
    """Weights inside an answer.

    Args:
        fields: name as it stands in the text -> (weight of the name, weight of what follows it).
        patterns: regular expression (``.`` matches newlines) -> weight of its matches.
    """

    fields: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    patterns: Mapping[str, float] = field(default_factory=dict)


_REACT = {
    "Thought:": (1.0, 1.0),
    "Action:": (2.0, 2.0),
    "Action Input:": (2.0, 2.0),
    "Observation:": (2.0, 0.0),
    "Final Answer:": (1.0, 1.0),
}
_CALL_NAMES = ("Name:", "Action:", "Tool:", "Command", "Arguments:", "action input", "ACTION_INPUT:")

LOSS_SCALES: dict[str, LossScale] = {
    "default": LossScale(),
    "last_round": LossScale(),
    "all": LossScale(),
    "react": LossScale(fields=_REACT),
    "alpha_umi": LossScale(fields={**_REACT, "Next:": (2.0, 2.0)}),
    "agentflan": LossScale(fields={**_REACT, **dict.fromkeys(_CALL_NAMES, (1.0, 3.0))}),
    "hermes": LossScale(patterns={r"<tool_call>.+?</tool_call>": 2.0}),
}


def weighted_ranges(scale: LossScale, text: str) -> list[tuple[int, int, float]]:
    """The parts of an answer whose weight is not 1.

    Args:
        text: the answer without the token that ends it.

    Returns:
        (first character, character after the last, weight), in order, none over another.
    """
    ranges: list[tuple[int, int, float]] = []
    for pattern, weight in scale.patterns.items():
        ranges += [(match.start(), match.end(), weight) for match in re.finditer(pattern, text, re.DOTALL)]
    if scale.fields:
        longest_first = sorted(scale.fields, key=len, reverse=True)
        found = list(re.finditer("|".join(map(re.escape, longest_first)), text))
        for match, following in zip_longest(found, found[1:]):
            end = following.start() if following else len(text)
            name_weight, content_weight = scale.fields[match.group()]
            ranges.append((match.start(), match.end(), name_weight))
            ranges.append((match.end(), end, content_weight))
    return sorted((start, end, weight) for start, end, weight in ranges if start < end and weight != 1)
