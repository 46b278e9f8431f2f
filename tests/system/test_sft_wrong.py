"""Wrong fine-tuning jobs and rows through the command line: exit 2 before anything starts, one message, its remedy."""

from __future__ import annotations

import json
import logging
import shlex
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chat_model
import pytest
import shared_wrong
from refusals import Wrong, assert_refused

from swift_dist import cli
from swift_dist.cluster.runtime import Cluster
from swift_dist.data.samples.unit_encoder import Recipe, UnitFacts, UnitId
from swift_dist.workers import pool

pytestmark = pytest.mark.timeout(300)
GOOD = [{"messages": row["messages"][:2]} for row in chat_model.conversations(6)]
TEXTS = [{"text": "the red moon is quiet.", "label": label} for label in (0, 1, 2, 3)]
LONG = {"messages": [{"role": "user", "content": "red " * 400}, {"role": "assistant", "content": "blue"}]}
NO_ROLE = {"messages": [{"content": "red"}, {"role": "assistant", "content": "blue"}]}
NO_ANSWER = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": ""}]}


def lines(rows: Sequence[Any]) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


MIXED = [GOOD[0], b'{"messages": [', NO_ROLE, NO_ANSWER, {"foo": 1}, b'{"messages": "\xff\xfe"}', LONG, *GOOD[1:]]
BAD = {
    2: "not JSON",
    3: "message 1 has no role",
    4: "an assistant message is empty",
    5: "no messages, only foo",
    6: "not UTF-8 (byte 14",
}
"""Lines of mixed.jsonl that cannot be used, and why; line 7 is sound, but too long."""
FILES = {
    "rows": GOOD,
    "pairs": chat_model.preferences(6),
    "mixed": MIXED,
    "columns": [{"foo": 1}, {"foo": 2}],
    "latin": ['{"text": "naïve"}'.encode("latin-1")] * 2,
    "empty": [],
    "classes": TEXTS,
    "lists": [{**row, "label": [0, row["label"] + 2]} for row in TEXTS],
    "numbers": [{**row, "label": row["label"] / 2} for row in TEXTS],
    "unlabelled": [{"text": row["text"]} for row in TEXTS],
    "some": [TEXTS[0], {"text": "blue"}],
    "words": [{"tokens": ["red", "moon"], "labels": [0, 7]}] * 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one without a chat template, rows of many kinds; a cache that the tests share."""
    folder = tmp_path_factory.mktemp("wrong")
    chat_model.save_chat_model(folder / "model")
    chat_model.save_chat_model(folder / "silent")
    (folder / "silent" / "chat_template.jinja").unlink()
    config = json.loads((folder / "model" / "config.json").read_text())
    for name, changes in shared_wrong.CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**config, **changes}))
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_bytes(lines(rows))
    return folder


@pytest.fixture
def folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_ADDRESS", "NPROC_PER_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for item in place.iterdir():
        (tmp_path / item.name).symlink_to(item)
    return tmp_path


def command(place: Path, verb: str, words: str) -> list[str]:
    """The job in `words`, with what they leave open."""
    given = shlex.split(words)
    base = {
        "--model": "model",
        "--max_length": "128",
        "--nproc_per_node": "1",
        "--cluster.accelerator": "cpu",
        "--train.global_batch_size": "2",
        "--train.micro_batch_size": "1",
        "--train.precision": "fp32",
        "--output": "out",
        **({} if verb == "pretrain" else {"--data.workers": "1", "--data.cache": str(place.parent / "cache")}),
    }
    return [verb, *given, *(word for key, value in base.items() if key not in given for word in (key, value))]


CLASSIFY = "--objective.name classification"
WRONG: dict[str, tuple[str, str, str, Sequence[str], str]] = {
    # keys that nothing would read
    "layout": ("sft", "--dataset rows.jsonl --tp 2", "parallel.tensor_model_parallel_size", ["sft"], "leave it out"),
    "rank": ("sft", "--dataset rows.jsonl --lora_rank 4", "tuner.lora.rank", ["tuner.name is full"], "tuner.name lora"),
    "rank of another": (
        "sft",
        "--dataset rows.jsonl --tuner_type qlora --lora_rank 4",
        "tuner.lora.rank",
        ["tuner.name is qlora"],
        "--tuner.qlora.rank",
    ),
    "tuner": ("pretrain", "--dataset x --tuner_type lora", "tuner.name", ["no effect on pretrain"], "sft"),
    "head": ("sft", "--dataset rows.jsonl --num_labels 3", "model.num_labels", ["causal_lm"], "classification"),
    "problem": ("sft", "--dataset rows.jsonl --model.problem_type regression", "model.problem_type", ["causal_lm"], ""),
    "reward": ("rlhf", "--dataset pairs.jsonl --rlhf_type reward --num_labels 3", "model.num_labels", ["reward"], ""),
    "shards": ("sft", "--dataset rows.jsonl --strategy.hybrid_shard_size 2", "strategy.hybrid_shard_size", [], "fsdp2"),
    "offload": (
        "sft",
        "--dataset rows.jsonl --strategy.cpu_offload true --deepspeed zero3",
        "strategy.cpu_offload",
        ["without strategy.fsdp"],
        "--fsdp fsdp2",
    ),
    "disk": (
        "sft",
        "--dataset rows.jsonl --strategy.nvme_path /tmp --deepspeed zero3",
        "strategy.nvme_path",
        ["zero3 offloads nothing"],
        "zero3_nvme",
    ),
    "disk without DeepSpeed": ("sft", "--dataset rows.jsonl --strategy.nvme_path x", "strategy.nvme_path", [], "zero3"),
    "best": ("sft", "--dataset rows.jsonl --checkpoint.keep_best true", "checkpoint.keep_best", [], "eval_interval"),
    "patience": (
        "rlhf",
        "--dataset pairs.jsonl --early_stop_interval 3",
        "train.early_stopping_patience",
        ["3 has no effect"],
        "train.eval_interval",
    ),
    "validation": (
        "sft",
        "--dataset rows.jsonl --val_dataset rows.jsonl",
        "data.validation",
        ["rows.jsonl", "no effect"],
        "train.eval_interval",
    ),
    "split": ("sft", "--dataset rows.jsonl --split_dataset_ratio 0.5", "data.split_ratio", ["0.5"], "eval_interval"),
    "recompute": ("sft", "--dataset rows.jsonl --train.recompute selective", "train.recompute", ["megatron"], "full"),
    "8 bits": (
        "sft",
        "--dataset rows.jsonl --tuner_type qlora --tuner.qlora.bits 8 --tuner.qlora.quant_type fp4",
        "tuner.qlora",
        ["quant_type is of 4 bits"],
        "",
    ),
    "momentum": ("sft", "--dataset rows.jsonl --optimizer.momentum 0.5", "optimizer.momentum", ["0.5"], "sgd"),
    "lowest rate": (
        "sft",
        "--dataset rows.jsonl --schedule.name constant --schedule.min_lr_ratio 0",
        "schedule.min_lr_ratio",
        ["no effect"],
        "decays",
    ),
    # what does not go together
    "frozen": ("sft", "--dataset rows.jsonl --tuner_type freeze", "tuner.freeze", ["no weight"], "ratio"),
    "rounded": (
        "sft",
        "--dataset rows.jsonl --tuner_type lora --checkpoint.export_dtype bf16",
        "checkpoint.export_dtype",
        ["lora saves an adapter"],
        "merge",
    ),
    "muon": (
        "sft",
        "--dataset rows.jsonl --optimizer.name muon --fsdp fsdp2",
        "optimizer.name",
        ["whole matrices"],
        "adamw",
    ),
    "short": (
        "sft",
        "--dataset rows.jsonl --tuner_type adalora --tuner.adalora.warmup_steps 3",
        "tuner.adalora.warmup_steps",
        ["leave none of"],
        "raise train.steps",
    ),
    "adapters": ("sft", "--dataset rows.jsonl --tuner_type lora,ia3", "tuner.name", ["lora and ia3"], "prepare_model"),
    "preferences": ("sft", "--dataset rows.jsonl --objective.name dpo", "objective.name", ["preferences"], "rlhf"),
    "no preferences": ("rlhf", "--dataset pairs.jsonl --objective.name causal_lm", "objective.name", [], "sft"),
    "reference": ("sft", "--dataset rows.jsonl --objective.reference model", "objective.reference", ["causal_lm"], ""),
    "reference of orpo": (
        "rlhf",
        "--dataset pairs.jsonl --rlhf_type orpo --objective.reference model",
        "objective.reference",
        ["orpo needs no reference"],
        "leave it out",
    ),
    "galore": ("sft", "--dataset rows.jsonl --tuner_type galore --fsdp fsdp2", "tuner.name", ["fsdp2"], "ddp"),
    "unknown tuner": ("sft", "--dataset rows.jsonl --tuner_type loraa", "tuner.name", ["did you mean lora"], "lora"),
    "strategies": ("sft", "--dataset rows.jsonl --deepspeed zero3 --fsdp fsdp2", "strategy", ["not both"], ""),
    "preset": ("sft", "--dataset rows.jsonl --deepspeed zero9", "strategy.deepspeed", ["'zero9'"], "zero3"),
    "packed classes": ("sft", f"--dataset classes.jsonl {CLASSIFY} --packing true", "data.packing", ["head"], "leave"),
    "unpadded": (
        "sft",
        "--dataset rows.jsonl --padding_free true --attn_impl sdpa",
        "data.padding_free",
        ["sdpa does not keep"],
        "leave",
    ),
    "packed pairs": ("rlhf", "--dataset pairs.jsonl --packing true", "data.packing", ["pair"], "leave"),
    "engine": ("sft", "--dataset rows.jsonl --engine megatron", "engine", ["sft"], "--engine hf"),
    # sequences that ranks share
    **{f"shared, {name}": case for name, case in shared_wrong.CASES.items()},
    # rows
    "no data": ("sft", "", "data.train", ["no training data"], "--dataset"),
    "missing": ("sft", "--dataset nowhere.jsonl", "data.train", ["nowhere.jsonl does not exist"], "check the path"),
    "empty": ("sft", "--dataset empty.jsonl", "data.train", ["empty.jsonl"], "not empty"),
    "columns": ("sft", "--dataset columns.jsonl", "data.train", ["columns.jsonl:1: ", "foo"], "data.columns"),
    "encoding": ("sft", "--dataset latin.jsonl", "data.train", ["latin.jsonl:1: not UTF-8"], "data.format"),
    "format": ("sft", "--dataset rows.jsonl --data.format alpaca", "data.train", ["rows.jsonl:1: "], "data.format"),
    "unknown format": (
        "sft",
        "--dataset rows.jsonl --data.format mesages",
        "data.format",
        ["did you mean messages"],
        "auto",
    ),
    "bad rows": (
        "sft",
        "--dataset mixed.jsonl --data.bad_rows stop",
        "data.train",
        ["5 rows of", *(f"mixed.jsonl:{line}: " for line in BAD), *BAD.values()],
        "data.bad_rows: skip",
    ),
    "too long": ("sft", "--dataset rows.jsonl --max_length 6", "data.train", ["rows.jsonl:1: too long"], "truncation"),
    "template": ("sft", "--dataset rows.jsonl --model silent", "model", ["silent has no chat template"], "jinja"),
    "no pairs": ("rlhf", "--dataset rows.jsonl", "data.train", ["rows.jsonl:1: the row is no preference pair"], ""),
    "kto": ("rlhf", "--dataset rows.jsonl --rlhf_type kto", "data.train", ["rows.jsonl:1: it has no label"], ""),
    "unlabelled": ("sft", f"--dataset unlabelled.jsonl {CLASSIFY}", "data.train", ["jsonl:1: it has no label"], ""),
    "some labels": (
        "sft",
        f"--dataset some.jsonl {CLASSIFY} --data.bad_rows stop",
        "data.train",
        ["some.jsonl:2: no label"],
        "skip",
    ),
    # what needs all rows, where they are not waited for
    "stream": ("sft", "--dataset rows.jsonl --streaming true", "train.steps", ["all rows"], "--train.steps"),
    "stream of epochs": ("sft", "--dataset rows.jsonl --streaming true --train.epochs 2", "train.epochs", [], "steps"),
    "split stream": (
        "sft",
        "--dataset rows.jsonl --streaming true --max_steps 5 --eval_steps 2 --split_dataset_ratio 0.1",
        "data.split_ratio",
        ["all rows"],
        "data.validation",
    ),
    "stream without evaluation": (
        "sft",
        "--dataset rows.jsonl --streaming true --max_steps 5 --eval_steps 2",
        "data.validation",
        ["no dataset given"],
        "data.validation",
    ),
    "stream too long": (
        "sft",
        "--dataset rows.jsonl --streaming true --max_steps 5 --max_length 6",
        "data.train",
        ["rows.jsonl gives no sample", "rows.jsonl:1: too long"],
        "truncation",
    ),
    "stream of classes": (
        "sft",
        f"--dataset classes.jsonl --streaming true --max_steps 5 {CLASSIFY}",
        "data.train",
        ["class 3", "2 outputs"],
        "--num_labels 4",
    ),
    # labels
    "classes": ("sft", f"--dataset classes.jsonl {CLASSIFY}", "data.train", ["class 3", "2 outputs"], "--num_labels 4"),
    "lists": ("sft", f"--dataset lists.jsonl {CLASSIFY} --num_labels 4", "data.train", ["class 5"], "--num_labels 6"),
    "numbers": ("sft", f"--dataset numbers.jsonl {CLASSIFY}", "model.num_labels", ["one number"], "--num_labels 1"),
    "words": (
        "sft",
        "--dataset words.jsonl --objective.name token_classification --num_labels 7",
        "data.train",
        ["words.jsonl has class 7"],
        "--num_labels 8",
    ),
    "several classes": (
        "sft",
        f"--dataset classes.jsonl {CLASSIFY} --num_labels 4 --model.problem_type multi_label_classification",
        "model.problem_type",
        ["each row", "has a class"],
        "single_label_classification",
    ),
}


SEEN_BEFORE_ENCODING = (
    *("packed pairs", "no data", "missing", "empty", "columns", "encoding", "format", "unknown format", "no pairs"),
    *("kto", "unlabelled", *(f"shared, {name}" for name in shared_wrong.CASES)),
)
"""Of those about rows and shared sequences, what a dry run refuses, too."""


class Inline:
    """A worker that encodes in this process: another one takes seconds to import what it needs."""

    def __init__(self, recipe: Recipe) -> None:
        self._encode, self._waiting = recipe.start(), deque[UnitId]()

    def submit(self, unit: UnitId) -> None:
        self._waiting.append(unit)

    def result(self) -> UnitFacts:
        return self._encode(self._waiting.popleft())

    def close(self) -> None: ...


@pytest.mark.parametrize("name", WRONG)
def test_refused(
    place: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name != "template":  # what a worker process refuses comes through
        monkeypatch.setattr(pool, "LocalWorker", Inline)
    verb, words, key, says, remedy = WRONG[name]
    assert_refused(capsys, folder, command(place, verb, words), Wrong(name, key, says, remedy))
    if name in SEEN_BEFORE_ENCODING:
        assert_refused(capsys, folder, [*command(place, verb, words), "--dry-run"], Wrong(name, key, says, remedy))


class StartedError(Exception):
    """The job went past everything that can refuse it."""


def test_bad_rows_are_counted_and_named(
    place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By default they are left out, and a file beside the samples lists all of them."""

    def start(*_: object) -> None:
        raise StartedError

    monkeypatch.setattr(Cluster, "start", start)
    caplog.set_level(logging.INFO)
    with pytest.raises(StartedError):
        cli.main(command(place, "sft", "--dataset mixed.jsonl"))
    assert f"{len(MIXED)} rows (6 left out: " in caplog.text and f"{len(GOOD)} samples" in caplog.text
    assert "5 unusable" in caplog.text and "1 too long" in caplog.text
    assert all(f"mixed.jsonl:{line}: " in caplog.text and reason in caplog.text for line, reason in BAD.items())
    (listed,) = [p for p in place.parent.glob("cache/*/bad_rows.jsonl") if "mixed.jsonl:7" in p.read_text()]
    found = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [Path(row["row"]).name for row in found] == [f"mixed.jsonl:{line}" for line in (*BAD, 7)]
    assert [row["kind"] for row in found] == ["unusable"] * 5 + ["left out"]
    assert not (folder / "out").exists()
