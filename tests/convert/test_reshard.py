"""reshard to legacy files: what their arguments say, which iteration they are of, and options that nothing reads."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_dist.convert import hf_to_megatron, megatron_to_hf, reshard, verify
from swift_dist.converters.legacy_io import LegacyCheckpoint
from swift_dist.errors import JobError
from tests.converters import tiny_models

TRACKER = "latest_checkpointed_iteration.txt"
STAGES = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A llama of three layers, as .hf, .dist and .legacy (one rank)."""
    base = tmp_path_factory.mktemp("reshard")
    tiny_models.save_tiny_model("llama", base / "hf")
    to_megatron(base / "hf", base / "dist")
    to_legacy(base / "dist", base / "legacy", tp=1)
    return SimpleNamespace(hf=base / "hf", dist=base / "dist", legacy=base / "legacy")


def to_megatron(source: Path, target: Path, **options: Any) -> Any:
    return hf_to_megatron.run(hf_to_megatron.HFToMegatronOptions(source=str(source), target=str(target), **options))


def to_legacy(source: Path, target: Path, **options: Any) -> Any:
    return reshard.run(reshard.ReshardOptions(source=str(source), target=str(target), **options))


def with_config(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy whose config.json, beside the weights or in hf/, says something else."""
    shutil.copytree(folder, target)
    file = next(target.rglob("config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return target


def with_content(folder: Path, target: Path, iteration: int, place: str, **args: Any) -> Path:
    """A copy of a legacy checkpoint, its file of another iteration, in another folder, with further arguments."""
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(next(folder.rglob("*.pt")), weights_only=True)
    content["iteration"] = iteration
    vars(content["args"]).update(args)
    (target / place / "mp_rank_00").mkdir(parents=True)
    torch.save(content, target / place / "mp_rank_00" / "model_optim_rng.pt")
    (target / TRACKER).write_text("release" if place == "release" else str(iteration))
    shutil.copytree(folder / "hf", target / "hf")
    return target


def folders(target: Path) -> tuple[list[str], str]:
    names = sorted(path.parent.name for path in target.glob("*/mp_rank_*"))
    return sorted(set(names)), (target / TRACKER).read_text()


@pytest.mark.parametrize(
    ("iteration", "place", "after"),
    [(0, "release", "release"), (0, "iter_0000000", "0"), (7, "iter_0000007", "7")],
)
def test_a_release_stays_one(model: SimpleNamespace, tmp_path: Path, iteration: int, place: str, after: str) -> None:
    source = with_content(model.legacy, tmp_path / "source", iteration, place)
    to_legacy(source, tmp_path / "legacy", tp=2)
    assert folders(tmp_path / "legacy") == ([place], after)


def test_what_comes_from_hugging_face_is_a_release(model: SimpleNamespace, tmp_path: Path) -> None:
    assert folders(model.legacy) == (["release"], "release")
    to_legacy(model.legacy, tmp_path / "dist")
    to_legacy(tmp_path / "dist", tmp_path / "legacy", tp=2)
    assert folders(tmp_path / "legacy") == (["release"], "release")


def test_uneven_stages_are_those_of_the_source(model: SimpleNamespace, tmp_path: Path) -> None:
    """Arguments of a first or last stage are for as many stages as the source has."""
    further = {"pipeline_model_parallel_layout": "Et*3L", "account_for_loss_in_pipeline_split": True}
    one = with_content(model.legacy, tmp_path / "one", 7, "iter_0000007", **{STAGES[0]: 1, STAGES[1]: 2}, **further)
    to_legacy(one, tmp_path / "three", pp=3)
    three = LegacyCheckpoint(tmp_path / "three")
    assert three.layers() == [1, 1, 1] and [three.args[name] for name in (*STAGES, *further)] == [None] * 4
    to_legacy(model.legacy, tmp_path / "again", pp=3, verify=True, logits="never")


def test_stages_of_the_same_number_stay_uneven(model: SimpleNamespace, tmp_path: Path) -> None:
    one = with_content(model.legacy, tmp_path / "one", 7, "iter_0000007", **{STAGES[0]: 3})
    to_legacy(one, tmp_path / "tp2", tp=2)
    assert LegacyCheckpoint(tmp_path / "tp2").args[STAGES[0]] == 3


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "gelu"}, {"rope_parameters": {**LINEAR, "rope_type": "yarn"}}], ids=["gelu", "yarn"]
)
def test_a_model_that_arguments_cannot_say_is_refused(
    model: SimpleNamespace, tmp_path: Path, changes: dict[str, Any]
) -> None:
    to_megatron(with_config(model.hf, tmp_path / "hf", **changes), tmp_path / "dist")
    with pytest.raises(JobError, match="Megatron-LM's arguments") as caught:
        to_legacy(tmp_path / "dist", tmp_path / "legacy", tp=1)
    assert caught.value.key == "source" and not (tmp_path / "legacy").exists()


def test_linear_rope_comes_back_from_the_arguments_alone(model: SimpleNamespace, tmp_path: Path) -> None:
    hf = with_config(model.hf, tmp_path / "hf", rope_parameters=LINEAR)
    to_megatron(hf, tmp_path / "dist")
    to_legacy(tmp_path / "dist", tmp_path / "legacy", tp=2)
    shutil.rmtree(tmp_path / "legacy" / "hf")
    assert LegacyCheckpoint(tmp_path / "legacy").args["rotary_seq_len_interpolation_factor"] == 4
    assert verify.run(verify.VerifyOptions(a=str(hf), b=str(tmp_path / "legacy"), hf_config=str(hf)))["equal"]
    to_legacy(tmp_path / "legacy", tmp_path / "again")
    assert json.loads((tmp_path / "again/hf/config.json").read_text())["rope_scaling"]["factor"] == 4.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"hidden_act": "gelu"}, "hidden_act gelu"), ({"rope_parameters": LINEAR}, "'factor': 4.0"), ({}, None)],
    ids=["gelu", "linear", "same"],
)
def test_arguments_of_a_source_that_contradict_its_config_are_told(
    model: SimpleNamespace, tmp_path: Path, changes: dict[str, Any], named: str | None, caplog: Any
) -> None:
    source = with_config(model.legacy, tmp_path / "source", **changes)
    to_legacy(source, tmp_path / "legacy", tp=2)
    told = [record.getMessage() for record in caplog.records if "arguments say otherwise" in record.getMessage()]
    assert len(told) == (named is not None) and all(str(named) in text for text in told)


VERBS = {
    "hf-to-megatron": ("hf", hf_to_megatron.run, hf_to_megatron.HFToMegatronOptions),
    "megatron-to-hf": ("dist", megatron_to_hf.run, megatron_to_hf.MegatronToHFOptions),
    "reshard": ("legacy", reshard.run, reshard.ReshardOptions),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("options", "key", "remedy"),
    [
        ({"logits": "always"}, "logits", ""),
        ({"logits_tolerance": 0.1}, "logits_tolerance", ""),
        ({"ray_address": "127.0.0.1:1"}, "ray_address", "--launcher ray"),
    ],
)
def test_options_that_nothing_reads(
    model: SimpleNamespace, tmp_path: Path, verb: str, options: dict[str, Any], key: str, remedy: str
) -> None:
    kind, run, section = VERBS[verb]
    with pytest.raises(JobError) as caught:
        run(section(source=str(getattr(model, kind)), target=str(tmp_path / "out"), **options))
    assert caught.value.key == key and remedy in caught.value.remedy
    assert verb == "reshard" or key == "ray_address" or caught.value.remedy == "add --verify"
    assert not list(tmp_path.iterdir())


def test_verify_has_no_use_for_an_address_without_ray(model: SimpleNamespace) -> None:
    with pytest.raises(JobError, match=r"^ray_address"):
        verify.run(verify.VerifyOptions(a=str(model.hf), b=str(model.dist), ray_address="127.0.0.1:1"))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"logits": "always", "verify": True}, "logits"),
        ({"logits_tolerance": 0.1, "verify": True}, "logits_tolerance"),
        ({"max_shard_size": "5GB", "tp": 2}, "max_shard_size"),
        ({"max_shard_size": "1KB", "format": "legacy"}, "max_shard_size"),
    ],
)
def test_what_reshard_has_no_use_for(model: SimpleNamespace, tmp_path: Path, options: dict[str, Any], key: str) -> None:
    with pytest.raises(JobError) as caught:
        to_legacy(model.legacy, tmp_path / "out", **options)
    assert caught.value.key == key and "leave" in caught.value.remedy
    assert not list(tmp_path.iterdir())
