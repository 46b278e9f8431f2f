"""PREFIX.manifest.json: what `data prepare` made a dataset from, and what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """The manifest beside a dataset, or None where there is none or it describes other files.

    A manifest counts only if the sizes of .bin and .idx are those that it states: files copied over older ones must not
    be described by what was there before.
    """
    try:
        manifest = json.loads(manifest_path(prefix).read_text())
        outputs = manifest["outputs"]
        for suffix in ("bin", "idx"):
            if outputs[suffix]["bytes"] != Path(f"{prefix}.{suffix}").stat().st_size:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest
