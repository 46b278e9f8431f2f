"""How runs end: what their exports compute, when they stop early, which checkpoints stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import chat_model
import pytest
import sft_ranks
import torch
from safetensors.torch import load_file
from sft_runs import LORA, Runs
from sft_runs import RANKS as SFT_RANKS
from test_runs import STRATEGIES

from swift_dist.advice import already_done
from swift_dist.config import JobConfig
from swift_dist.errors import JobError
from swift_dist.job import render_result
from swift_dist.resolve import resolve
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.outcome import read_outcome
from swift_dist.runs.verbs import ShowOptions, render_show, show_run

RANKS = Path(__file__).with_name("end_ranks.py")


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, tmp_path_factory.mktemp("ends"))


@pytest.mark.parametrize(("tuner", "strategy"), [("full", "fsdp2"), ("lora", "zero3")])
def test_exports_compute_what_the_trained_model_did(runs: Runs, tmp_path: Path, tuner: str, strategy: str) -> None:
    """Every bit of the logits, after transformers or PEFT loaded the folder; merged, to rounding."""
    adapter = {"tuner": {**LORA, "trainable": ["lm_head"]}} if tuner == "lora" else {}
    payload = runs.resolved(runs.job(**STRATEGIES[strategy], **adapter, train={"steps": 3}), 2, tmp_path)
    merged = str(tmp_path / "merged") if tuner == "lora" else None
    arguments = {"payload": payload, "run_dir": str(tmp_path), "base": runs.model, "merged": merged}
    found = runs.gang.run(RANKS, "train_and_reload", 2, **arguments)[0]
    assert found["learnt"] > 1e-2
    assert found["reloaded"] == 0
    assert (Path(found["export"]) / "chat_template.jinja").exists()
    if merged:
        config = json.loads((Path(found["export"]) / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == runs.model
        assert found["merged"] < 1e-4 and (tmp_path / "merged" / "chat_template.jinja").exists()


def evaluations(folder: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in sft_ranks.rows(folder) if "eval_loss" in row}


def test_an_evaluation_is_the_mean_over_all_tokens(runs: Runs) -> None:
    """Of three global batches on two ranks, the last of them not full; beside a plain loop over whole sequences."""
    rows = [{"messages": row["messages"][:2]} for row in chat_model.conversations(21, seed=5)]
    data = {"train": [str(chat_model.save_rows(runs.folder / "short.jsonl", rows))]}
    train = {"steps": 1, "eval_interval": 1, "eval_steps": 3}
    folder, _ = runs.run(runs.job(data={**data, "validation": data["train"]}, train=train, optimizer={"lr": 1e-12}), 2)
    whole = runs.sequences(runs.job(data=data, train={"global_batch_size": 21, "micro_batch_size": 21}))[:1]
    assert len(whole[0]) == 21
    common = {"model": runs.model, "batches": whole, "lr": 1.0, "seed": 3, "adapter": None}
    ((expected, _),) = runs.gang.run(SFT_RANKS, "reference", 1, **common)[0]
    assert evaluations(folder) == {1: pytest.approx(expected, rel=1e-5)}


def require_known_end(folder: Path, job: JobConfig, result: dict[str, Any]) -> None:
    """Whoever drives or looks at a run that stopped early hears why; the same command does not start it again."""
    run = RunFolder(folder)
    run.begin(job)
    run.end("done", **{key: result[key] for key in ("step", "message", "export_step")})
    again = already_done(run, resolve(job, nproc_per_node=1, on_cuda=False, output=str(folder)))
    assert again and again["step"] == 3 and read_outcome(folder)["export_step"] == again["export_step"] == 1
    assert f"\n{result['message']}\noutput: " in render_result({**again, "seconds": 1.0})
    assert f"state        done: {result['message']}\n" in render_show(show_run(ShowOptions(run=str(folder))))
    patient = job.model_copy(update={"train": job.train.model_copy(update={"early_stopping_patience": 3})})
    assert already_done(run, resolve(patient, nproc_per_node=1, on_cuda=False, output=str(folder))) is None


def test_patience_and_the_best_checkpoint_count_over_a_resume(runs: Runs) -> None:
    """What is learnt makes the validation's answers, in letters of their own, less likely with every step."""
    strange = [{"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "QZ XJ VK %&"}]}]
    validation = [str(chat_model.save_rows(runs.folder / "strange.jsonl", strange * 8))]
    train = {"steps": 8, "eval_interval": 1, "eval_steps": 1, "early_stopping_patience": 2}
    job = runs.job(data={"validation": validation}, train=train, checkpoint={"keep_best": True, "keep": 1})
    folder, (result,) = runs.run(job, 1, stop_after=2)
    assert result["stopped"] and result["step"] == 2
    _, (result, _) = runs.run(job, 2, folder)
    losses = evaluations(folder)
    assert list(losses) == [1, 2, 3] and losses[1] < losses[2] < losses[3]
    assert result["step"] == 3 and not result["stopped"] and Path(result["export"]).name == "model"
    assert {path.name for path in (folder / "checkpoints").glob("step_*")} == {"step_1", "step_3"}

    best = runs.new_folder()
    shutil.copytree(folder / "checkpoints" / "step_1", best / "checkpoints" / "step_1")
    _, (kept,) = runs.run(runs.job(train={"steps": 1}), 1, best)
    kept = load_file(Path(kept["export"]) / "model.safetensors")
    exported = load_file(Path(result["export"]) / "model.safetensors")
    shutil.rmtree(result["export"])
    _, (again,) = runs.run(job, 1, folder)  # nothing is left to train
    for found, weights in ((result, exported), (again, load_file(Path(again["export"]) / "model.safetensors"))):
        assert found["export_step"] == 1 and all(torch.equal(kept[name], weights[name]) for name in kept)
        assert found["message"] == (
            f"stopped early: 2 evaluations without an eval_loss below {losses[1]:.4f}, that of step 1; "
            "the exported weights are of step 1, the best evaluated"
        )
    require_known_end(folder, job, result)

    more = {**train, "steps": 4}
    job = runs.job(data={"validation": validation}, train=more, checkpoint={"load": str(folder)})
    _, (result,) = runs.run(job, 1)
    assert result["step"] == 4, "another run's patience is its own"


def test_a_classifiers_folder_says_what_its_head_is(runs: Runs) -> None:
    """The number of outputs and their names come from config.json; what the labels are goes into the export's, whose
    weights are in the dtype that is asked for."""
    folder = runs.folder / "classifier"
    chat_model.save_chat_model(folder)
    names = {"0": "quiet", "1": "loud", "2": "bright"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"messages": row["messages"][:1], "label": [0, 2]} for row in chat_model.preferences(8)]
    data = {"train": [str(chat_model.save_rows(runs.folder / "several.jsonl", rows))]}
    common = {"objective": {"name": "classification"}, "data": data, "model": {"path": str(folder)}}
    job = runs.job(**common, train={"steps": 1}, checkpoint={"export_dtype": "bf16"})
    _, (result,) = runs.run(job, 1)
    exported = json.loads((Path(result["export"]) / "config.json").read_text())
    assert exported["id2label"] == names and exported["problem_type"] == "multi_label_classification"
    assert exported["architectures"] == ["LlamaForSequenceClassification"]
    assert exported["dtype"] == "bfloat16"
    tensors = load_file(Path(result["export"]) / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "regression"}))
    with pytest.raises(JobError, match=r"model.problem_type: regression, but each row"):
        runs.resolved(job, 1, runs.folder / "none")
