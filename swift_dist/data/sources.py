"""Which files a `data` verb reads, and how. Light: folders are listed, nothing is read beyond a few footers."""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError

logger = logging.getLogger(__name__)

Format = Literal["jsonl", "json", "csv", "tsv", "text", "parquet", "arrow"]
Compression = Literal["", "gz", "zst"]

DOCUMENT_FILES: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
ROW_FILES: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_NOT_DATA = frozenset({"dataset_info.json", "dataset_infos.json"})  # of a hub's repository, beside its data
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
_SAVED_DATASET = ("dataset_info.json", "state.json")
_LARGEST_TEXT_FILE = 1 << 28  # bytes; one document is tokenised at once


class ReadOptions(Section):
    """How documents are found in the input. Shared by the verbs that read text."""

    input: tuple[str, ...] = Field(
        min_length=1,
        description="files (.jsonl, .txt, each also .gz or .zst; .parquet), folders of them, HF datasets saved on "
        "disk, hf://owner/name or ms://owner/name",
    )
    format: Literal["auto", "jsonl", "text", "parquet", "arrow"] = Field(
        "auto", description="what the files hold (auto: by their names)"
    )
    text_key: str = Field("text", description="key or column that holds the text of a row")
    text_unit: Literal["file", "paragraph", "line"] = Field(
        "file", description="what is one document in plain text: the file, a block between blank lines, or a line"
    )
    glob: str | None = Field(None, description="of folders, take only files whose name matches, e.g. '*.py'")
    dataset_config: str | None = Field(None, description="configuration (subset) of hf:// and ms:// datasets")
    dataset_split: str = Field("train", description="split of HF datasets, saved or hf:// or ms://")


@dataclass(frozen=True)
class SourceFile:
    """One file of the input.

    Attributes:
        index: its place in the input; path: where it is; name: what messages call it.
        size: bytes; mtime_ns: when it was last written: both must stay as they are while it is read.
    """

    index: int
    path: str
    format: Format
    compression: Compression
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        return self.path


def discover(options: ReadOptions, known: Mapping[str, Format] = DOCUMENT_FILES) -> list[SourceFile]:
    """The files of the input, in the order given, those of a folder sorted by path.

    Args:
        known: what files hold, by the ends of their names.

    Raises:
        JobError: an input does not exist, cannot be read, is empty or of no known format.
    """
    found: list[SourceFile] = []
    for path, said in _paths(options, known):
        try:
            stat = path.stat()
            with path.open("rb"):
                pass
        except OSError as error:
            raise JobError(
                "input", f"{path} cannot be read: {error.strerror}", "check the path and its permissions"
            ) from None
        format_, compression = _kind(path, said or options.format, known)
        if format_ == "text" and options.text_unit == "file" and stat.st_size > _LARGEST_TEXT_FILE:
            raise JobError(
                "text_unit",
                f"{path} has {stat.st_size >> 20} MiB, too much for one document",
                "--text_unit paragraph or --text_unit line",
            )
        if compression and format_ in ("parquet", "arrow"):
            raise JobError("input", f"{path}: compressed {format_} files are not read", "decompress the file")
        found.append(SourceFile(len(found), str(path), format_, compression, stat.st_size, stat.st_mtime_ns))
    if not any(file.size for file in found):
        raise JobError("input", f"{', '.join(options.input)}: there is no text in it", "give files that are not empty")
    return found


def _paths(options: ReadOptions, known: Mapping[str, Format]) -> Iterator[tuple[Path, Format | None]]:
    for given in options.input:
        if given.startswith(("hf://", "ms://")):
            from swift_dist.data.hub import arrow_files

            yield from ((path, "arrow") for path in arrow_files(given, options.dataset_config, options.dataset_split))
            continue
        path = Path(given).expanduser().absolute()
        if not path.exists():
            raise JobError(
                "input", f"{given} does not exist", "check the path; a dataset of the hub is hf://owner/name"
            )
        if path.is_file():
            yield path, None
        elif (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in _SAVED_DATASET):
            yield from ((file, "arrow") for file in _saved_dataset(path, options.dataset_split))
        else:
            yield from ((file, None) for file in _folder(path, options, known))


def _kind(path: Path, format_: str, known: Mapping[str, Format]) -> tuple[Format, Compression]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    name = suffixes[-2] if compression and len(suffixes) > 1 else ("" if compression or not suffixes else suffixes[-1])
    if format_ != "auto":
        return format_, compression  # type: ignore[return-value]
    if name not in known:
        remedy = f"known are {' '.join(known)}, also with .gz or .zst"
        if known is DOCUMENT_FILES:
            remedy = "--format jsonl, text or parquet says it"
        raise JobError("format", f"cannot tell from its name what {path} holds", remedy)
    return known[name], compression


def _folder(folder: Path, options: ReadOptions, known: Mapping[str, Format]) -> Sequence[Path]:
    """Files of a folder and its subfolders that can be read, by path. Hidden files are left out."""
    files, ignored = [], 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        wanted = options.glob is None or fnmatch.fnmatch(path.name, options.glob)
        if wanted and options.format == "auto" and options.glob is None:
            stem = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
            wanted = stem.suffix.lower() in known and path.name not in _NOT_DATA
        if wanted:
            files.append(path)
        else:
            ignored += 1
    if not files:
        raise JobError(
            "input",
            f"no file in {folder} has a known name" + (f" that matches {options.glob}" if options.glob else ""),
            f"known are {' '.join(known)}, also with .gz or .zst"
            + ("; --format text takes every file" if known is DOCUMENT_FILES else ""),
        )
    if ignored:
        logger.info("%s: %d files, %d others left out", folder, len(files), ignored)
    return files


def _saved_dataset(folder: Path, split: str) -> Sequence[Path]:
    """Arrow files of a dataset written by datasets' save_to_disk."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            if split not in splits:
                raise JobError(
                    "dataset_split", f"{folder} has no split {split}, only {', '.join(splits)}", "name one of them"
                )
            folder = folder / split
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(
            "input", f"{folder} is not a dataset as save_to_disk writes it: {error}", "check the folder"
        ) from None
    return [folder / name for name in names]
