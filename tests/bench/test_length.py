"""`swift-dist bench length` through the command line: tries of a made-up memory, then some of the engine's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import psutil
import pytest

from swift_dist import cli
from swift_dist.bench import trying
from swift_dist.bench.plan import FEATURES, chosen_features, parse_memory, settings_of, shapes
from swift_dist.bench.search import Try
from swift_dist.errors import JobError, RunError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": True,
}
PER_TOKEN = {"base": 300_000, "recompute": 200_000, "tiled_loss": 50_000, "tiled_mlp": 30_000}
FLOOR = 400 * 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def made_up(monkeypatch):
    """Tries that take a floor and so many bytes a token; returns the list of those made."""
    made = []

    def attempt(series, length, logs, timeout):
        made.append((series.sharing, series.features, length))
        peak = FLOOR + length * PER_TOKEN[series.features] // series.sharing
        if peak > series.memory:
            return Try(length, False, None, None, "it was too much")
        return Try(length, True, peak, length / 1000)

    monkeypatch.setattr(trying, "attempt", attempt)
    return made


def call(capsys, *words):
    code = cli.main(["bench", "length", *map(str, words), "--accelerator", "cpu", "--json"])
    return code, json.loads(capsys.readouterr().out)


def longest(features, sharing, memory, shortest=1024):
    """By the formula of `made_up`, on the list of lengths."""
    limit = (memory - FLOOR) * sharing // PER_TOKEN[features]
    if limit < shortest:
        return None
    base = shortest
    while base * 2 <= limit:
        base *= 2
    return base + base * ((limit - base) * 8 // base) // 8


def test_finds_each_longest_length_and_writes_it_down(capsys, tmp_path, model, made_up):
    out = tmp_path / "a" / "out"
    words = ("--model", model, "--sequence_parallel_size", "1,2,4", "--memory", "2GiB", "--output", out)
    code, result = call(capsys, *words)
    assert code == 0 and result["complete"]
    found = {(row["sharing"], row["features"]): row for row in result["rows"]}
    assert list(found) == [(n, name) for n in (1, 2, 4) for name in PER_TOKEN]
    for (sharing, name), row in found.items():
        assert row["longest"] == longest(name, sharing, 2 * 2**30)
        assert row["ended_by"] == "memory" and row["longest"] < row["too_long"] <= row["longest"] * 9 / 8
        assert row["ranks"] == sharing and row["tokens_per_second"] == pytest.approx(1000)
        assert row["peak_gib"] == pytest.approx((FLOOR + row["longest"] * PER_TOKEN[name] / sharing) / 2**30, abs=1e-3)
    assert len(made_up) == len(set(made_up)) <= 6 * len(found)

    assert json.loads((out / "length.json").read_text()) == {k: v for k, v in result.items() if k != "output"}
    table = [line.split("|") for line in (out / "length.md").read_text().splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line] for line in table]
    assert [(int(c[1]), c[2].removeprefix("+ "), int(c[3].replace(",", ""))) for c in cells] == [
        (*key, row["longest"]) for key, row in found.items()
    ]
    texts = [t.text for t in xml.etree.ElementTree.parse(out / "length.svg").iter() if t.text]
    assert (out / "length.png").read_bytes().startswith(b"\x89PNG") and texts
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]

    made_up.clear()
    code, again = call(capsys, *words)
    assert code == 0 and again["rows"] == result["rows"] and made_up == []


def test_goes_on_after_an_interrupt_without_trying_anything_twice(capsys, tmp_path, model, made_up, monkeypatch):
    words = ("--model", model, "--memory", "2GiB", "--output", tmp_path)
    attempt, allowed = trying.attempt, 7

    def interrupted(*arguments):
        if len(made_up) == allowed:
            raise KeyboardInterrupt
        return attempt(*arguments)

    monkeypatch.setattr(trying, "attempt", interrupted)
    code, result = call(capsys, *words)
    assert code == 130 and result["error"]["kind"] == "interrupted"
    assert "the same command goes on" in result["error"]["message"]
    kept = json.loads((tmp_path / "length.json").read_text())
    assert not kept["complete"] and 0 < len(kept["rows"]) < len(PER_TOKEN)
    assert "the same command goes on" in (tmp_path / "length.md").read_text()
    with (tmp_path / "tries.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')  # as a kill leaves it
    monkeypatch.setattr(trying, "attempt", attempt)
    code, result = call(capsys, *words)
    assert code == 0 and [row["longest"] for row in result["rows"]] == [longest(n, 1, 2 * 2**30) for n in PER_TOKEN]
    assert len(made_up) == len(set(made_up))
    made = len(made_up)
    assert call(capsys, *words)[0] == 0 and len(made_up) == made  # what followed the torn line is known, too


def test_other_memory_or_another_model_is_another_try(capsys, tmp_path, model, made_up):
    words = ("--features", "base", "--output", tmp_path)
    call(capsys, "--model", model, "--memory", "2GiB", *words)
    before = set(made_up)
    _, result = call(capsys, "--model", model, "--memory", "1GiB", *words)
    assert set(made_up) > before or len(made_up) > len(before)
    assert result["rows"][0]["longest"] == longest("base", 1, 2**30)
    count = len(made_up)
    _, result = call(capsys, "--model", "qwen3-0.6b", "--memory", "2GiB", *words)  # a recipe's
    assert len(made_up) > count and result["model"] == "qwen3-0.6b"


def test_a_try_without_time_is_made_again_with_more(capsys, tmp_path, model, monkeypatch):
    asked = []

    def attempt(series, length, logs, timeout):
        asked.append(length)
        slow = length > timeout
        return Try(length, not slow, None if slow else 2**20, 1.0, "slow" if slow else "", timed_out=slow)

    monkeypatch.setattr(trying, "attempt", attempt)
    words = ("--model", model, "--memory", "1GiB", "--features", "base", "--max_length", 8192, "--output", tmp_path)
    _, result = call(capsys, *words, "--timeout", 2048)
    assert result["rows"][0]["longest"] == 2048 and result["rows"][0]["ended_by"] == "time"
    _, result = call(capsys, *words, "--timeout", 9000)
    assert result["rows"][0]["longest"] == 8192 and result["rows"][0]["ended_by"] == "max_length"
    assert asked.count(1024) == 1


def test_memory_too_small_for_the_shortest(capsys, tmp_path, model, made_up):
    code, result = call(capsys, "--model", model, "--memory", "401MiB", "--output", tmp_path)
    assert code == 1 and "not even 1,024 tokens fit into 401MiB: it was too much" in result["error"]["message"]
    assert "| none |" in (tmp_path / "length.md").read_text() and not (tmp_path / "length.svg").exists()


def test_a_dry_run_starts_and_writes_nothing(capsys, tmp_path, model, made_up):
    words = ("--model", model, "--memory", "2GiB", "--sequence_parallel_size", "2", "--output", tmp_path / "x")
    code, plan = call(capsys, *words, "--dry-run", "--features", "base,tiled_loss")
    assert code == 0 and made_up == [] and not (tmp_path / "x").exists()
    base, tiled = (each["command"] for each in plan["series"])
    assert "--parallel.context_parallel_size=2" in base and "--train.recompute" not in base
    assert "--train.recompute=full" in tiled and "--train.tiled_loss=true" in tiled
    code, plan = call(capsys, "--model", "llama-3.1-8b", "--memory", "2GiB", "--dry-run", "--tuner_type", "lora")
    assert code == 0 and "--tuner.name" in plan["series"][0]["command"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("--memory", "80"), "memory"),
        (("--memory", "80Gig"), "memory"),
        (("--memory", "0GiB"), "memory"),
        (("--memory", "9000TiB"), "memory"),
        ((), "memory"),
        (("--memory", "1GiB", "--features", "base,flash"), "features"),
        (("--memory", "1GiB", "--sequence_parallel_size", "0"), "sequence_parallel_size"),
        (
            ("--memory", "1GiB", "--sequence_parallel_size", "2,3", "--nproc_per_node", "4"),
            "parallel.context_parallel_",
        ),
        (("--memory", "1GiB", "--max_length", "512"), "max_length"),
        (("--memory", "1GiB", "--fsdp", "fsdp2", "--deepspeed", "zero3"), "strategy"),
        (("--memory", "1GiB", "--tuner_type", "lorra"), "tuner.name"),
        (("--memory", "1GiB", "--output", "/proc/none"), "output"),
        (("--memory", "1GiB", "--steps", "1"), "steps"),
        (("--memory", "1GiB", "--model", "./absent"), "model.path"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(capsys, tmp_path, model, made_up, words, key):
    if "--output" not in words:
        words = (*words, "--output", tmp_path / "out")
    if "--model" not in words:
        words = (*words, "--model", model)
    code, result = call(capsys, *words)
    assert code == 2 and result["error"]["key"].startswith(key) and result["error"]["remedy"]
    assert made_up == [] and not (tmp_path / "out").exists()


def test_a_job_file_gives_strategy_and_tuner(capsys, tmp_path, model, made_up):
    path = tmp_path / "job.yaml"
    job = {
        "task": "sft",
        "model": {"path": str(model)},
        "data": {"train": ["absent.jsonl"], "sequence_length": 77},
        "train": {"steps": 1000, "micro_batch_size": 4, "global_batch_size": 64, "precision": "fp32"},
        "schedule": {"warmup_steps": 100},
        "tuner": {"name": "lora", "lora": {"rank": 3}},
        "strategy": {"fsdp": "fsdp2"},
    }
    path.write_text(json.dumps(job))
    code, plan = call(capsys, "--job", path, "--memory", "1GiB", "--features", "base", "--dry-run")
    command = plan["series"][0]["command"]
    assert code == 0 and "--strategy.fsdp=fsdp2" in command and "--tuner.lora.rank=3" in command
    assert "micro_batch_size" not in command and "steps" not in command
    path.write_text(json.dumps({**job, "task": "rlhf", "tuner": {}}))
    assert call(capsys, "--job", path, "--memory", "1GiB", "--dry-run")[1]["error"]["key"] == "task"


def test_what_people_see(capsys, tmp_path, model, made_up, caplog):
    words = [
        "bench",
        "length",
        "--model",
        str(model),
        "--memory",
        "2GiB",
        "--accelerator",
        "cpu",
        "--nproc_per_node",
        "4",
    ]
    words += ["--sequence_parallel_size", "2", "--output", str(tmp_path)]
    caplog.set_level("INFO")
    assert cli.main([*words, "--dry-run"]) == 0
    assert "base, 2 of 4 ranks: swift-dist sft" in capsys.readouterr().out
    assert cli.main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:-1] == (tmp_path / "length.md").read_text().splitlines()[-len(shown) + 1 :]
    first = longest("base", 2, 2 * 2**30)
    assert f"| 2 of 4 | base | {first:,} | 1.00 | {first / 1000:.3g} | 2,000 |" in shown[2]
    assert shown[-1].startswith(str(tmp_path))
    assert "base, 2 ranks a sequence: 1,024 tokens fit: 0.53 GiB, 1.02 s a step" in caplog.messages
    assert sum("do not fit: it was too much" in message for message in caplog.messages) >= len(PER_TOKEN)


def test_attention_that_cannot_be_shared(capsys, tmp_path, made_up):
    config = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 32, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("--model", tmp_path, "--memory", "1GiB", "--sequence_parallel_size", 2, "--output", tmp_path / "out")
    code, result = call(capsys, *words)
    assert code == 2 and result["error"]["key"] == "parallel.context_parallel_size" and made_up == []


def test_what_a_model_does_not_take_is_left_out_and_said(capsys, tmp_path, model, made_up, monkeypatch):
    attempt = trying.attempt

    def refusing(series, *rest):
        if series.job.train.tiled_loss:
            raise JobError("train.tiled_loss", "it has no plain output layer", "leave it out")
        return attempt(series, *rest)

    monkeypatch.setattr(trying, "attempt", refusing)
    words = ("--model", model, "--memory", "2GiB", "--output", tmp_path)
    code, result = call(capsys, *words, "--sequence_parallel_size", "1,2")
    assert code == 0 and result["complete"] and result["left_out"] == {"tiled_loss": "it has no plain output layer"}
    found = {(row["sharing"], row["features"]): row for row in result["rows"]}
    assert list(found) == [(n, name) for n in (1, 2) for name in ("base", "recompute", "tiled_mlp")]
    for row in found.values():
        assert row["longest"] == longest(row["features"], row["sharing"], 2 * 2**30)
        assert "--train.tiled_loss=false" in row["command"]
    assert "Without tiled_loss: it has no plain output layer." in (tmp_path / "length.md").read_text()
    code, result = call(capsys, *words, "--features", "all")
    assert code == 0 and [row["features"] for row in result["rows"]] == ["tiled_mlp"]
    code, result = call(capsys, *words, "--features", "base,tiled_loss")
    assert code == 2 and result["error"]["key"] == "train.tiled_loss"


def test_features_add_up():
    assert chosen_features((), on_cuda=True) == ("base", *FEATURES)
    assert "offload_activations" not in chosen_features((), on_cuda=False)  # it saves nothing there
    assert chosen_features(("offload_activations", "base"), on_cuda=False) == ("base", "offload_activations")
    assert chosen_features(("all", "base"), on_cuda=True) == ("base", FEATURES[-1])
    assert settings_of("base") == {name: "none" if name == "recompute" else False for name in FEATURES}
    for index, name in enumerate(FEATURES):
        assert [value not in ("none", False) for value in settings_of(name).values()] == [
            place <= index for place in range(len(FEATURES))
        ]


def test_sizes_have_units():
    assert parse_memory("80GiB") == 80 * 2**30 and parse_memory(" 1.5 GB") == 1_500_000_000
    for text in ("80", "GiB", "80gib", "-1GiB", "1e9GiB", "80GiB!"):
        with pytest.raises(JobError, match="no size"):
            parse_memory(text)
    assert {"llama-3.1-8b", "qwen3-8b"} <= set(shapes())


class Ended:
    features, sharing, memory, on_cuda = "base", 2, 2**30, False


def judged(codes, *ends):
    return trying._judged(Ended(), 64, list(codes), list(ends), Path("logs"))


def test_what_ranks_say_decides_what_a_try_came_to():
    lost = {"kind": "communication", "message": "Connection closed by peer"}
    fits = {"kind": "result", "seconds": [9.0, 2.0, 4.0], "peak_bytes": 2**29}
    slower = {"kind": "result", "seconds": [9.0, 3.0, 1.0], "peak_bytes": 2**28}
    assert judged([0, 0], fits, slower) == Try(64, True, 2**29, 3.5)  # a step is as long as on its slowest rank
    assert not judged([0, 0], fits, {**slower, "peak_bytes": 2**30 + 1}).fits
    memory = {"kind": "memory", "message": "CUDA out of memory. Tried to allocate 2 GiB"}
    assert judged([1, 1], lost, memory) == Try(64, False, None, None, memory["message"])
    killed = judged([1, -signal.SIGKILL], lost, None)
    assert not killed.fits and "rank 1 was killed" in killed.reason
    with pytest.raises(JobError, match="softcap"):
        judged([1, 1], {"kind": "job", "key": "k", "message": "softcap", "remedy": "r"}, lost)
    for codes, ends in (
        ([1, 1], ({"kind": "error", "message": "ValueError: no"}, lost)),
        ([-signal.SIGSEGV, 1], (None, lost)),
        ([1, None], (lost, None)),
    ):  # nothing of these says that the length is too long
        with pytest.raises(RunError, match="64 tokens"):
            judged(codes, *ends)


def test_allocators_that_say_no():
    import torch

    from swift_dist.bench.rank import is_out_of_memory

    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    try:
        try:
            raise MemoryError
        except MemoryError as error:
            raise RuntimeError("backward failed") from error
    except RuntimeError as error:
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


def bench(model, output, *words):
    command = [
        sys.executable,
        "-m",
        "swift_dist.cli",
        "bench",
        "length",
        "--model",
        str(model),
        "--output",
        str(output),
    ]
    command += ["--accelerator", "cpu", "--precision", "fp32", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(process):
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "swift_dist.bench.rank" in " ".join(child.cmdline())]


def test_two_ranks_share_a_sequence_in_the_engine(model, tmp_path):
    words = ("--sequence_parallel_size", 2, "--memory", "2GiB", "--features", "all", "--min_length", 96)
    process = bench(model, tmp_path, *words, "--max_length", 96, "--json")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    (row,) = json.loads(out)["rows"]
    assert (row["longest"], row["ended_by"], row["tries"]) == (96, "max_length", 1)
    assert row["step_seconds"] > 0 and 0.1 < row["peak_gib"] < 2
    assert "96 tokens fit" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_command(model, tmp_path, number):
    process = bench(model, tmp_path, "--sequence_parallel_size", 2, "--memory", "2GiB", "--features", "base")
    deadline = time.monotonic() + 60
    while len(ranks := ranks_of(process)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(ranks) == 2
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    psutil.wait_procs(ranks, timeout=20)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


def test_a_rank_that_takes_too_much_ends_the_try_at_once(model, tmp_path):
    process = bench(model, tmp_path, "--memory", "150MiB", "--features", "base")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and "not even 1,024 tokens fit into 150MiB: rank 0 took 0.1" in err


@pytest.mark.table
@pytest.mark.timeout(1800)
def test_the_whole_search_in_the_engine(tmp_path):
    """Logits over 16,384 words take what memory there is, and half of it where two ranks share them."""
    config = {**CONFIG, "vocab_size": 16384, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("--sequence_parallel_size", "1,2", "--memory", "1GiB", "--features", "base", "--min_length", 512, "--json")
    process = bench(tmp_path, tmp_path / "out", *words)
    out, err = process.communicate(timeout=1500)
    assert process.returncode == 0, err
    one, two = json.loads(out)["rows"]
    for row in (one, two):
        assert row["ended_by"] == "memory" and row["tries"] >= 3 and 0.8 < row["peak_gib"] <= 1
        assert row["longest"] < row["too_long"] <= row["longest"] * 9 / 8
    assert 1.5 < two["longest"] / one["longest"] < 2.5
    again = bench(tmp_path, tmp_path / "out", *words)
    assert json.loads(again.communicate(timeout=100)[0])["rows"] == [one, two]
