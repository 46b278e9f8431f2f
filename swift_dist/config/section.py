"""The base of every configuration section: frozen, and unknown keys are errors."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A typed, immutable part of a job. Each field's description is the line that ``--help`` prints for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def part_of(options: Section, section: type[S]) -> S:
    """The fields of `section` out of options that include them."""
    return section(**{name: getattr(options, name) for name in section.model_fields})


def updated(section: S, **changes: Any) -> S:
    """A copy of a section with some fields changed, validated."""
    return type(section).model_validate({**dict(section), **changes})
