"""The verbs as Python functions: what the command line does, without parsing words.

A job is keys, as on the command line and in a job file (``swift-dist sft --help`` lists them), given in one or both of

    source: a mapping (``{"train": {"steps": 10}}`` or ``{"train.steps": 10}``), the path of a YAML file, a `JobConfig`
    overrides: keywords, which win: a key with ``__`` for its points (``train__steps=10``), or a short name
        (``max_steps=10``, ``model=...``, ``dataset=...``, ``learning_rate=...``), which mappings and files may use too

The call returns when the job has ended. It runs on the Ray cluster of ``cluster.address`` or RAY_ADDRESS, else on one
of its own on this machine. Other launchers are the command line's (``--launcher``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift_dist.config import JobConfig
from swift_dist.config.aliases import JOB_ALIASES, JOB_ELSEWHERE
from swift_dist.config.load import build, read_yaml
from swift_dist.errors import JobError


def job_config(source: JobConfig | Mapping[str, Any] | str | Path | None = None, **overrides: Any) -> JobConfig:
    """A job from a file, a mapping or another job, with overrides by short name or by ``section__key``.

    >>> job_config({"train": {"steps": 10}}, tp=2, optimizer__lr=1e-4).parallel.tensor_model_parallel_size
    2

    Raises:
        JobError: as the command line does.
    """
    for name in overrides:
        if name == "launcher":
            raise _no_launcher(overrides)
        if name in JOB_ELSEWHERE:
            raise JobError(name, f"unknown key. instead: {JOB_ELSEWHERE[name]}", "see --help for every key")
    if isinstance(source, JobConfig):
        layers: list[Mapping[str, Any]] = [source.model_dump(mode="json")]
    elif isinstance(source, Mapping):
        layers = [source]
    else:
        layers = [read_yaml(source)] if source else []
    return build(JobConfig, [*layers, {k.replace("__", "."): v for k, v in overrides.items()}], JOB_ALIASES)


def _no_launcher(overrides: Mapping[str, Any]) -> JobError:
    task, name = overrides.get("task", "pretrain"), overrides["launcher"]
    return JobError(
        "launcher",
        f"{name!r}: from Python a job runs on the Ray cluster of cluster.address, or on one of its own here",
        f"swift-dist {task} job.yaml --launcher {name} (a launcher is no key of job.yaml)",
    )


def pretrain(source: JobConfig | Mapping[str, Any] | str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """`swift-dist pretrain`: run the job to its end, or go on with the run in its ``output`` folder.

    >>> pretrain("job.yaml", train__steps=100, output="runs/x")  # doctest: +SKIP

    Args:
        source: the job: a mapping, the path of a YAML file, or a `JobConfig`.
        overrides: keys that win over it (see the module).

    Returns:
        What ``--json`` prints: ``state`` ("done", or "interrupted" after Ctrl-C, which saves a checkpoint first),
        ``output`` (the run folder), ``export`` (folder of the final weights; None: none were written) and
        ``export_step`` (the step that they are of), ``step`` and ``loss`` of the last step, ``message`` (why it stopped
        early, else ""), ``checkpoint`` (step of the newest), ``restarts`` (failures survived), ``seconds``.

    Raises:
        JobError: the job is wrong, or another task's; nothing was started. Its ``key``, ``message`` and ``remedy``.
        RunError: the run failed. Its ``message`` and ``remedy``.
        KeyboardInterrupt: interrupted before anything could be saved, or twice.
    """
    return _run("pretrain", source, overrides)


def sft(source: JobConfig | Mapping[str, Any] | str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """`swift-dist sft`: takes, returns and raises what `pretrain` does; ``export`` is a model's or adapter's folder.

    >>> sft(model="my-model", dataset="rows.jsonl", tuner_type="lora", output="runs/x")["export"]  # doctest: +SKIP
    '/.../runs/x/adapter'
    """
    return _run("sft", source, overrides)


def rlhf(source: JobConfig | Mapping[str, Any] | str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """`swift-dist rlhf`: as `sft`, from preferences (``rlhf_type="dpo"``)."""
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
