"""Conversions that are kept: which of them a newer one ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deployment import wait_until
from toy_engine import save_toy_adapter, save_toy_model

from swift_dist.errors import RunError
from swift_dist.serving.deployment import desired
from swift_dist.serving.deployment.folder import DeploymentFolder
from swift_dist.serving.deployment.in_use import FoldersInUse, folders_of
from swift_dist.serving.sources import made
from swift_dist.serving.sources.adapters import with_template
from swift_dist.serving.sources.made import Holds, in_use, made_once, series_of
from swift_dist.serving.sources.source import resolve_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(made, "_QUIET_SECONDS", 0.0)
    return tmp_path / "cache"


def convert(cache: Path, step: int, series: str = "run") -> Path:
    source = cache.parent / f"step_{step}"
    if not source.exists():
        source.write_text(str(step))

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text(str(step))

    folder = made_once(f"{series}-{step}", [source], {}, make, cache, "converting", series)
    if (used := made._used(folder)).exists():
        os.utime(used, (step, step))  # asked for in this order
    return folder


def kept(cache: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in cache.iterdir() if not path.name.startswith("."))


def test_older_conversions_of_the_same_source_go(cache: Path) -> None:
    other = convert(cache, 0, series="other")
    for step in range(1, 6):
        convert(cache, step)
    assert kept(cache) == ["other-0", "run-3", "run-4", "run-5"]
    assert series_of(other) == "other" and series_of(cache.parent) == str(cache.parent)
    assert (convert(cache, 1) / "weights").read_text() == "1"  # made again


def test_what_is_used_stays(cache: Path) -> None:
    first, second = convert(cache, 1), convert(cache, 2)
    with in_use(first, cache.parent):
        held = Holds()
        held.hold([second])
        for step in range(3, 7):
            convert(cache, step)
        assert kept(cache) == ["run-1", "run-2", "run-4", "run-5", "run-6"]
        held.hold([first])
        convert(cache, 7)
        assert kept(cache) == ["run-1", "run-5", "run-6", "run-7"]
        held.hold([])
        convert(cache, 8)
        assert kept(cache) == ["run-1", "run-6", "run-7", "run-8"]
    convert(cache, 9)
    assert kept(cache) == ["run-7", "run-8", "run-9"]


def test_what_a_process_uses_stays_until_it_is_killed(cache: Path) -> None:
    first = convert(cache, 1)
    code = "import sys, time; from swift_dist.serving.sources.made import in_use\n"
    code += "with in_use(sys.argv[1]): print(flush=True); time.sleep(600)"
    user = subprocess.Popen([sys.executable, "-c", code, str(first)], stdout=subprocess.PIPE)
    assert user.stdout and user.stdout.readline()
    for step in range(2, 5):
        convert(cache, step)
    assert first.is_dir()
    user.kill()
    user.communicate()
    convert(cache, 5)
    assert not first.exists()


def test_what_was_asked_for_lately_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "_QUIET_SECONDS", 600.0)
    first, second = convert(cache, 1), convert(cache, 2)
    os.utime(made._used(second), (time.time() - 601,) * 2)
    assert convert(cache, 1) == first
    os.utime(made._used(first))
    for step in range(3, 6):
        os.utime(made._used(convert(cache, step)))
    assert first.is_dir() and not second.exists()


def test_what_killed_processes_left_goes(cache: Path) -> None:
    name = convert(cache, 1).name
    shutil.rmtree(cache / name)
    for left_over in (f".{name}.77.new", ".gone.78.deleted"):
        (cache / left_over).mkdir()
    assert convert(cache, 1).is_dir()
    assert sorted(path.name for path in cache.iterdir()) == [f".{name}.lock", f".{name}.used", name]


def test_a_deployment_keeps_what_it_runs_and_what_it_can_return_to(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its live version and candidate, the one before, and adapters; older versions are let go."""
    steps = {step: str(convert(cache, step)) for step in (1, 2, 3)}
    adapter = str(convert(cache, 0, series="adapter"))
    model = desired.ModelState(name="chat", adapters={"a": adapter})
    for step in (1, 2, 3):
        model = desired.settle(desired.propose(model, f"step_{step}", steps[step], 1), {f"chat-v{step}": 1})
    candidate = desired.propose(model, "step_4", "/elsewhere", 1)
    assert sorted(folders_of(candidate.model_dump())) == sorted(["/elsewhere", adapter, steps[2], steps[3]])
    gone = [RunError("the controller is being replaced"), FileNotFoundError("deployment.json")]
    shown = [desired.ModelState(name="chat"), *gone, model]

    class Asked:
        def __init__(self, folder: object) -> None:
            pass

        def ask(self, method: str, path: str) -> dict[str, object]:
            now = shown.pop(0) if len(shown) > 1 else shown[0]
            if isinstance(now, Exception):
                raise now
            return {"models": [now.model_dump()]}

    monkeypatch.setattr("swift_dist.serving.deployment.in_use.Control", Asked)
    monkeypatch.setattr("swift_dist.serving.deployment.in_use._LOOK_SECONDS", 0.01)
    with FoldersInUse(DeploymentFolder(cache.parent / "deployment"), [steps[1]]) as using:
        wait_until(lambda: set(using._holds._held) == {adapter, steps[2], steps[3]}, 20, "what the last status says")
        for step in range(4, 8):
            convert(cache, step)
        assert kept(cache) == ["adapter-0", "run-2", "run-3", "run-5", "run-6", "run-7"]


def test_an_adapter_is_asked_with_the_chat_template_that_it_brings(tmp_path: Path) -> None:
    """As `--model`; its base as it is, by links, which stay when the base's folder goes."""
    base, lora = save_toy_model(tmp_path / "base", "hello"), save_toy_adapter(tmp_path / "lora")
    (base / "chat_template.jinja").write_text("theirs")
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    assert resolve_model(str(lora)).path == str(base)
    (lora / "chat_template.jinja").write_text("theirs")
    assert resolve_model(str(lora)).path == str(base)
    (lora / "chat_template.jinja").write_text("mine")
    source = resolve_model(str(lora))
    assert resolve_model(str(lora)) == source and set(source.adapters) == {"lora"} and source.base_name == "base"
    folder = Path(source.path)
    assert folder.parent == tmp_path / ".cache" / "serving"
    assert (folder / "model.safetensors").samefile(base / "model.safetensors")
    assert (folder / "chat_template.jinja").read_text() == "mine" and (
        base / "chat_template.jinja"
    ).read_text() == "theirs"
    assert {file.name for file in folder.iterdir()} == {file.name for file in base.iterdir()}
    assert resolve_model(str(base), adapters={"a": str(lora)}).path == str(base)
    shutil.rmtree(base)
    assert json.loads((folder / "toy.json").read_text())["says"] == "hello"


@pytest.mark.parametrize("is_conversion", [True, False])
def test_where_nothing_can_be_linked_a_conversion_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_conversion: bool
) -> None:
    """Of what a newer conversion may delete nothing is left to point to."""
    base, lora = save_toy_model(tmp_path / "base", "hello"), save_toy_adapter(tmp_path / "lora")
    (lora / "chat_template.jinja").write_text("mine")
    if is_conversion:
        made._used(base).write_text("steps run")

    def refused(source: str, target: str) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refused)
    folder = with_template("base-for-lora", base, lora, tmp_path / "cache")
    assert (folder / "model.safetensors").is_symlink() != is_conversion
    assert (folder / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
