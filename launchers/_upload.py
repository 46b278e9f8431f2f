"""What of a working folder goes along with a submitted job: its code, and nothing that only fills the network."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swift_dist.errors import JobError

MIB = 2**20
IGNORE_FILES = (".gitignore", ".rayignore")
"""Patterns in them leave files out, in every folder, as `ray job submit` does it."""
QUIETLY = (
    *("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints"),
    ".DS_Store",
)
"""Left out without a word: nobody misses them."""
REPOSITORIES = (".git", ".hg", ".svn")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files make the same archive, which the cluster then has already


@dataclass
class Collection:
    """Files to send, by their name in the archive, and what was left out and why."""

    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0

    def warning(self, most: int = 12) -> str | None:
        """One message that names what stays here; None if nothing does."""
        if not self.left_out:
            return None
        names = [f"{name} ({reason})" for name, reason in self.left_out.items()]
        more = f" and {len(names) - most} more" if len(names) > most else ""
        return f"not sent along: {', '.join(names[:most])}{more}"


def collect(folder: Path, *, excludes: Sequence[str], max_file_size: float, max_size: float) -> Collection:
    """Find what to send. Links are followed: what they point to is sent under their name.

    Args:
        folder: the working folder.
        excludes: more patterns, in the words of .gitignore.
        max_file_size: MiB; larger files stay here.
        max_size: MiB, of all files together.

    Raises:
        JobError: there is no such folder, or it holds more than `max_size`.
    """
    if not folder.is_dir():
        raise JobError("launch.ray.working_dir", f"{folder} is not a folder", "name the folder with your code")
    found = Collection()
    rules = [_rule(folder, "", excludes)] if excludes else []
    for name, path in _walk(folder, "", (folder.resolve(),), rules, found):
        try:
            details = path.stat()
        except OSError as error:
            found.left_out[name] = f"{error.strerror or error}".lower()
            continue
        if not stat.S_ISREG(details.st_mode) or not os.access(path, os.R_OK):
            found.left_out[name] = "no readable file"
        elif details.st_size > max_file_size * MIB:
            found.left_out[name] = f"{details.st_size / MIB:.0f} MiB"
        else:
            found.files[name] = path
            found.num_bytes += details.st_size
            if found.num_bytes > max_size * MIB:
                raise JobError("launch.ray.max_upload_size", _too_much(folder, found, max_size), _REMEDY)
    return found


_REMEDY = (
    "submit from the folder that holds your code, leave more out (--launch.ray.excludes, or a .rayignore), "
    "or --launch.ray.upload false where the nodes have the code"
)


def _too_much(folder: Path, found: Collection, max_size: float) -> str:
    tops: dict[str, int] = {}
    for name, path in found.files.items():
        top = name.split("/")[0]
        tops[top] = tops.get(top, 0) + path.stat().st_size
    largest = sorted(tops.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} ({size / MIB:.0f} MiB)" for name, size in largest)
    return f"{folder} holds more than {max_size:g} MiB to send; so far most is in {named}"


Rule = Callable[[str], bool]


def _rule(folder: Path, prefix: str, lines: Sequence[str]) -> Rule:
    """Whether a name (below the working folder) is matched by patterns that hold from `prefix` on."""
    from ray._private.thirdparty.pathspec import PathSpec  # what Ray itself reads such files with

    try:
        spec = PathSpec.from_lines("gitwildmatch", lines)
    except ValueError as error:
        raise JobError("launch.ray.excludes", f"a pattern is wrong: {error}", "as in a .gitignore") from None
    return lambda name: bool(spec.match_file(name.removeprefix(prefix)))


def _walk(
    folder: Path, prefix: str, above: tuple[Path, ...], rules: Sequence[Rule], found: Collection
) -> Iterator[tuple[str, Path]]:
    """Every path below `folder` that no rule leaves out; `above`: the real folders that it lies in, itself included."""
    rules = [*rules, *_ignored(folder, prefix)]
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        found.left_out[prefix.rstrip("/") or "."] = f"{error.strerror or error}".lower()
        return
    for path in entries:
        name = prefix + path.name
        if path.name in QUIETLY or path.suffix == ".pyc":
            continue
        is_folder = path.is_dir()
        if any(rule(f"{name}/" if is_folder else name) for rule in rules):
            continue  # whoever wrote the pattern knows
        reason = _reason(path, above) if is_folder else None
        if reason:
            found.left_out[f"{name}/"] = reason
        elif path.name in REPOSITORIES:  # .git of a worktree is a file
            found.left_out[name] = "repository"
        elif is_folder:
            yield from _walk(path, f"{name}/", (*above, path.resolve()), rules, found)
        else:
            yield name, path


def _ignored(folder: Path, prefix: str) -> Iterator[Rule]:
    for file in IGNORE_FILES:
        path = folder / file
        if path.is_file():
            yield _rule(folder, prefix, path.read_text(errors="replace").splitlines())


def _reason(path: Path, above: tuple[Path, ...]) -> str | None:
    """Why a whole folder stays here."""
    if path.name in REPOSITORIES:
        return "repository"
    if (path / "pyvenv.cfg").is_file() or (path / "conda-meta").is_dir():
        return "Python environment"
    if (path / "status.json").is_file() or (path / "submission.json").is_file():
        return "run folder"
    if path.resolve() in above:
        return "a link to a folder that it lies in"
    return None


def pack(collection: Collection, archive: Path) -> None:
    """Write the files into a zip whose bytes depend on their names, modes and contents only."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for name, path in collection.files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = (path.stat().st_mode & 0xFFFF) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(entry, path.read_bytes())
