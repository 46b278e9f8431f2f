"""What a run was made of: versions, the code's git revision, hashes of its model and data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swift_dist import __version__
from swift_dist.config import JobConfig

PACKAGES = (
    "torch",
    "megatron-core",
    "ray",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "transformer-engine",
)
WHOLE_UP_TO = 64 * 2**20
_BLOCK = 2**20
_NUM_SAMPLES = 16


def versions() -> dict[str, str]:
    """Python's, our own and the installed versions of the packages that decide numbers (nothing is imported)."""
    found = {"python": platform.python_version(), "swift-dist": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | _nccl()


def _nccl() -> dict[str, str]:
    """Of the wheel that torch's CUDA builds bring; what NCCL itself says would need torch to be imported."""
    for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            return {"nccl": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            continue
    return {}


def git_revision(folder: Path) -> dict[str, Any] | None:
    """The commit that `folder` is checked out at and whether tracked files differ from it; None outside git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}


def hash_file(path: Path) -> str:
    """A digest of a file, ``sha256:<hex>``; of a large one ``sha256-sampled:<hex>``.

    Above `WHOLE_UP_TO` bytes the digest covers the size and 16 evenly spread blocks of 1 MiB (first and last
    included): a terabyte of tokens must not delay the first step. It tells other data apart, not a flipped bit.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE_UP_TO:
            while block := file.read(_BLOCK):
                digest.update(block)
            return f"sha256:{digest.hexdigest()}"
        digest.update(str(size).encode())
        for i in range(_NUM_SAMPLES):
            file.seek((size - _BLOCK) * i // (_NUM_SAMPLES - 1))
            digest.update(file.read(_BLOCK))
    return f"sha256-sampled:{digest.hexdigest()}"


def hash_model(job: JobConfig) -> dict[str, Any]:
    """Where the model comes from, and digests of its config.json and weight files as far as they lie on disk."""
    model = job.model
    if model.config is not None:
        text = json.dumps(model.config, sort_keys=True)
        return {"config": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}", "init": model.resolved_init}
    found: dict[str, Any] = {"path": model.path, "init": model.resolved_init}
    folder = Path(model.path) if model.path else None
    if folder is not None and folder.is_dir():
        names = ["config.json"]
        if model.resolved_init == "pretrained":
            names += sorted(p.name for p in folder.glob("*.safetensors*"))
        found["files"] = _hash_files(folder / name for name in names)
    return found


def hash_data(job: JobConfig) -> dict[str, Any]:
    """Digests of every prepared dataset's files, by prefix. (Rows have theirs in the checkpoints' fingerprint.)"""
    if job.task != "pretrain":
        return {}
    prefixes = [entry.path for entry in (*job.data.train, *job.data.validation)]
    return {p: _hash_files(Path(f"{p}{suffix}") for suffix in (".idx", ".bin")) for p in dict.fromkeys(prefixes)}


def _hash_files(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: hash_file(path) for path in paths if path.is_file()}


def describe(job: JobConfig) -> dict[str, Any]:
    """The part of the manifest that is known before a run starts."""
    return {
        "task": job.task,
        "versions": versions(),
        "git": git_revision(Path(__file__).parent),
        "model": hash_model(job),
        "data": hash_data(job),
    }
