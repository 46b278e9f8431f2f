"""`swift-dist merge ADAPTER TARGET`: an adapter and its base as one model. See `merge`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError

_CONFIG = "adapter_config.json"


class MergeOptions(Section):
    adapter: str = Field(description="folder of an adapter, such as runs/x/adapter, or any that PEFT wrote")
    target: str = Field(description="folder to write; must not exist")
    base: str | None = Field(
        None, description="the adapter's model, a folder or hub id (default: what its adapter_config.json names)"
    )
    max_shard_size: str = Field("5GB", description="largest weight file, e.g. 5GB or 512MB")
    trust_remote_code: bool = Field(False, description="allow Python code from the base's folder to run")


def run(options: MergeOptions) -> dict[str, Any]:
    """Merge; as a rule one module's weights are in memory at a time. See `swift_dist.tuners.merge`.

    Returns:
        ``{"base", "adapter", "output"}``.

    Raises:
        JobError: the folders are none, or do not belong together; nothing was written.
        RunError: the disk has no room.
    """
    from swift_dist.tuners import merge

    adapter, target = Path(options.adapter), Path(options.target)
    if os.path.lexists(target):  # a link to nothing, too; False where the name itself is impossible
        raise JobError("target", f"{target} exists", "name a new folder")
    if not (adapter / _CONFIG).is_file() and (adapter / "adapter" / _CONFIG).is_file():
        raise JobError("adapter", f"{adapter} is a run folder", f"its adapter is {adapter / 'adapter'}")
    base = options.base or _named_base(adapter)
    merge(
        _base_folder(base, adapter, given=options.base is not None),
        adapter,
        target,
        max_shard_size=options.max_shard_size,
        trust_remote_code=options.trust_remote_code,
    )
    return {"base": base, "adapter": str(adapter), "output": str(target)}


def _named_base(adapter: Path) -> str:
    try:
        base = json.loads((adapter / _CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError):
        raise JobError(
            "adapter", f"{adapter} has no {_CONFIG} that can be read", "name a folder that holds one"
        ) from None
    if not base:
        raise JobError("base", f"{adapter / _CONFIG} names none", "give --base, the adapter's model")
    return str(base)


def _base_folder(base: str, adapter: Path, *, given: bool) -> Path:
    from swift_dist.models import model_folder

    try:
        return model_folder(base, weights=True)
    except JobError as error:  # it speaks of a job's model.path
        if given:
            raise JobError("base", error.message, error.remedy) from None
        raise JobError(
            "base",
            f"{adapter / _CONFIG} names {base}: {error.message}",
            f"give --base, the adapter's model, or {error.remedy}",
        ) from None


def render(result: dict[str, Any]) -> str:
    """For people."""
    return f"wrote {result['output']}: {result['base']} with {result['adapter']} merged into its weights"
