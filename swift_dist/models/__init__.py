"""Model families, one file each: `swift_dist/models/<model_type>.py` holds a `FAMILY` (see `base.Family`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift_dist import plugins
from swift_dist.errors import JobError
from swift_dist.models._rope import Rope, rope_parameters
from swift_dist.models._source import model_folder, read_hf_config
from swift_dist.models.base import Family

__all__ = ["Family", "Rope", "families", "find_family", "model_folder", "read_hf_config", "rope_parameters"]


def families() -> tuple[Family, ...]:
    """All families in this package, by name."""
    return tuple(plugins.find(__name__, name, "FAMILY") for name in plugins.names(__name__))


def find_family(hf_config: Mapping[str, Any], name: str | None = None) -> Family:
    """The family of a config.json: by ``model_type``, and its ``architectures`` must be that family's.

    Args:
        name: ``model_type`` to use instead, or ``"package.module:ATTRIBUTE"`` of a family that lives elsewhere.

    Raises:
        JobError: there is none; names those that exist.
    """
    model_type = name or hf_config.get("model_type")
    architectures = tuple(hf_config.get("architectures") or ())
    if model_type is None:
        candidates = [family for family in families() if set(family.architectures) & set(architectures)]
        if not candidates:
            raise _unsupported("model.config.model_type", "is not stated", architectures)
        family = candidates[0]
    else:
        try:
            family = plugins.find(__name__, str(model_type), "FAMILY")
        except plugins.UnknownPlugin as error:
            meant = f" (did you mean {' or '.join(error.suggestions)}?)" if error.suggestions else ""
            raise _unsupported("model.config.model_type", f"{model_type!r} is not supported{meant}", ()) from None
    if architectures and not set(architectures) & set(family.architectures):
        message = f"{', '.join(architectures)} is not supported, though its model_type is {family.name}"
        raise _unsupported("model.config.architectures", message, ())
    return family


def _unsupported(key: str, message: str, architectures: tuple[str, ...]) -> JobError:
    stated = f" ({', '.join(architectures)} is not supported)" if architectures else ""
    known = ", ".join(f"{family.name} ({', '.join(family.architectures)})" for family in families())
    return JobError(key, f"{message}{stated}; supported families: {known}", "use a model of one of these families")
