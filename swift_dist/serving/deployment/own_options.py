"""`--model_options NAME.KEY=VALUE`: keys of an engine for one of a deployment's models, where others have others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from swift_dist.config.keys import did_you_mean
from swift_dist.config.load import build, parse_words
from swift_dist.config.section import part_of
from swift_dist.errors import JobError
from swift_dist.serving.options import EngineOptions

OF_ALL = ("infer_backend", "accelerator", "tensor_parallel_size", "pipeline_parallel_size")
"""What a replica takes of the cluster is the same for every model."""


@dataclass(frozen=True)
class OwnOptions:
    """The engine's keys of each model.

    Attributes:
        shared: of those that have none of their own.
        own: model -> key -> value.
    """

    shared: EngineOptions
    own: dict[str, dict[str, Any]]

    def of(self, name: str) -> EngineOptions:
        """Raises JobError for a value that is not allowed."""
        return build(EngineOptions, [dict(self.shared), self.own.get(name, {})])

    def check_names(self, names: Iterable[str]) -> None:
        """Raises JobError where keys are given to a model that there is not."""
        known = list(names)
        for name in self.own:
            if name not in known:
                raise JobError("model_options", f"no model is called {name!r}", f"one of {', '.join(known)}")


def own_options(options: Any) -> OwnOptions:
    """Of the keys of `deploy`.

    Raises:
        JobError: an entry is not NAME.KEY=VALUE, or KEY is none that a model can have for itself.
    """
    words: dict[str, list[str]] = {}
    for entry in options.model_options:
        name, key, value = split(entry)
        if key not in EngineOptions.model_fields:
            hint = did_you_mean(key, EngineOptions.model_fields) or f"one of {', '.join(EngineOptions.model_fields)}"
            raise JobError("model_options", f"{key} is no key of an engine", hint)
        if key in OF_ALL:
            raise JobError("model_options", f"{key} is the same for all models", f"--{key}, without a name")
        word = f"--{key}={value}"
        if any(other.startswith(f"--{key}=") for other in words.setdefault(name, [])):
            raise JobError("model_options", f"{name}.{key} stands twice", "keep one of them")
        words[name].append(word)
    own = {name: parse_words(given, EngineOptions) for name, given in words.items()}
    return OwnOptions(part_of(options, EngineOptions), own)


def split(entry: str) -> tuple[str, str, str]:
    """``NAME.KEY=VALUE``; NAME may have dots.

    Raises:
        JobError: it is something else.
    """
    left, equals, value = entry.partition("=")
    name, dot, key = left.rpartition(".")
    if not (equals and dot and name and key):
        raise JobError("model_options", f"{entry!r} is not NAME.KEY=VALUE", "such as embed.task=embed")
    return name, key.replace("-", "_"), value


def with_paths(entries: Iterable[str], change: Callable[[str], str]) -> tuple[str, ...]:
    """The entries, with `change` made to those values that name a file.

    Raises:
        JobError: as `split`.
    """
    parts = [split(entry) for entry in entries]
    return tuple(f"{name}.{key}={change(value) if key == 'chat_template' else value}" for name, key, value in parts)
