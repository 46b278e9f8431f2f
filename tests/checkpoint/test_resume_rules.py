"""Which keys of a job a resume may change: all of them are decided."""

from __future__ import annotations

import pytest

from swift_dist.checkpoint.resume import RULES, Difference, Rule, job_keys, require_same_training, resume_difference
from swift_dist.config import JobConfig
from swift_dist.config.load import dump_job
from swift_dist.errors import JobError
from swift_dist.resolve import check_resume, resolve


def job(**sections):
    base = {"model": {"path": "/m"}, "data": {"train": ["/d/a"]}, "train": {"steps": 10}}
    return JobConfig.model_validate({**base, **{k: {**base.get(k, {}), **v} for k, v in sections.items()}})


def test_every_key_is_decided():
    assert set(job_keys()) == set(RULES)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "seed", 7),
        ("train", "global_batch_size", 16),
        ("data", "sequence_length", 512),
        ("data", "separate_documents", True),
        ("data", "train", ["/d/b"]),
        ("model", "path", "/other"),
        ("model", "init", "random"),
        ("optimizer", "name", "sgd"),
        ("optimizer", "lr", 1e-5),
        ("schedule", "name", "linear"),
        ("parallel", "use_distributed_optimizer", False),
    ],
)
def test_another_training_is_refused(section, key, value):
    differences = resume_difference(job(), job(**{section: {key: value}}))
    assert [d.key for d in differences] == [f"{section}.{key}"]
    with pytest.raises(JobError, match=f"{section}.{key}"):
        require_same_training(differences, "runs/x")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "steps", 99),
        ("train", "micro_batch_size", 2),
        ("train", "eval_interval", 5),
        ("parallel", "tensor_model_parallel_size", 4),
        ("parallel", "sequence_parallel", False),
        ("checkpoint", "interval", 3),
        ("cluster", "nproc_per_node", 8),
        ("report", "tensorboard", False),
        ("model", "init", "pretrained"),  # what the path says anyway
    ],
)
def test_another_way_to_run_it_is_accepted(section, key, value):
    assert resume_difference(job(), job(**{section: {key: value}})) == []


def test_fingerprints_decide_over_paths():
    old, new = job(), job(model={"path": "/moved"}, data={"train": ["/moved/a"]})
    same = {"model": "m1", "data": "d1"}
    assert resume_difference(old, new, same, same) == []
    assert resume_difference(old, old, same, {"model": "m1", "data": "d2"}) == [Difference("data.train", "d1", "d2")]


def test_job_yaml_of_an_older_version():
    old = job().model_dump(mode="json")
    del old["train"]["max_skipped"], old["schedule"], old["optimizer"]["momentum"]
    old["train"]["gone_by_now"] = 1
    assert resume_difference(old, job()) == []
    old["optimizer"]["eps"] = 1e-5
    assert [d.key for d in resume_difference(old, job())] == ["optimizer.eps"]


def test_a_warm_up_by_ratio_is_a_number_of_steps_that_a_resume_keeps(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "a", "response": "b"}\n')

    def resolved(**sections):
        settings = {"task": "sft", "model": {"config": {"model_type": "llama"}}, "data": {"train": [str(rows)]}}
        wanted = JobConfig.model_validate({**settings, **sections})
        return resolve(wanted, nproc_per_node=1, on_cuda=False, output=str(tmp_path), encode=False)

    def warmup(**sections):
        return resolved(**sections).job.schedule.warmup_steps

    tenth, more = {"warmup_ratio": 0.1}, {"steps": 50}
    first = resolved(train={"steps": 25}, schedule=tenth).job
    assert first.schedule.warmup_steps == 3  # transformers' get_warmup_steps: ceil(25 * 0.1)
    assert warmup(train={"steps": 25}, schedule=first.schedule) == 3  # as ranks and other nodes read it
    assert warmup(train={"epochs": 1}, schedule=tenth) == 0  # known where rows are encoded
    with pytest.raises(JobError, match=r"schedule\.warmup_steps: 4, but schedule.warmup_ratio 0.1 is 3 steps"):
        warmup(train={"steps": 25}, schedule={**tenth, "warmup_steps": 4})

    (tmp_path / "job.yaml").write_text(dump_job(first))
    assert warmup(train=more, schedule=tenth) == 5  # it ended before its first checkpoint
    (tmp_path / "checkpoints" / "step_10").mkdir(parents=True)
    assert warmup(train=more, schedule=tenth) == warmup(train={"epochs": 1}, schedule=tenth) == 3
    check_resume(resolved(train=more, schedule=tenth), tmp_path, first.model_dump(mode="json"))
    with pytest.raises(JobError, match=r"schedule\.warmup_steps: 3 in .*, 10 in this job"):
        check_resume(resolved(train=more, schedule={"warmup_ratio": 0.2}), tmp_path, first.model_dump(mode="json"))


def test_rules_are_used():
    assert {Rule.MODEL, Rule.DATA, Rule.FIXED, Rule.FREE} == set(RULES.values())
