"""Wrong jobs through the real command line: exit 2 before anything starts, one message, its remedy, nothing written."""

from __future__ import annotations

import ast
import json
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from refusals import Wrong, assert_json, assert_message, assert_refused, contents
from toy_job import MODEL, job, write_dataset, write_job

HERE = Path(__file__).parent
HEADER = 34  # bytes of an .idx before its arrays

WRONG = [
    Wrong(**{"name": name, **values}) for name, values in yaml.safe_load((HERE / "wrong_jobs.yaml").read_text()).items()
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a job, rows and a broken tokenizer in it."""
    for name in ("RAY_ADDRESS", "NPROC_PER_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text('{"broken')
    return tmp_path


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_refused(folder: Path, dataset: str, capsys: pytest.CaptureFixture[str], wrong: Wrong) -> None:
    path = folder / "job.yaml"
    write_job(path, job(dataset, **(wrong.sections or {})))
    if wrong.text is not None:
        path.write_text(wrong.text)
    output = [] if "--output" in wrong.words else ["--output", "out"]
    words = ["pretrain", "job.yaml", *shlex.split(wrong.words), *output]
    assert_refused(capsys, folder, shlex.split(wrong.command) or words, wrong)


def cut(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size)


def patch(path: Path, offset: int, value: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(value)


POINTERS = HEADER + 4 * 400
DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str, str]] = {
    "empty idx": (lambda idx, bin_: os.truncate(idx, 0), ".idx", "0 bytes, shorter than its header"),
    "idx cut in its header": (lambda idx, bin_: os.truncate(idx, 20), ".idx", "20 bytes, shorter than its header"),
    "idx cut": (lambda idx, bin_: cut(idx, 100), ".idx", "400 sequences need"),
    "not an idx": (lambda idx, bin_: patch(idx, 0, b"PK\3\4"), ".idx", "magic bytes"),
    "another version": (lambda idx, bin_: patch(idx, 9, struct.pack("<Q", 7)), ".idx", "format version 7"),
    "unknown token type": (lambda idx, bin_: patch(idx, 17, b"\x63"), ".idx", "token type code 99"),
    "absurd count": (lambda idx, bin_: patch(idx, 18, struct.pack("<QQ", 2**62, 2**62)), ".idx", "sequences need"),
    "wrong length": (lambda idx, bin_: patch(idx, HEADER + 28, struct.pack("<i", 5)), ".idx", "do not follow"),
    "negative length": (lambda idx, bin_: patch(idx, HEADER + 28, struct.pack("<i", -5)), ".idx", "do not follow"),
    "wrong pointer": (lambda idx, bin_: patch(idx, POINTERS + 56, struct.pack("<q", 3)), ".idx", "do not follow"),
    "bin cut": (lambda idx, bin_: cut(bin_, 1000), ".bin", "but its .idx describes"),
    "bin too long": (lambda idx, bin_: patch(bin_, bin_.stat().st_size, b"xx"), ".bin", "but its .idx describes"),
    "empty bin": (lambda idx, bin_: os.truncate(bin_, 0), ".bin", "0 bytes, but its .idx describes"),
    "no bin": (lambda idx, bin_: bin_.unlink(), ".bin", "does not exist"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_data(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    damage, file, says = DAMAGE[kind]
    prefix = write_dataset(folder / "harmed")
    damage(Path(f"{prefix}.idx"), Path(f"{prefix}.bin"))
    write_job(folder / "job.yaml", job(prefix))
    remedy = "data prepare" if kind == "no bin" else "prepare the dataset again"
    wrong = Wrong(kind, "data.train", (f"harmed{file}", says), remedy)
    assert_refused(capsys, folder, ["pretrain", "job.yaml", "--output", "out"], wrong)


def test_steps_beyond_the_epochs(folder: Path, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = job(dataset, train={"steps": 1000})
    values["data"]["train"] = [{"path": dataset, "epochs": 1}]
    write_job(folder / "job.yaml", values)
    wrong = Wrong(
        "epochs", "train.steps", ("1000 steps of 8 samples", "epochs of data.train hold"), "lower train.steps to"
    )
    assert_refused(capsys, folder, ["pretrain", "job.yaml", "--output", "out"], wrong)


def test_a_model_folder_without_weights(folder: Path, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(MODEL))
    write_job(folder / "job.yaml", job(dataset, model={"config": None, "path": "hf"}))
    wrong = Wrong("weights", "model.path", ("hf holds no *.safetensors",), "--model.init random")
    assert_refused(capsys, folder, ["pretrain", "job.yaml", "--output", "out"], wrong)
    (folder / "hf" / "config.json").write_text("{")
    wrong = Wrong("config", "model.path", ("config.json cannot be read",), "restore the file")
    assert_refused(capsys, folder, ["pretrain", "job.yaml", "--output", "out"], wrong)


def test_code_of_a_model_folder_is_not_run(folder: Path, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hf").mkdir()
    harmful = {**MODEL, "auto_map": {"AutoModel": "harm.Model"}}
    (folder / "hf" / "config.json").write_text(json.dumps(harmful))
    (folder / "hf" / "harm.py").write_text("open('harm', 'w')")
    write_job(folder / "job.yaml", job(dataset, model={"config": None, "path": "hf"}))
    wrong = Wrong("code", "model.path", ("auto_map",), "trust_remote_code")
    assert_refused(capsys, folder, ["pretrain", "job.yaml", "--output", "out"], wrong)


def test_a_tracker_that_is_not_installed(
    folder: Path, dataset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what `import wandb` finds where it is not installed
    monkeypatch.setattr("importlib.util.find_spec", missing("wandb"))
    write_job(folder / "job.yaml", job(dataset))
    wrong = Wrong("tracker", "report.trackers", ("wandb is not installed",), "pip install wandb")
    assert_refused(capsys, folder, ["pretrain", "job.yaml", "--output", "out", "--report.trackers", "wandb"], wrong)


def missing(name: str) -> Callable[..., object]:
    from importlib.util import find_spec

    return lambda asked, *rest: None if asked == name else find_spec(asked, *rest)


def test_an_output_that_cannot_be_written(folder: Path, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_job(folder / "job.yaml", job(dataset))
    with read_only(folder / "locked") as locked:
        wrong = Wrong("locked", "output", (f"{locked} is not writable",), "name a folder you can write to")
        assert_refused(capsys, folder, ["pretrain", "job.yaml", "--output", str(locked / "run")], wrong)


@contextmanager
def read_only(path: Path) -> Iterator[Path]:
    """A folder that nobody can write to: for root, who may write anywhere, a mount."""
    path.mkdir()
    if os.getuid():
        path.chmod(0o555)
        yield path
        path.chmod(0o755)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("root without the right to mount can write anywhere")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


RESUMES = {
    "seed": (("--train.seed", "99"), "train.seed", ("1234", "99")),
    "batch": (("--train.global_batch_size", "16"), "train.global_batch_size", ("8", "16")),
    "length": (("--data.sequence_length", "32"), "data.sequence_length", ("64", "32")),
    "rate": (("--optimizer.lr", "0.01"), "optimizer.lr", ("0.0003", "0.01")),
    "objective": (("--train.precision", "bf16"), "train.precision", ("fp32", "bf16")),
    "model": (("--model.config.rope_theta", "5000"), "model.config.rope_theta", ("10000.0", "5000")),
    "never": (("--resume", "never"), "output", ("already holds a run",)),
}


@pytest.mark.parametrize("change", RESUMES)
def test_a_resume_that_would_be_another_training(
    folder: Path, undisturbed: object, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """On a real finished run, which must stay as it is."""
    words, key, says = RESUMES[change]
    wrong = Wrong(change, key, says, "another folder" if change == "never" else "put the old value back")
    run, command = undisturbed.output, undisturbed.words  # type: ignore[attr-defined]
    words = [*(w for w in command if w != "--json"), *words, "--output", str(run)]
    assert_refused(capsys, run, words, wrong)


def test_a_resume_with_other_data(folder: Path, undisturbed: object, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_dataset(folder / "other", seed=1)
    run, command = undisturbed.output, undisturbed.words  # type: ignore[attr-defined]
    wrong = Wrong("data", "data.train", (str(run),), "put the old value back")
    words = [*(w for w in command if w != "--json"), "--dataset", other, "--output", str(run)]
    assert_refused(capsys, run, words, wrong)


INSTALLED = Path(sys.executable).with_name("swift-dist")


def test_through_the_installed_command(folder: Path, dataset: str) -> None:
    write_job(folder / "job.yaml", job(dataset))
    wrong = next(w for w in WRONG if w.name == "heads")
    assert_process_refuses([str(INSTALLED), "pretrain", "job.yaml", *shlex.split(wrong.words)], folder, wrong)


def test_nothing_listens_at_the_address(folder: Path, dataset: str) -> None:
    write_job(folder / "job.yaml", job(dataset))
    wrong = Wrong("address", "cluster.address", ("no Ray cluster answers at 127.0.0.1:1",), "ray start --head")
    command = [str(INSTALLED), "pretrain", "job.yaml", "--cluster.address", "127.0.0.1:1"]
    assert_process_refuses(command, folder, wrong)


def assert_process_refuses(command: list[str], folder: Path, wrong: Wrong) -> None:
    """The same in a process of its own: exit code and streams."""
    before = contents(folder)
    command = [*command, "--output", "out", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert_message(done.stderr, wrong)
    assert_json(done.stdout, wrong, 2)
    assert contents(folder) == before


def test_every_refusal_in_the_code_names_a_remedy() -> None:
    root = HERE.parents[1]
    files = [f for room in ("swift_dist", "converters", "kernels", "launchers") for f in (root / room).rglob("*.py")]
    assert len(files) > 100
    without = [
        f"{file.relative_to(root)}:{call.lineno}"
        for file in files
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "JobError"
        if len(call.args) < 3 and not any(isinstance(argument, ast.Starred) for argument in call.args)
    ]
    assert without == []
