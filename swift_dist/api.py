"""The verbs as Python functions: what the command line does, without parsing words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift_dist.config import JobConfig
from swift_dist.config.aliases import JOB_ALIASES
from swift_dist.config.load import build, read_yaml
from swift_dist.errors import JobError


def job_config(source: JobConfig | Mapping[str, Any] | str | Path | None = None, **overrides: Any) -> JobConfig:
    """A job from a file, a mapping or another job, with overrides by alias or by ``section__key``.

    >>> job_config({"train": {"steps": 10}}, tp=2, optimizer__lr=1e-4).parallel.tensor_model_parallel_size
    2

    Raises:
        JobError: as the command line does.
    """
    if isinstance(source, JobConfig):
        layers: list[Mapping[str, Any]] = [source.model_dump(mode="json")]
    elif isinstance(source, Mapping):
        layers = [source]
    else:
        layers = [read_yaml(source)] if source else []
    return build(JobConfig, [*layers, {k.replace("__", "."): v for k, v in overrides.items()}], JOB_ALIASES)


def pretrain(source: JobConfig | Mapping[str, Any] | str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """`swift-dist pretrain`: run the job to its end and return its result (``output``, ``step``, ``loss``, ...).

    Raises:
        JobError: the job is wrong, or another task's; nothing was started.
        RunError: the run failed.
    """
    return _run("pretrain", source, overrides)


def sft(source: JobConfig | Mapping[str, Any] | str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """`swift-dist sft`, as `pretrain` is `swift-dist pretrain`; its result names the ``export`` too."""
    return _run("sft", source, overrides)


def rlhf(source: JobConfig | Mapping[str, Any] | str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """`swift-dist rlhf`, as `sft`."""
    return _run("rlhf", source, overrides)


def _run(
    task: str, source: JobConfig | Mapping[str, Any] | str | Path | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    from swift_dist.job import run

    if isinstance(source, (str, Path)):
        source = read_yaml(source)
    said = source.task if isinstance(source, JobConfig) else (source or {}).get("task", task)
    if said != task:
        problem = f"the job says {said!r} but the function is swift_dist.{task}"
        raise JobError("task", problem, f"swift_dist.{said}(...)")
    return run(job_config(source, task=task, **overrides))
