"""Patterns that choose weights by name, alike in ``tuner.trainable`` and in every tuner's own options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from swift_dist.errors import JobError


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` names `name` or a part of it.

    Both are read as words between dots, and the pattern's words must stand side by side in the name; ``*``, ``?`` and
    ``[0-3]`` have a shell's meaning within a word. So ``layers.1`` is that layer and not ``layers.10``, and
    ``embed_tokens``, ``*norm*`` and ``layers.[01].mlp`` do what they look like.
    """
    words, wanted = name.split("."), pattern.split(".")
    return any(
        all(fnmatchcase(word, want) for word, want in zip(words[start:], wanted, strict=False))
        for start in range(len(words) - len(wanted) + 1)
    )


def matching(names: Iterable[str], patterns: Sequence[str], key: str) -> list[str]:
    """The names that any of `patterns` matches, in their order.

    Raises:
        JobError: a pattern matches none; `key` is the option that gave it.
    """
    names = list(names)
    found = {pattern: [name for name in names if matches(name, pattern)] for pattern in patterns}
    for pattern, hits in found.items():
        if not hits:
            raise JobError(
                key,
                f"{pattern!r} matches none of the model's {len(names)} weights, such as {', '.join(names[:3])}",
                "patterns are whole words between the dots of a name, with * and ? within a word",
            )
    chosen = {name for hits in found.values() for name in hits}
    return [name for name in names if name in chosen]
