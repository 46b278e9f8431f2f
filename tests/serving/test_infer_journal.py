"""The output of `swift-dist infer` over a dataset: whose it is, of what, and what a killed command leaves of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_model
import pytest

from swift_dist.data.rows.prompts import PromptSource
from swift_dist.errors import JobError
from swift_dist.serving.infer import InferOptions, identity_of
from swift_dist.serving.inference.journal import Journal
from swift_dist.serving.inference.sampling import SamplingOptions
from swift_dist.serving.sources.source import Source


def test_an_output_is_held_by_one_command(tmp_path: Path) -> None:
    first = Journal(tmp_path / "o.jsonl", {"a": 1}, resume=True)
    with first, pytest.raises(JobError, match="another process is writing"):
        Journal(tmp_path / "o.jsonl", {"a": 1}, resume=True).__enter__()
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(JobError, match="nothing says that infer wrote it"):
        Journal(tmp_path / "mine.jsonl", {"a": 1}, resume=True).check()


def test_answers_are_of_the_files_that_gave_them(tmp_path: Path) -> None:
    """What is trained again in its place, and every key that changes what is said, gives other answers."""
    folder, lora, template = tmp_path / "model", tmp_path / "lora", tmp_path / "own.jinja"
    for file in (folder / "model.safetensors", lora / "adapter_model.safetensors", template):
        file.parent.mkdir(exist_ok=True)
        file.write_text("as it was")
    data, out = chat_model.save_rows(tmp_path / "rows.jsonl", [{"query": "moon"}]), folder / "model"
    source = Source("a", "model", str(folder), {"a": str(lora)})

    def identity(name: str = "a", **more: Any) -> dict[str, Any]:
        options = InferOptions(model="model", dataset=(str(data),), output=str(out), **more)
        return identity_of(options, PromptSource(options.dataset, "auto", {}, "dataset"), source, name)

    settings = [key for key in SamplingOptions.model_fields if key != "json_schema"]
    first, base, asked = identity(), identity("model"), identity(chat_template=str(template))
    with Journal(out, first, resume=True):  # its files in the model's own folder change nothing
        assert identity() == first
    (lora / "adapter_model.safetensors").write_text("trained again")
    assert identity() != first and identity("model") == base
    with pytest.raises(JobError, match="another weights"):
        Journal(out, identity(), resume=True).check()
    (folder / "model.safetensors").write_text("trained again")
    assert identity("model") != base
    template.write_text("another")
    assert identity(chat_template=str(template))["chat_template"] != asked["chat_template"]
    for key, value in (("tool_call_parser", "hermes"), ("reasoning_parser", "qwen3"), ("engine_args", ("--x",))):
        assert identity(**{key: value}) != identity()
    # the same line in every process: of one that was killed as it wrote it a part is recognised
    assert [key for key in first if key in settings] == settings


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_command_killed_as_it_gives_the_output_its_name_goes_on(
    renamed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, identity = tmp_path / "o.jsonl", {"a": "é"}

    def journal() -> Journal:
        return Journal(out, identity, resume=True)

    with journal() as first:
        first.add(0, {"response": None, "error": "too long"}, failed=True)
        first.finish(1, {})
    with journal() as second, monkeypatch.context() as patched:
        second.add(0, {"response": "moon"}, failed=False)
        left = iter(range(renamed))

        def replace(file: Path, target: Path) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            file.rename(target)

        patched.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            second.finish(1, {})
    with journal() as third:
        assert not third.is_finished and not third.failed
        third.finish(1, {})
    assert json.loads(out.read_text()) == {"response": "moon"} and not third.partial.exists()
    again = journal()
    again.check()
    assert again.is_finished and again.record["failed"] == 0


def test_a_command_killed_at_its_first_line_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    for begun in (b"", b'{"of": {"a"'):
        (tmp_path / "o.jsonl.partial").write_bytes(begun)
        with Journal(out, {"a": 1}, resume=True) as journal:
            assert not journal.done
    (tmp_path / "o.jsonl.partial").write_bytes(b"mine")
    with pytest.raises(JobError, match="does not say of what"):
        Journal(out, {"a": 1}, resume=True).check()
