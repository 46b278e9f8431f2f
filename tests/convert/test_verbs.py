"""inspect, reshard and verify as their users see them: on every format, equal and unequal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift_dist.cli import main
from swift_dist.convert import inspect, verify
from swift_dist.convert.hf_to_megatron import HFToMegatronOptions
from swift_dist.convert.hf_to_megatron import run as to_megatron
from swift_dist.convert.reshard import ReshardOptions
from swift_dist.convert.reshard import run as reshard
from swift_dist.errors import JobError
from tests.converters import tiny_models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A mixture of experts in all three formats; the legacy one at TP2 EP2."""
    base = tmp_path_factory.mktemp("verbs")
    tiny_models.save_tiny_model("qwen3_moe", base / "hf")
    to_megatron(HFToMegatronOptions(source=str(base / "hf"), target=str(base / "dist")))
    reshard(ReshardOptions(source=str(base / "dist"), target=str(base / "legacy"), tp=2, ep=2))
    return SimpleNamespace(hf=base / "hf", dist=base / "dist", legacy=base / "legacy")


def compare(a: Path, b: Path, **options: Any) -> dict[str, Any]:
    return verify.run(verify.VerifyOptions(a=str(a), b=str(b), **{"logits": "never", **options}))


@pytest.mark.parametrize("a", ["hf", "dist", "legacy"])
@pytest.mark.parametrize("b", ["hf", "dist", "legacy"])
def test_all_formats_are_equal_to_each_other(model: SimpleNamespace, a: str, b: str) -> None:
    verdict = compare(getattr(model, a), getattr(model, b))
    assert verdict["equal"] and verdict["exit_code"] == 0, verdict["problems"]
    assert verdict["tolerance"] == 0 and "bit for bit" in verify.render(verdict)


def changed(model: SimpleNamespace, folder: Path, change: Any) -> Path:
    shutil.copytree(model.hf, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("other", ["dist", "legacy"])
def test_one_bit_is_a_difference(model: SimpleNamespace, tmp_path: Path, other: str) -> None:
    name = "model.layers.2.mlp.experts.3.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.int32)[5, 7] ^= 1

    folder = changed(model, tmp_path / "changed", change)
    for verdict in (compare(folder, getattr(model, other)), compare(getattr(model, other), folder)):
        assert not verdict["equal"] and verdict["exit_code"] == 1
        (problem,) = verdict["problems"]
        assert "1 values differ" in problem and ("experts.3" in problem or "experts" in problem)
    assert compare(folder, getattr(model, other), tolerance=1e-6)["equal"]


def test_a_differing_dtype_is_a_difference_unless_it_was_asked_for(model: SimpleNamespace, tmp_path: Path) -> None:
    to_megatron(HFToMegatronOptions(source=str(model.hf), target=str(tmp_path / "bf16"), dtype="bf16"))
    verdict = compare(model.hf, tmp_path / "bf16")
    assert not verdict["equal"] and "BF16 against F32" in verdict["problems"][0]
    assert compare(model.hf, tmp_path / "bf16", dtype="bf16")["equal"]
    with pytest.raises(JobError, match="is stored as fp16"):
        compare(model.hf, tmp_path / "bf16", dtype="fp16")


def test_other_models_are_not_equal_and_missing_ones_are_refused(model: SimpleNamespace, tmp_path: Path) -> None:
    tiny_models.save_tiny_model("qwen3_moe", tmp_path / "other", num_hidden_layers=2)
    tiny_models.save_tiny_model("llama", tmp_path / "llama")
    for other in ("other", "llama"):
        for pair in ((tmp_path / other, model.hf), (model.hf, tmp_path / other)):
            verdict = compare(*pair)
            assert verdict["exit_code"] == 1 and "another model" in verdict["problems"][0]
    with pytest.raises(JobError, match="not a folder"):
        compare(model.hf, tmp_path / "absent")


def test_unequal_replicas_of_ranks_are_found(model: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(model.legacy, tmp_path / "legacy")
    file = next((tmp_path / "legacy").rglob("mp_rank_01_001/*.pt"))
    import argparse

    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, weights_only=True)
    content["model"]["decoder.final_layernorm.weight"][3] += 1
    torch.save(content, file)
    verdict = compare(model.hf, tmp_path / "legacy")
    assert not verdict["equal"] and "final_layernorm" in verdict["problems"][0]
    with pytest.raises(JobError, match=r"final_layernorm.* must repeat another tensor"):
        reshard(ReshardOptions(source=str(tmp_path / "legacy"), target=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_equal_weights_that_compute_something_else_are_not_equal(model: SimpleNamespace, tmp_path: Path) -> None:
    for key, value, said in (("rms_norm_eps", 0.5, "layernorm_epsilon: 0.5"), ("rope_theta", 9.0, "frequencies")):
        folder = tmp_path / key
        shutil.copytree(model.hf, folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("rope_parameters", None)
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        verdict = compare(folder, model.dist)
        assert not verdict["equal"] and any(said in problem for problem in verdict["problems"]), verdict["problems"]


@pytest.mark.slow
def test_logits_are_part_of_the_verdict(model: SimpleNamespace, tmp_path: Path) -> None:
    verdict = compare(model.hf, model.dist, logits="always")
    layouts = verdict["logits"]["layouts"]
    assert verdict["equal"] and len(layouts) >= 2 and all(entry["relative"] <= 1e-4 for entry in layouts)
    # Rounded on the way: both sides' logits are then those of the rounded weights.
    to_megatron(HFToMegatronOptions(source=str(model.hf), target=str(tmp_path / "bf16"), dtype="bf16", verify=True))
    rounded = compare(model.hf, tmp_path / "bf16", dtype="bf16", logits="always")
    assert rounded["equal"] and max(entry["relative"] for entry in rounded["logits"]["layouts"]) <= 1e-5
    assert compare(model.hf, tmp_path / "bf16", logits="always")["problems"][-1].startswith("logits at")
    with pytest.raises(JobError, match="takes a Hugging Face folder and a torch_dist checkpoint"):
        compare(model.dist, model.legacy, logits="always")


@pytest.mark.parametrize("kind", ["hf", "dist", "legacy"])
def test_inspect(model: SimpleNamespace, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = getattr(model, kind)
    found = inspect.run(inspect.InspectOptions(source=str(path)))
    total = sum(values.numel() for values in load_file(model.hf / "model.safetensors").values())
    assert found["format"] == {"hf": "hf", "dist": "torch_dist", "legacy": "legacy"}[kind]
    assert found["parameters"] == total if kind != "legacy" else found["parameters"] > total
    assert sum(entry["bytes"] for entry in found["tensors"]) == found["bytes"]
    assert main(["convert", "inspect", str(path)]) == 0
    short = capsys.readouterr().out
    assert main(["convert", "inspect", str(path), "--full"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > len(short.splitlines()) + 10 and "{0-2}" in short
    assert main(["convert", "inspect", str(path), "--match", "router|mlp.gate.weight", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tensors"] and all("router" in e["name"] or "gate" in e["name"] for e in answer["tensors"])


def test_inspect_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    for source, match in ((tmp_path, None), (tmp_path / "absent", None), (tmp_path, "(")):
        with pytest.raises(JobError):
            inspect.run(inspect.InspectOptions(source=str(source), match=match))


def test_reshard_refuses_what_makes_no_sense(model: SimpleNamespace, tmp_path: Path) -> None:
    def refusal(source: Path, **options: Any) -> str:
        with pytest.raises(JobError) as caught:
            reshard(ReshardOptions(source=str(source), target=str(tmp_path / "out"), **options))
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "use convert hf-to-megatron" in refusal(model.hf)
    assert "any layout loads it" in refusal(model.dist)
    assert "has no degrees" in refusal(model.legacy, format="torch_dist", tp=2)
    assert refusal(model.legacy, tp=3).startswith("tp:")
    assert refusal(model.legacy, ep=3).startswith("ep:")
    assert refusal(model.legacy, pp=2).startswith("pp:")


def test_legacy_there_and_back_keeps_every_bit(model: SimpleNamespace, tmp_path: Path) -> None:
    reshard(ReshardOptions(source=str(model.legacy), target=str(tmp_path / "pp3"), pp=3, verify=True, logits="never"))
    reshard(ReshardOptions(source=str(tmp_path / "pp3"), target=str(tmp_path / "dist"), verify=True, logits="never"))
    assert compare(model.hf, tmp_path / "dist")["equal"]


def test_torch_dist_is_written_anew_only_where_that_is_asked_for(model: SimpleNamespace, tmp_path: Path) -> None:
    options = {"source": str(model.dist), "target": str(tmp_path / "bf16"), "dtype": "bf16"}
    with pytest.raises(JobError, match="--format torch_dist"):
        reshard(ReshardOptions(**options))
    reshard(ReshardOptions(**options, format="torch_dist"))
    assert compare(model.hf, tmp_path / "bf16", dtype="bf16")["equal"]
    assert json.loads((tmp_path / "bf16" / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_target_inside_the_source_is_refused(model: SimpleNamespace) -> None:
    with pytest.raises(JobError, match="is inside the source"):
        to_megatron(HFToMegatronOptions(source=str(model.hf), target=str(model.hf / "inside")))


def test_a_config_that_differs_from_the_checkpoints_own_is_told(
    model: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((model.hf / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with caplog.at_level("WARNING"):
        words = {"source": str(model.dist), "target": str(tmp_path / "out"), "hf_config": str(tmp_path)}
        reshard(ReshardOptions(**words, tp=1, dry_run=True))
    assert "differs from the checkpoint's own config in rms_norm_eps" in caplog.text
