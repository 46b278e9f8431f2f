"""Which keys of a job a resume may change: all of them are decided."""

from __future__ import annotations

import pytest

from swift_dist.checkpoint.resume import RULES, Difference, Rule, job_keys, require_same_training, resume_difference
from swift_dist.config import JobConfig
from swift_dist.errors import JobError


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


def test_rules_are_used():
    assert {Rule.MODEL, Rule.DATA, Rule.FIXED, Rule.FREE} == set(RULES.values())
