"""`swift-dist infer` and the Python API with real engines of a tiny model; what is killed is a process."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_model
import pytest
from process_tree import gone_within
from toy_engine import save_toy_model

import swift_dist
from swift_dist.data.rows._formats import formats
from swift_dist.data.rows.prompts import read_prompt
from swift_dist.errors import JobError, RunError
from swift_dist.serving.families import template_of
from swift_dist.serving.inference.pool import EnginePool
from swift_dist.serving.inference.replicas import RemoteReplica
from swift_dist.serving.options import EngineOptions

MAIN = [sys.executable, "-c", "from swift_dist.cli import main; raise SystemExit(main())", "infer"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
ENGINE = {"infer_backend": "hf", "dtype": "fp32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model.save_chat_model(
        tmp_path_factory.mktemp("m") / "tiny", initializer_range=0.1, max_position_embeddings=4096
    )


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[swift_dist.Engine]:
    with swift_dist.Engine(str(model), **ENGINE) as engine:
        yield engine


def run(*words: str | Path, **arguments: Any) -> subprocess.CompletedProcess[str]:
    words_given = [*MAIN, *map(str, words)]
    return subprocess.run(words_given, capture_output=True, text=True, env=ENV, timeout=240, **arguments)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def greedy(model: Path, messages: list[dict[str, str]], count: int) -> str:
    """transformers' own tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = plain.generate(**asked, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_engine_object(engine: swift_dist.Engine, model: Path) -> None:
    asked = [{"role": "user", "content": "the moon"}]
    answer = engine.chat(asked, max_tokens=6, temperature=0, logprobs=True)
    assert answer.choices[0].message.content == greedy(model, asked, 6)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    assert "".join(engine.stream("the moon", max_tokens=6, temperature=0)) == answer.choices[0].message.content
    many = engine.batch(["the moon", asked, "silver"], max_tokens=6, temperature=0, concurrency=2)
    assert [one.choices[0].message.content for one in many[:2]] == [answer.choices[0].message.content] * 2
    assert engine.complete("the red", max_tokens=3, temperature=0, top_k=1).choices[0].text
    assert engine.models == ["tiny"] and engine.url.startswith("http://127.0.0.1:")


def test_a_batch_answers_rows_of_every_format_in_their_order(
    engine: swift_dist.Engine, model: Path, tmp_path: Path
) -> None:
    given = [dict(known.example) for known in formats()] + [{"query": "silver", "id": 7, "error": "mine"}, {"x": 1}]
    data, out = chat_model.save_rows(tmp_path / "rows.jsonl", given), tmp_path / "out.jsonl"
    result = swift_dist.infer(
        url=engine.url, dataset=str(data), output=str(out), max_tokens=4, temperature=0, system="Be brief.", usage=True
    )
    found = rows_of(out)
    assert len(found) == len(given) == result["rows"]
    for row, source in zip(found, given, strict=True):
        prompt = read_prompt(source, "x")
        if prompt.problem:
            assert row["response"] is None and prompt.problem in row["error"]
            continue
        assert row.get("reference") == prompt.reference
        assert isinstance(row["response"], str) and row["usage"]["completion_tokens"] <= 4
        for name, value in source.items():
            assert row.get(f"input_{name}", row.get(name)) == value or name == prompt.answer_column
    last = found[-2]
    assert last["input_error"] == "mine" and last["id"] == 7
    system = {"role": "system", "content": "Be brief."}
    assert last["response"] == greedy(model, [system, {"role": "user", "content": "silver"}], 4)
    assert result["failed"] == sum(row["response"] is None for row in found) == 3
    assert result["exit_code"] == 1


def test_a_killed_batch_goes_on_with_every_row_exactly_once(engine: swift_dist.Engine, tmp_path: Path) -> None:
    given = [{"query": f"the {word} {number}", "id": number} for number in range(60) for word in ("red", "moon")]
    data, out = chat_model.save_rows(tmp_path / "rows.jsonl", given), tmp_path / "out.jsonl"
    partial = out.with_name("out.jsonl.partial")
    words = ["--url", engine.url, "--dataset", data, "--output", out, "--max_tokens", "12", "--temperature", "0"]
    words += ["--concurrency", "3"]
    first = subprocess.Popen([*MAIN, *map(str, words)], env=ENV, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 10):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert not out.exists()
    kept = [json.loads(line) for line in partial.read_text().splitlines()[1:] if line.endswith("}")]
    with partial.open("a") as stream:
        stream.write('{"index": 119, "failed": false, "row": {"resp')  # torn by the kill
    second = run(*words, "--json")
    result = json.loads(second.stdout)
    assert second.returncode == 0, second.stderr
    assert [row["id"] for row in rows_of(out)] == [row["id"] for row in given]
    assert result["rows"] == 120 and result["answered"] == 120 - len(kept) and result["failed"] == 0
    assert not partial.exists()
    assert {row["query"]: row["response"] for row in rows_of(out)}.items() >= {
        entry["row"]["query"]: entry["row"]["response"] for entry in kept
    }.items()
    third = run(*words, "--json")
    assert json.loads(third.stdout)["answered"] == 0 and third.returncode == 0
    other = run(*words[:-4], "--temperature", "1")
    assert other.returncode == 2 and "temperature: 0.0, now 1.0" in other.stderr
    assert run(*words, "--resume", "never").returncode == 2


def test_failed_rows_alone_are_asked_again(engine: swift_dist.Engine, tmp_path: Path) -> None:
    rows = [{"query": "moon"}, {"query": "river " * 5000}, {"query": "stone"}]  # the second is longer than the context
    data, out = chat_model.save_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    keys: dict[str, Any] = {"url": engine.url, "dataset": str(data), "output": str(out), "max_tokens": 2}
    result = swift_dist.infer(**keys)
    assert (result["failed"], result["answered"]) == (1, 2)
    assert "4096" in rows_of(out)[1]["error"]
    before = rows_of(out)
    again = swift_dist.infer(**keys)
    assert (again["failed"], again["answered"], again["rows"]) == (1, 0, 3)
    assert [rows_of(out)[index] for index in (0, 2)] == [before[index] for index in (0, 2)]


def test_an_engine_that_is_killed_loses_no_row(model: Path, tmp_path: Path) -> None:
    """`infer` with engines of its own: one is killed with SIGKILL in the middle, and nothing is left behind."""
    from swift_dist.lifetime import descendants

    given = [{"query": f"the moon {number}", "id": number} for number in range(80)]
    data, out = chat_model.save_rows(tmp_path / "rows.jsonl", given), tmp_path / "out.jsonl"
    words = ["--model", model, "--infer_backend", "hf", "--dataset", data, "--output", out, "--max_tokens", "24"]
    words += ["--concurrency", "4", "--json"]
    command = subprocess.Popen(
        [*MAIN, *map(str, words)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    partial = out.with_name("out.jsonl.partial")
    deadline = time.monotonic() + 200
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 5):
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = descendants(command.pid)
    servers = [pid for pid in family if b"serving.hf.server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(servers[-1], signal.SIGKILL)
    said, log = command.communicate(timeout=200)
    assert command.returncode == 0, log
    assert [row["id"] for row in rows_of(out)] == list(range(80))
    assert json.loads(said)["restarts"] == 1 and "is started again" in log
    assert gone_within(family, 10)


class Terminal:
    """A command whose stdin, stdout and stderr are a terminal."""

    def __init__(self, *words: str | Path) -> None:
        pid, self.fd = pty.fork()
        if pid == 0:
            os.execve(MAIN[0], [*MAIN, *map(str, words)], ENV)
        self.pid, self.unread = pid, ""

    def until(self, text: str, seconds: float = 120) -> str:
        """Read until `text` has come; returns what came, and leaves what follows it unread."""
        deadline = time.monotonic() + seconds
        while text not in self.unread:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.unread!r}"
            try:
                self.unread += os.read(self.fd, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"ended before {text!r}: {self.unread!r}") from None
        came, _, self.unread = self.unread.partition(text)
        return came + text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        while True:
            try:
                if not os.read(self.fd, 4096):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation_in_a_terminal(engine: swift_dist.Engine, model: Path) -> None:
    terminal = Terminal("--url", engine.url, "--temperature", "0", "--max_tokens", "5")
    assert "tiny  (/help" in terminal.until("> ")
    history: list[dict[str, str]] = []

    def ask(text: str) -> None:
        history.append({"role": "user", "content": text})
        answer = greedy(model, history, 5)
        history.append({"role": "assistant", "content": answer})
        terminal.type(f"{text}\n")
        terminal.until(f"{text}\r\n")  # the echo
        said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.until("> ").removesuffix("> "))
        assert said.split() == answer.split()

    ask("the moon")
    ask("silver")  # after the first round
    assert greedy(model, history[2:3], 5) != history[3]["content"]
    terminal.type("/reset\n")
    terminal.until("the conversation is forgotten")
    terminal.until("> ")
    history.clear()
    ask("silver")
    terminal.type("/system Be brief.\n")
    terminal.until("with this system message")
    terminal.until("> ")
    history[:] = [{"role": "system", "content": "Be brief."}]
    ask("silver")
    terminal.type("/system\n")
    terminal.until("without one of yours")
    terminal.until("> ")
    history.clear()
    ask("silver")
    terminal.type("/nonsense\n")
    terminal.until("unknown command /nonsense")
    terminal.type("/adapter x\n")
    terminal.until("there are tiny")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(engine: swift_dist.Engine) -> None:
    terminal = Terminal("--url", engine.url, "--temperature", "0", "--max_tokens", "3000")
    terminal.until("> ")
    terminal.type("the moon\n")
    terminal.until("moon\r\n")
    select.select([terminal.fd], [], [], 60)  # the first piece of the answer
    terminal.type("\x03")
    terminal.until("(stopped)")
    deadline = time.monotonic() + 60
    while engine._replicas[0].process.load().running:  # the engine has stopped, too
        assert time.monotonic() < deadline
        time.sleep(0.1)
    terminal.until("> ")
    terminal.type("half a line\x03")  # at the prompt it drops the line
    terminal.until("(Ctrl-D or /exit ends)")
    terminal.until("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0


def test_a_conversation_over_pipes(engine: swift_dist.Engine, model: Path) -> None:
    """Two messages: the second answer depends on the first round."""
    words = ["--url", engine.url, "--temperature", "0", "--max_tokens", "5"]
    done = run(*words, input="the moon\nsilver\n")
    assert done.returncode == 0, done.stderr
    first = greedy(model, [{"role": "user", "content": "the moon"}], 5)
    rounds = [{"role": "user", "content": "the moon"}, {"role": "assistant", "content": first}]
    second = greedy(model, [*rounds, {"role": "user", "content": "silver"}], 5)
    assert done.stdout == f"{first}\n{second}\n"
    alone = run(*words, "--prompt", "the moon")
    assert alone.stdout == f"{first}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model: is not given"),
        (["--model", "m", "--output", "o"], "output: is read with --dataset only"),
        (["--model", "m", "--dataset", "d"], "output: is not given"),
        (["--model", "m", "--dataset", "d", "--prompt", "p", "--output", "o"], "prompt: is given beside --dataset"),
        (["--url", "http://127.0.0.1:1", "--dtype", "fp32"], "dtype: has no effect on the server at --url"),
        (["--model", "m", "--logprobs"], "logprobs: is read with --prompt and --dataset only"),
        (["--model", "m", "--prompt", "p", "--top_logprobs", "2"], "top_logprobs: is read with --logprobs only"),
        (["--model", "m", "--temprature", "1"], "did you mean temperature"),
        (["--model", "/nowhere/m", "--prompt", "p"], "there is no /nowhere/m"),
        (["--model", "m", "--prompt", "p", "--json_schema", "/nowhere"], "json_schema: /nowhere cannot be read"),
        (["--model", "m", "--prompt", "p", "--task", "embed"], "task: infer generates text"),
        (
            ["--model", "m", "--dataset", "d", "--output", "o", "--launcher", "slurm"],
            "launcher: Input should be 'local' or 'ray', got 'slurm'",
        ),
    ],
)
def test_wrong_flags_are_told_before_anything_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from swift_dist.cli import main

    assert main(["infer", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_is_said_of_a_model_beats_what_its_folder_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from swift_dist.cli import main

    model = save_toy_model(tmp_path / "model", "hello")
    (model / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]')
    words = ["infer", "--model", str(model), "--infer_backend", "toy_engine:ENGINE", "--prompt", "x"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "is for embeddings" in said and "--task generate" in said
    assert main([*words, "--task", "generate"]) == 2
    assert "chat_template: " in capsys.readouterr().err, "the next thing that this model lacks"


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not answer"):
        swift_dist.infer(url="http://127.0.0.1:9", prompt="x")


@pytest.mark.parametrize("problem", [OSError("no space left"), JobError("model", "it is gone", "restore it")])
def test_whatever_keeps_an_engine_from_starting_is_said(problem: Exception) -> None:
    class NeverStarts(RemoteReplica):
        def start(self) -> str:
            raise problem

    async def ask() -> None:
        async with EnginePool([NeverStarts("the engine")], 1) as pool, asyncio.timeout(60):
            await pool.ask(lambda client: asyncio.sleep(0))

    with pytest.raises((RunError, JobError), match=r"no space left|it is gone"):
        asyncio.run(ask())


def test_a_model_without_a_chat_template_is_refused_before_an_engine_starts(model: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    template = config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(JobError, match=r"has none to ask with\n.*--complete true") as caught:
        swift_dist.infer(model=str(bare), prompt="the moon", infer_backend="hf")
    assert caught.value.key == "chat_template"
    template = template or (model / "chat_template.jinja").read_text()
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert template_of(str(bare), EngineOptions()) == template
