"""The documentation does what it says: commands are run, tables are fresh, links lead somewhere, the demo works."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from swift_dist.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]


def run(command: str | list[str], cwd: Path, timeout: float = 500, **env: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command) if isinstance(command, str) else command
    known = {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **known, **env}, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command}\nexit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """README's walk through a small job, command by command, in a folder of its own."""
    folder = tmp_path_factory.mktemp("readme")
    text = folder / "my-text"
    (text / "docs").mkdir(parents=True)
    sections = [part for page in PAGES for part in page.read_text(encoding="utf-8").split("\n\n")]
    for number, section in enumerate(sections):
        (text / "docs" / f"{number}.md").write_text(section, encoding="utf-8")
    (yaml,) = blocks(ROOT / "README.md", "yaml")
    (folder / "job.yaml").write_text(yaml, encoding="utf-8")
    (jsonl,) = blocks(ROOT / "README.md", "json")
    (folder / "rows.jsonl").write_text(jsonl, encoding="utf-8")
    outputs = {}
    for command in commands(ROOT / "README.md"):
        if command.startswith("swift-dist"):
            outputs[command] = run(command, folder).stdout
    return folder, outputs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_readme_commands_run_in_order_and_do_what_is_said(walk):
    folder, outputs = walk
    assert len(outputs) >= 10
    rows = [row for row in read_metrics(folder / "runs" / "mine" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["resumed_from"] for row in rows if "resumed_from" in row] == [20]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.4
    attempt = json.loads((folder / "runs" / "mine" / "manifest.json").read_text())["attempts"][0]
    assert len(attempt["hosts"]) == len(attempt["threads_per_rank"]) == 2 and min(attempt["threads_per_rank"]) > 0
    assert (folder / "my-model" / "model.safetensors").exists() and (folder / "my-model" / "tokenizer.json").exists()
    assert "30/30" in outputs["swift-dist runs list"]
    assert json.loads((folder / "runs" / "chat" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert (folder / "merged" / "model.safetensors").exists() and (folder / "merged" / "tokenizer.json").exists()
    assert len(read_metrics(folder / "runs" / "chat" / "metrics.jsonl")) == 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_of_the_other_pages(walk):
    """Those of docs/ on the run that README's walk left; `runs stop` needs a running one and has tests of its own."""
    folder, _ = walk
    (folder / "runs" / "my-run").symlink_to("mine")
    for page in PAGES[2:]:
        for command in commands(page):
            if command.startswith("swift-dist runs stop"):
                continue
            run(command, folder)


def test_every_command_is_of_a_kind_that_is_checked():
    """swift-dist: run by the tests above. make: the target exists. The rest by name."""
    for page in PAGES:
        for command in commands(page):
            first, *rest = shlex.split(command)
            if first == "make":
                assert subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, check=False).returncode == 0
            elif first == ".venv/bin/python":
                assert (ROOT / rest[0]).is_file()
            else:
                assert first == "swift-dist" or command == ".venv/bin/pre-commit install", command


def test_verbs_and_options_in_running_text_exist():
    """`swift-dist ...` in backquotes: the verb is one, and so is every option."""
    from swift_dist.cli import VERBS

    helps = {verb.name: run(["swift-dist", *verb.name.split(), "--help"], ROOT).stdout for verb in VERBS}
    for page in PAGES:
        for quoted in re.findall(r"`swift-dist ([^`]+)`", page.read_text(encoding="utf-8")):
            words = quoted.split()
            if words[0].startswith("<") or words[0] == "schema":
                continue
            name = next((n for n in (" ".join(words[:2]), words[0]) if n in helps), None)
            assert name is not None, f"{page.name}: swift-dist {quoted}"
            for option in (w for w in words if w.startswith("--") and w != "--help"):
                assert option in helps[name] or option == "--dry-run", f"{page.name}: swift-dist {quoted}: {option}"


def test_generated_tables_are_fresh():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run: .venv/bin/python docs/generate.py\n{done.stderr}"


def test_python_of_the_fine_tuning_page_is_the_job_that_it_says(monkeypatch, capsys):
    """All but the run, which tests of the command line make: the same function."""
    from swift_dist import job
    from swift_dist.config.applies import require_read
    from swift_dist.config.load import load_job

    (block,) = blocks(ROOT / "docs" / "finetune.md", "python")
    jobs, returned = [], dict.fromkeys(re.findall(r"``(\w+)``", job.run.__doc__ or ""), "a value")
    monkeypatch.setattr(job, "run", lambda wanted: jobs.append(wanted) or returned)
    exec(block, {})
    words = "--model my-model --tuner_type lora --lora_rank 16 --num_train_epochs 2 --dataset rows.jsonl"
    words += " --learning_rate 1e-4 --save_steps 100 --output runs/x"
    assert jobs == [load_job(None, words.split(), task="sft")]
    require_read(jobs[0])
    assert capsys.readouterr().out.count("a value") == 4


def test_links_and_named_files_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
        for path in re.findall(r"`((?:swift_dist|tests|docs|launchers|converters|kernels)/[\w./-]+)`", text):
            # rooms of later issues have no file yet; what is made by a command is named with it
            if path in ("docs/tables/golden.md", "swift_dist/tuners/", "objectives/"):
                continue
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_extras_that_the_documentation_names_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {e for page in PAGES for e in re.findall(r"(?:\.|swift-dist)\[(\w+)\]", page.read_text(encoding="utf-8"))}
    assert named and named <= set(extras)


def test_no_page_names_a_place_on_somebodys_machine():
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(?:root|home|work|tmp)/", page.read_text(encoding="utf-8")), page.name


def test_the_demo_corpus_is_real_large_and_the_same_every_time(tmp_path):
    targets = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for target in targets:
        run([sys.executable, str(ROOT / "docs" / "demo" / "corpus.py"), str(target)], tmp_path)
    assert targets[0].read_bytes() == targets[1].read_bytes()
    rows = [json.loads(line) for line in targets[0].read_text(encoding="utf-8").splitlines()]
    assert sum(len(row["text"].encode()) for row in rows) > 20e6
    assert len({row["text"] for row in rows}) == len(rows) > 1000
    assert {row["path"].split("/")[0] for row in rows} == {"python", "torch"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_script_goes_all_the_way_and_again(tmp_path):
    """The very script, with a smaller model, on a text that is quickly learnt: each word tells the next."""
    words = [f"w{(i * 7919) % 997}" for i in range(300)]
    rows = [{"text": " ".join((words * 5)[i : i + 1200])} for i in range(120)]
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = ["bash", str(ROOT / "docs" / "demo" / "run.sh"), str(demo)]
    settings = "--train.steps 24 --schedule.warmup_steps 5 --train.eval_interval 12 --train.eval_steps 4"
    smaller = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    short = settings.split() + [f"--model.config.{key}={value}" for key, value in smaller.items()]
    first = run([*script, *short], tmp_path, BIN=str(BIN)).stdout
    model, unigram = (float(re.search(rf"{name} +([\d.]+) nats", first)[1]) for name in ("loss ", "baseline"))
    assert unigram == pytest.approx(_unigram(demo), abs=2e-3)
    assert model < unigram - 0.3
    for name in ("loss.png", "model/model.safetensors", "run/metrics.jsonl"):
        assert (demo / name).stat().st_size > 0
    again = run([*script, *short], tmp_path, BIN=str(BIN)).stdout
    assert "done at step 24" in again and "train-tokenizer" not in again


def _unigram(demo: Path) -> float:
    """The baseline by another way: all validation tokens, straight from the files (uint16 below 65,500 ids)."""
    train, validation = (np.fromfile(demo / "data" / f"code_{name}.bin", np.uint16) for name in ("train", "validation"))
    counts = Counter(train.tolist())
    total = len(train) + 4096
    return -sum(math.log((counts[token] + 1) / total) for token in validation.tolist()) / len(validation)


def test_shell_scripts_parse():
    scripts = [ROOT / ".ci" / "run", ROOT / ".ci" / "install", *ROOT.glob("docs/**/*.sh"), *ROOT.glob("slurm/*.s*")]
    for script in scripts:
        run(["bash", "-n", str(script)], ROOT)


def test_install_without_a_python_says_what_to_do(tmp_path):
    command = ["bash", str(ROOT / ".ci" / "install")]
    settings = {**os.environ, "PYTHON": "no-such-python", "VENV": str(tmp_path / "venv")}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no Python of 3.11 to 3.13 found" in done.stderr and "PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()
