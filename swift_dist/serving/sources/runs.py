"""Run folders and checkpoints -> the Hugging Face folder (or adapter) that is served. Converted once and kept."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from swift_dist.checkpoint.folder import RECORD_NAME, Checkpoint, newest_whole, open_checkpoint, step_folders
from swift_dist.errors import JobError
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.outcome import exported
from swift_dist.serving.sources.made import made_once

log = logging.getLogger(__name__)


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, begun or copied from elsewhere."""
    return (path / "job.yaml").is_file() and ((path / "status.json").is_file() or (path / "checkpoints").is_dir())


def of_run(path: Path, key: str, *, cache: Path | None, **megatron: str | None) -> tuple[Path, str]:
    """(folder, what it is in words) of a run: what it exported where it is done, else its newest whole checkpoint.

    Raises:
        JobError: (with `key`) there is nothing yet.
    """
    run = RunFolder(path)
    status, export = run.status(), exported(run)
    if export and (status is None or status.state == "done"):
        return _kept(Path(export), key, cache), f"the final weights of {path}"
    newest = newest_whole(run.checkpoints)
    if newest is not None:
        return _of_recorded(newest, key, cache, megatron)
    if export:
        return _kept(Path(export), key, cache), f"the weights of {path} before it went on"
    if step_folders(run.checkpoints):
        raise JobError(key, f"none of the checkpoints in {run.checkpoints} is whole", "see the warnings above")
    raise JobError(key, f"{path} has no checkpoint yet", "wait for its first one: checkpoint.interval says when")


def _kept(export: Path, key: str, cache: Path | None) -> Path:
    """An export as it is now: a run that goes on replaces it, and what is served keeps its weights."""

    def keep(folder: Path) -> None:
        partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
        try:
            shutil.copytree(export, partial, copy_function=_link)
            partial.rename(folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise JobError(key, f"{export} cannot be kept in {folder}: {error}", "try again, or --cache DIR") from None

    try:
        name, what = f"{export.parent.name}-{export.name}", f"keeping {export}"
        return made_once(name, [export], {}, keep, cache, what, series=f"export {export.absolute()}")
    except JobError as error:
        if cache is not None or error.key != "cache":
            raise
        log.warning("%s: %s is served where it is, and changes if its run goes on", error.message, export)
        return export


def _link(source: str, target: str) -> None:
    """A second name of the same bytes, which an export never overwrites; a copy on another file system."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def of_checkpoint(path: Path, key: str, *, cache: Path | None, **megatron: str | None) -> tuple[Path, str]:
    """(folder, what it is in words) of a checkpoint, or of a folder of checkpoints: the newest.

    Raises:
        JobError: (with `key`) there is none, or it is not whole.
    """
    if (path / RECORD_NAME).is_file() or step_folders(path):
        return _of_recorded(open_checkpoint(path, key), key, cache, megatron)
    from swift_dist.convert.sources import find_kind

    try:
        kind, folder = find_kind(path, key)
    except JobError:
        raise JobError(key, f"{path} holds no model, adapter, run or checkpoint", _inside(path)) from None
    if kind in ("hf", "peft"):  # weights without the config.json that says whose
        raise JobError(key, f"{path} holds weights but no config.json", "copy the model's whole folder")
    return _of_megatron(folder, cache, megatron), f"the {kind} checkpoint {folder}"


def _inside(path: Path) -> str:
    runs = sorted(child.name for child in path.iterdir() if child.is_dir() and is_run(child))
    return f"name one of its runs, such as {path / runs[-1]}" if runs else "give a model folder, an adapter or a run"


def _of_recorded(checkpoint: Checkpoint, key: str, cache: Path | None, megatron: dict[str, Any]) -> tuple[Path, str]:
    """Of a checkpoint of ours, of either engine."""
    said = f"step {checkpoint.step} of {checkpoint.path.parent.parent}"
    if checkpoint.metadata.get("engine") != "hf":
        return _of_megatron(checkpoint.path, cache, megatron), said
    given = sorted(name for name, value in megatron.items() if value)
    if given:
        raise JobError(given[0], "is read for Megatron checkpoints; the hf engine's know it", "leave it out")
    job_file = checkpoint.path.parent.parent / "job.yaml"
    if not job_file.is_file():
        raise JobError(
            key,
            f"{checkpoint.path} is a checkpoint of the hf engine without its run's job.yaml, which says what it holds",
            "copy the run folder with it",
        )
    return _of_hf_engine(checkpoint, job_file, cache, key), said


def _of_hf_engine(checkpoint: Checkpoint, job_file: Path, cache: Path | None, key: str) -> Path:
    from swift_dist.config import JobConfig
    from swift_dist.config.load import build, read_yaml

    job = build(JobConfig, [read_yaml(job_file)])
    sources = [checkpoint.path, job_file]
    for place in (job.model.path, job.model.tokenizer):
        if place and Path(place).is_dir() and place not in map(str, sources):
            sources.append(Path(place))

    def export(folder: Path) -> None:
        from swift_dist.engines.hf.saved_step import export_checkpoint

        export_checkpoint(checkpoint, job, folder)

    run = job_file.parent
    what = f"exporting step {checkpoint.step} of {run}"
    series = f"steps {run.absolute()}"
    return made_once(f"{run.name}-step_{checkpoint.step}", sources, {}, export, cache, what, series)


def _of_megatron(checkpoint: Path, cache: Path | None, megatron: dict[str, Any]) -> Path:
    """A Megatron checkpoint through the converters, with their progress."""
    job_file = checkpoint.parent.parent / "job.yaml"
    given = {name: Path(value) for name, value in megatron.items() if value}
    for name, place in given.items():
        if not place.exists():
            raise JobError(name, f"there is no {place}", "correct the path")
    sources = [checkpoint, *([job_file] if job_file.is_file() else []), *given.values()]

    def convert(folder: Path) -> None:
        from swift_dist.convert.megatron_to_hf import MegatronToHFOptions, run

        run(MegatronToHFOptions(source=str(checkpoint), target=str(folder), **megatron))

    is_run_step = job_file.is_file()
    name = f"{checkpoint.parent.parent.name}-{checkpoint.name}" if is_run_step else checkpoint.name
    series = f"steps {checkpoint.parent.parent.absolute()}" if is_run_step else f"checkpoint {checkpoint.absolute()}"
    return made_once(name, sources, {}, convert, cache, f"converting {checkpoint}", series)
