"""What a path of ``data.train`` names: files, or a dataset of a hub, some of its rows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from swift_dist.data.rows.catalogue import CATALOGUE, HubDataset, find_dataset
from swift_dist.data.sources import ROW_FILES, ReadOptions, SourceFile, discover
from swift_dist.data.units import decompress
from swift_dist.errors import JobError

_TAKE = re.compile(r"#([^#/]*)$")
_BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files that say which split they hold, as the datasets library knows them."""


@dataclass(frozen=True)
class Address:
    """``path``, ``path:subset``, ``path:subset:split``, each with ``#N``.

    Attributes:
        hub: "hf" or "ms"; "" for files.
        path: file, folder or owner/name.
        subset: configuration of a hub's dataset; subfolder of a folder.
        split: which one, where the address says it.
        take: N.
        known: the catalogue's entry where it was named by that.
    """

    hub: str
    path: str
    subset: str | None = None
    split: str | None = None
    take: int | None = None
    known: HubDataset | None = None


def parse_address(given: str, key: str) -> Address:
    """A path of a dataset taken apart. What exists under its whole name is that, colon or # in it or not.

    Raises:
        JobError: it names nothing.
    """
    if not given.startswith(("hf://", "ms://")) and _exists(given):
        return Address("", given)
    text, take = _without_take(given, key)
    if text.startswith(("hf://", "ms://")):
        hub, rest = text[:2], text[5:]
        name, subset, split = _fields(rest, given, key)
        if "/" in name:
            return Address(hub, name, subset, split, take)
        return _known(Address(hub, name, subset, split, take), given, key)
    if _exists(text):
        return Address("", text, take=take)
    for path, fields in _prefixes(text):
        if _exists(path):
            return Address("", path, fields[0] or None, "".join(fields[1:]) or None, take)
    head, subset, split = _fields(text, given, key)
    return _known(Address("", head, subset, split, take), given, key)


def _exists(path: str) -> bool:
    return Path(path).expanduser().exists()


def _prefixes(text: str) -> list[tuple[str, list[str]]]:
    """The text without its last field, and without its last two."""
    parts = text.split(":")
    return [(":".join(parts[:-n]), parts[-n:]) for n in (1, 2) if len(parts) > n]


def _without_take(given: str, key: str) -> tuple[str, int | None]:
    match = _TAKE.search(given)
    if match is None:
        return given, None
    if not match[1].isdecimal() or int(match[1]) == 0:
        raise JobError(
            key, f"{given}: what follows # is not a number of rows", "PATH#500 takes 500 of them; check the path"
        )
    return given[: match.start()], int(match[1])


def _fields(text: str, given: str, key: str) -> tuple[str, str | None, str | None]:
    name, *rest = text.split(":")
    if len(rest) > 2 or not name:
        raise JobError(key, f"{given} is neither a path that exists nor owner/name:subset:split", "check the path")
    return name, "".join(rest[:1]) or None, "".join(rest[1:]) or None


def _known(address: Address, given: str, key: str) -> Address:
    """The address of a dataset of the catalogue, by its short name or its id."""
    known = find_dataset(address.path)
    if known is None:
        near = difflib.get_close_matches(address.path, [entry.name for entry in CATALOGUE], n=2)
        hint = f"; did you mean {' or '.join(near)} of the catalogue?" if near else ""
        remedy = "check the path; a dataset of a hub is hf://owner/name or ms://owner/name"
        raise JobError(key, f"{given} does not exist{hint}", remedy)
    hub = address.hub or ("ms" if known.hf is None else "hf")
    path = known.hf if hub == "hf" else known.ms
    if path is None:
        there = "ModelScope" if hub == "ms" else "the Hugging Face hub"
        raise JobError(key, f"{given}: the catalogue knows no id of {known.name} on {there}", "give the id itself")
    return replace(address, hub=hub, path=path, subset=address.subset or known.subset, known=known)


def source_files(address: Address, given: str, key: str) -> tuple[SourceFile, ...]:
    """The files of an address.

    Args:
        given: the address as the job has it; key: ``data.train`` or ``data.validation``, which names the split.

    Raises:
        JobError: they do not exist, cannot be had, or it is not clear which are meant.
    """
    wanted = address.split or ("validation" if key == "data.validation" else "train")
    if address.known and address.split is None:
        split = address.known.validation if wanted == "validation" else address.known.split
        if split is None:
            remedy = "data.split_ratio takes a share of the training data"
            raise JobError(key, f"{address.known.name} has no split for validation", remedy)
        wanted = split
    path, subset = address.path, address.subset
    if not address.hub:
        path, subset = _local(address, given, key), None
    else:
        path = f"{address.hub}://{path}"
    try:
        options = ReadOptions(input=(path,), dataset_config=subset, dataset_split=wanted)
        files = discover(options, ROW_FILES)
        _check_tables(files)
    except JobError as error:
        remedy = f"name it: {address.path}:SUBSET:SPLIT" if error.key == "dataset_split" else error.remedy
        raise JobError(key, error.message, remedy) from None
    if not address.hub and Path(path).is_dir():
        if not _is_saved(Path(path)):
            files = list(_of_split(files, Path(path), wanted, address.split is not None, key))
        elif address.split and not (Path(path) / "dataset_dict.json").is_file():
            raise JobError(key, f"{given}: {path} is a dataset without splits", f"give {address.path}")
    return tuple(_as_lines(replace(file, index=index)) for index, file in enumerate(files))


def _check_tables(files: Sequence[SourceFile]) -> None:
    """That what the ends of tables say can be read, of all of them: workers find files as they go.

    Raises:
        JobError: one is damaged.
    """
    tables = [file for file in files if file.format in ("parquet", "arrow")]
    if tables:
        from swift_dist.data.tables import row_groups

        for file in tables:
            row_groups(file, None)


def _local(address: Address, given: str, key: str) -> str:
    path = Path(address.path).expanduser()
    if path.is_file():
        if address.subset or address.split:
            raise JobError(key, f"{given}: {path} is a file, which has no subsets or splits", f"give {address.path}")
    elif address.subset:
        path = path / address.subset
        if not path.is_dir():
            remedy = f"a split of a saved dataset is {address.path}::{address.subset}"
            raise JobError(key, f"{given}: there is no folder {path}", remedy)
    return str(path)


def _of_split(files: Sequence[SourceFile], folder: Path, wanted: str, said: bool, key: str) -> Sequence[SourceFile]:
    """The files of one split where their names say splits; all of them where no name does.

    A folder as hubs hold them has the test set beside the training set: reading all would train on it.
    """
    splits = [_split_of(Path(file.path).relative_to(folder.absolute())) for file in files]
    if said or len(set(splits)) > 1:  # files of one split only: whoever named the folder meant them
        if None in splits and any(splits):
            odd = files[splits.index(None)].name
            raise JobError(key, f"{folder} holds files of splits, and beside them {odd}", "name the ones you mean")
        files = [file for file, split in zip(files, splits, strict=True) if split == wanted]
        if not files:
            found = " and ".join(sorted({split for split in splits if split}))
            raise JobError(
                key,
                f"no file of {folder} says in its name that it is of the split {wanted}"
                + (f", only of {found}" if found else ", nor of another one"),
                f"name the files, or another split: {folder}::SPLIT",
            )
    kinds = {"jsonl" if file.format == "json" else file.format for file in files}
    if len(kinds) > 1:
        raise JobError(key, f"{folder} holds files of several kinds: {', '.join(sorted(kinds))}", "name those you mean")
    return files


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z0-9]+", str(path).lower())
    return next((split for split, known in _SPLITS.items() if any(word in known for word in words)), None)


def _is_saved(folder: Path) -> bool:
    """Whether datasets' save_to_disk wrote it."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _as_lines(file: SourceFile) -> SourceFile:
    """A .json file that holds lines instead of one list is read as such."""
    if file.format != "json":
        return file
    try:
        with Path(file.path).open("rb") as stream:
            plain = iter(lambda: stream.read(1 << 16), b"")
            blocks = decompress(stream, file.compression) if file.compression else plain
            start = next((text for block in blocks if (text := block.lstrip(_BEFORE_JSON))), b"")
    except Exception:  # damaged: reading it says how
        return file
    return file if start.startswith(b"[") else replace(file, format="jsonl")
