"""Every key of a configuration section, flattened: what ``--help``, the schema, the docs and did-you-mean read."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from swift_dist.config.section import Section


@dataclass(frozen=True)
class Key:
    """One leaf of the configuration: its dotted name, its field, and its type and default as a user writes them."""

    name: str
    field: FieldInfo
    type_text: str
    default_text: str

    @property
    def description(self) -> str:
        return self.field.description or ""

    @property
    def is_bool(self) -> bool:
        return bool in _union_members(self.field.annotation)

    @property
    def is_list(self) -> bool:
        return any(get_origin(m) in (tuple, list) for m in _union_members(self.field.annotation))

    @property
    def is_mapping(self) -> bool:
        """True for a free-form mapping, whose entries may be set one by one: ``--model.config.hidden_size 128``."""
        return any(get_origin(m) is dict for m in _union_members(self.field.annotation))

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it may be, one of which may be ``none``."""
        literals = (member for member in _union_members(self.field.annotation) if get_origin(member) is Literal)
        return tuple(value for literal in literals for value in get_args(literal) if isinstance(value, str))

    @property
    def is_text(self) -> bool:
        """True where the value is free text, so that ``--output 2024`` stays the text ``2024``."""
        leaves = set(_leaf_types(self.field.annotation))
        return str in leaves and not leaves & {int, float, bool, dict}


def _union_members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in _union_members(part))
    return (annotation,)


def _leaf_types(annotation: Any) -> Iterator[Any]:
    for member in _union_members(annotation):
        origin = get_origin(member)
        if origin in (tuple, list):
            for inner in get_args(member):
                if inner is not Ellipsis:
                    yield from _leaf_types(inner)
        elif origin is Literal:
            yield from {type(value) for value in get_args(member)}
        else:
            yield origin or member


def _type_text(annotation: Any) -> str:
    parts = []
    for member in _union_members(annotation):
        origin, args = get_origin(member), get_args(member)
        if member is type(None):
            continue
        if origin is Literal:
            parts.append("|".join(str(a) for a in args))
        elif origin in (tuple, list):
            inner = [_type_text(a) for a in args if a is not Ellipsis]
            parts.append(f"[{inner[0]}, ...]" if Ellipsis in args or origin is list else f"[{', '.join(inner)}]")
        elif origin is dict:
            parts.append("{key: value}")
        elif isinstance(member, type) and issubclass(member, Section):
            parts.append("path or {" + ", ".join(member.model_fields) + "}")
        else:
            parts.append(
                {"str": "text", "int": "integer", "float": "number", "bool": "true|false"}.get(
                    getattr(member, "__name__", str(member)), getattr(member, "__name__", str(member))
                )
            )
    return " or ".join(parts)


def _default_text(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "-" if field.default_factory is None else "{}"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, tuple):
        return "[" + ", ".join(str(v) for v in field.default) + "]"
    return str(field.default)


def walk(section: type[Section], prefix: str = "") -> list[Key]:
    """All leaves of `section`, depth first, in the order in which they are declared."""
    keys: list[Key] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            keys += walk(inner, f"{prefix}{name}.")
        else:
            keys.append(Key(prefix + name, field, _type_text(inner), _default_text(field)))
    return keys


def did_you_mean(
    name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None, words: Iterable[str] = ()
) -> str:
    """A hint such as ``did you mean train.steps?``: the closest known names by spelling, or those that end alike.

    Args:
        aliases: further names, each of a known one; a key is named once, by its name that comes closest.
        words: of the command line: keys of a section that one of them names (``--rlhf_type dpo``) come first.
    """
    aliases = aliases or {}
    known = [*known, *aliases]
    close = difflib.get_close_matches(name, known, n=6, cutoff=0.72)
    leaf = name.rsplit(".", 1)[-1]
    leaves = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    close += [k for k in known if k.rsplit(".", 1)[-1] == leaf and k not in close]
    if not close:
        close = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=2, cutoff=0.72)]
    given = {part for word in words for part in word.split("=")}
    close.sort(key=lambda k: given.isdisjoint(aliases.get(k, k).split(".")[:-1]))
    once: dict[str, str] = {}
    for found in close:
        once.setdefault(aliases.get(found, found), found)
    return f"did you mean {' or '.join(list(once.values())[:3])}?" if once else ""
