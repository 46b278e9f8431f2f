"""What is measured: a job for every number of ranks and set of features, checked as `swift-dist sft` checks it."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swift_dist.config import DataSection, JobConfig
from swift_dist.config.job import CheckpointSection, DatasetEntry, ReportSection, ScheduleSection, TrainSection
from swift_dist.config.load import build, read_yaml
from swift_dist.config.section import updated
from swift_dist.errors import JobError

_FEATURES: dict[str, tuple[Any, Any]] = {
    # name, which is that of a key of `train`: (off, on); in the order of ALST's table (arXiv 2506.13996)
    "recompute": ("none", "full"),
    "tiled_loss": (False, True),
    "tiled_mlp": (False, True),
    "offload_activations": (False, True),
}
FEATURES = tuple(name for name in _FEATURES if name in TrainSection.model_fields)
"""What makes sequences longer, by the names of the keys of `train`, each tried with all before it."""
BASE, ALL = "base", "all"
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def parse_memory(text: str) -> int:
    """Bytes of a text such as ``80GiB`` or ``1.5 GB``.

    Raises:
        JobError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    size = float(found[1]) * _UNITS.get(found[2], 0) if found else 0
    if size < 1:
        raise JobError("memory", f"{text!r} is no size in {', '.join(_UNITS)}", "such as --memory 80GiB")
    return int(size)


def chosen_features(names: Sequence[str], on_cuda: bool) -> tuple[str, ...]:
    """The sets of features that are asked for, each named by its last one, in the order in which they add up.

    Args:
        names: of sets; none: each. On the CPU offload_activations, which saves nothing there, is tried only by name.
        on_cuda: whether ranks compute on GPUs.

    Raises:
        JobError: one is none.
    """
    known = (BASE, *FEATURES)
    for name in names:
        if name not in (*known, ALL):
            raise JobError("features", f"there is no {name!r}", f"some of {','.join((*known, ALL))}")
    usual = [name for name in known if on_cuda or name != "offload_activations"]
    wanted = {usual[-1] if name == ALL else name for name in names or usual}
    return tuple(name for name in known if name in wanted)


def settings_of(features: str) -> dict[str, Any]:
    """Keys of `train` of a set of features: on up to the one that names it, off beyond."""
    num_on = 0 if features == BASE else FEATURES.index(features) + 1
    return {name: _FEATURES[name][index < num_on] for index, name in enumerate(FEATURES)}


@dataclass(frozen=True)
class Series:
    """A search: one number of ranks that share a sequence, and one set of features.

    Args:
        sharing: ranks that share each sequence.
        features: the set's name.
        job: of `swift-dist sft`, resolved, but for the length.
        hf_config: the model's config.json; vocab_size: token ids below it are made up.
        memory: bytes that a rank may take (None: all of its GPU).
        on_cuda: whether ranks compute on GPUs.
        versions: of what computes.
    """

    sharing: int
    features: str
    job: JobConfig
    hf_config: Mapping[str, Any]
    vocab_size: int
    memory: int | None
    on_cuda: bool
    versions: Mapping[str, str]

    @property
    def num_ranks(self) -> int:
        assert self.job.cluster.nproc_per_node
        return self.job.cluster.nproc_per_node

    def without(self, names: Collection[str]) -> Series:
        """The same less some features, named by the last one that is left."""
        train = self.job.train
        is_on = {name: getattr(train, name) != _FEATURES[name][0] and name not in names for name in FEATURES}
        settings = {name: _FEATURES[name][is_on[name]] for name in FEATURES}
        last = max((name for name in FEATURES if is_on[name]), key=FEATURES.index, default=BASE)
        return replace(self, features=last, job=updated(self.job, train=updated(train, **settings)))

    def of_length(self, length: int) -> dict[str, Any]:
        """One try as plain values, which its ranks read."""
        job = updated(self.job, data=updated(self.job.data, sequence_length=length))
        return {
            "job": job.model_dump(mode="json"),
            "hf_config": dict(self.hf_config),
            "vocab_size": self.vocab_size,
            "world_size": self.num_ranks,
            "on_cuda": self.on_cuda,
            "memory": self.memory,
            "steps": job.train.steps,
        }

    def key(self, length: int) -> str:
        """Names everything that decides how a try ends, so that it need not be made twice."""
        what = self.of_length(length)
        for name in ("output", "data"):
            del what["job"][name]
        text = json.dumps([what, length, self.versions, _gpus() if self.on_cuda else "cpu"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def command(self, length: int) -> str:
        """What trains so, for people who want to do it."""
        from swift_dist.launchers._base import command_line

        job = updated(
            self.job,
            output=None,
            data=DataSection(sequence_length=length),
            template=updated(self.job.template, date=None),
            train=updated(self.job.train, steps=None),
            schedule=ScheduleSection(),
            report=ReportSection(),
        )
        return f"{command_line(job)} --dataset ROWS.jsonl"


def _gpus() -> list[str]:
    """Models of this machine's GPUs."""
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for path in found for line in path.read_text(errors="replace").splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]


def make_series(
    base: JobConfig,
    *,
    sharing: Sequence[int],
    features: Sequence[str],
    memory: int | None,
    on_cuda: bool,
    length: int,
    versions: Mapping[str, str],
) -> list[Series]:
    """All searches, checked.

    Args:
        base: what they have in common (`base_job`).
        sharing: ranks that share a sequence, one or several numbers.
        features: names of sets (`chosen_features`).
        memory, on_cuda, versions: see `Series`.
        length: the shortest that will be tried.

    Raises:
        JobError: `swift-dist sft` would refuse one of the jobs.
    """
    from swift_dist.resolve import resolve

    found = []
    with tempfile.TemporaryDirectory(prefix="swift_dist-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        rows.write_text('{"text": "tokens are made up"}\n', encoding="utf-8")
        for size in sharing:
            for name in features:
                num_ranks = base.cluster.nproc_per_node or size
                job = updated(
                    base,
                    data=DataSection(train=(DatasetEntry(path=str(rows)),), sequence_length=length),
                    train=updated(base.train, global_batch_size=max(1, num_ranks // size), **settings_of(name)),
                    parallel=updated(base.parallel, context_parallel_size=size),
                    cluster=updated(base.cluster, nproc_per_node=num_ranks),
                )
                resolved = resolve(job, nproc_per_node=num_ranks, on_cuda=on_cuda, output=scratch, encode=False)
                vocab_size = resolved.payload()["vocab_size"]
                if vocab_size is None:
                    raise JobError("model", "its config.json states no vocab_size", "give another model")
                found.append(
                    Series(size, name, resolved.job, resolved.hf_config, vocab_size, memory, on_cuda, versions)
                )
    return found


def base_job(model: str | None, path: str | None, steps: int, given: Mapping[str, Any]) -> JobConfig:
    """A fine-tuning job without a length.

    Args:
        model: a folder, a hub id, or a recipe's model; None: the job file's.
        path: a job file.
        steps: optimizer steps of a try.
        given: keys that win over the job file's.

    Raises:
        JobError: there is no such file or model, or it is no job of causal language modelling on one machine.
    """
    from swift_dist.config.aliases import JOB_ALIASES

    file = read_yaml(path) if path else {}
    job = build(JobConfig, [{"task": "sft"}, file, given, _model_keys(model)], JOB_ALIASES)
    if job.model.path is None and job.model.config is None:
        raise JobError("model", "is not given", "--model FOLDER, hub id or name of a recipe's model")
    for key, value, wanted in (
        ("task", job.task, "sft"),
        ("objective.name", job.objective.resolved_name(job.task), "causal_lm"),
        ("cluster.nnodes", job.cluster.nnodes, 1),
    ):
        if value != wanted:
            raise JobError(key, f"{value!r}, and lengths are tried with {wanted!r}", "give another --job, or none")
    if job.model.path and not any(Path(job.model.path).glob("*.safetensors")):
        job = updated(job, model=updated(job.model, init="random"))
    train = {name: getattr(job.train, name) for name in ("seed", "precision", "compile", "initial_loss_scale")}
    return updated(
        job,
        train=TrainSection(**train, steps=steps, micro_batch_size=1),
        schedule=ScheduleSection(name="constant"),
        checkpoint=CheckpointSection(),
        report=ReportSection(tensorboard=False),
    )


def _model_keys(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    config = None if Path(name).exists() else shapes().get(name)
    return {"model.path": name if config is None else None, "model.config": config}


def shapes() -> dict[str, dict[str, Any]]:
    """Names of published models, and their config.json: those of the shipped recipes (``llama-3.1-8b``)."""
    from swift_dist.recipes import list_recipes, read_recipe

    names = {re.sub(r"-\d+gpu$", "", recipe): recipe for recipe in list_recipes()}
    return {name: read_recipe(recipe)["model"]["config"] for name, recipe in names.items()}
