"""A fine-tuning run that goes on, as who submits or describes it sees it: its rows are not encoded there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swift_dist.checkpoint.folder import write_record
from swift_dist.config import JobConfig
from swift_dist.errors import JobError
from swift_dist.resolve import ResolvedJob, check_resume, resolve

CONFIG = {"model_type": "llama", "vocab_size": 64}


def job(tmp_path: Path, task: str = "sft", **sections: Any) -> JobConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "red", "chosen": "blue", "rejected": "green"}\n')
    base = {"task": task, "model": {"config": CONFIG}, "data": {"train": [str(rows)]}, **sections}
    return JobConfig.model_validate(base)


def resolved(given: JobConfig, tmp_path: Path) -> ResolvedJob:
    return resolve(given, nproc_per_node=1, on_cuda=False, output=str(tmp_path / "run"), encode=False)


def save(tmp_path: Path, **metadata: Any) -> Path:
    """A checkpoint of step 4 in a run folder."""
    folder = tmp_path / "run" / "checkpoints" / "step_4"
    folder.mkdir(parents=True)
    write_record(folder, step=4, metadata={"hf_config": CONFIG, **metadata}, checksummed=[])
    return tmp_path / "run"


def test_rows_that_are_not_encoded_here_are_not_taken_for_others(tmp_path: Path) -> None:
    """`--dry-run` and the launchers that hand a job over refused every resume."""
    folder = save(tmp_path, data_fingerprint="rows of the run")
    new = resolved(job(tmp_path), tmp_path)
    old = new.job.model_dump(mode="json")
    check_resume(new, folder, old)
    with pytest.raises(JobError, match=r"^data\.train.*\n.*old.jsonl.*rows of the run.* in .*rows.jsonl.*other rows"):
        old["data"]["train"][0]["path"] = "old.jsonl"
        check_resume(replace(new, data_fingerprint="other rows"), folder, old)
    changed = resolved(job(tmp_path, optimizer={"lr": 1.0}), tmp_path)
    with pytest.raises(JobError, match=r"^optimizer\.lr"):
        check_resume(changed, folder, old)


def test_a_batch_that_nobody_gave_is_called_the_default(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"8 \(the default\) is not a multiple"):
        resolve(job(tmp_path), nproc_per_node=3, on_cuda=False, output=str(tmp_path / "run"), encode=False)


def test_steps_count_on_from_another_run(tmp_path: Path) -> None:
    folder = str(save(tmp_path, engine="hf"))
    resolved(job(tmp_path, checkpoint={"load": folder}), tmp_path)  # epochs, which are steps once rows are encoded
    resolved(job(tmp_path, checkpoint={"load": folder}, train={"steps": 5}), tmp_path)
    with pytest.raises(JobError, match=r"--train.steps 8 for 4 more"):
        resolved(job(tmp_path, checkpoint={"load": folder}, train={"steps": 4}), tmp_path)


def test_the_remedy_is_the_engines_own(tmp_path: Path) -> None:
    """A fine-tuning run has an export; nothing converts its checkpoints."""
    folder = save(tmp_path, engine="hf", consumed_samples=64)
    old = resolved(job(tmp_path), tmp_path).job.model_dump(mode="json")
    changed = resolved(job(tmp_path, optimizer={"name": "sgd"}), tmp_path)
    with pytest.raises(JobError, match="swift-dist merge") as error:
        check_resume(changed, folder, old)
    assert "megatron-to-hf" not in str(error.value)
    with pytest.raises(JobError, match=r"--train\.global_batch_size 16; .*swift-dist merge"):
        resolved(job(tmp_path, checkpoint={"load": str(folder)}), tmp_path)


def test_a_checkpoint_of_the_other_engine_is_refused(tmp_path: Path) -> None:
    folder = str(save(tmp_path, engine="megatron"))
    with pytest.raises(JobError, match="is of the megatron engine, and this job's is hf"):
        resolved(job(tmp_path, checkpoint={"load": folder}), tmp_path)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"task": "rlhf", "objective": {"reference": "/nowhere/model"}}, "objective.reference"),
        ({"model": {"config": CONFIG, "liger": True}}, "model.liger"),
        ({"model": {"config": CONFIG, "liger": True, "kernels": True}}, "model.liger"),
    ],
)
def test_what_the_ranks_would_find_out(tmp_path: Path, sections: dict[str, Any], key: str) -> None:
    with pytest.raises(JobError) as error:
        resolved(job(tmp_path, **sections), tmp_path)
    assert error.value.key == key
