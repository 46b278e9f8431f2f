"""The base of every configuration section: frozen, and unknown keys are errors."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A typed, immutable part of a job. Each field's description is the line that ``--help`` prints for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def updated(section: S, **changes: Any) -> S:
    """A copy of a section with some fields changed, validated."""
    return type(section).model_validate({**dict(section), **changes})
