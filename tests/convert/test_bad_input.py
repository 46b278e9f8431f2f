"""Sources that are damaged, incomplete, of another model or hostile: one clear message, and nothing is left behind."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_dist.cli import main
from tests.convert.bad_folders import WRONG_FOLDERS, Edit, configured, cut, removed, replaced, retensored, void, written
from tests.converters import tiny_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model by name in several shards; ``NAME.bin``: as pytorch_model.bin; ``NAME.dist``: as torch_dist."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp(name) / "model"
            family, _, form = name.partition(".")
            if form == "dist":
                assert main(["convert", "hf-to-megatron", str(get(family)), str(folder), "--workers", "1"]) == 0
            elif form == "bin":
                folder.mkdir()
                torch.save(tiny_models.tiny_model(family).state_dict(), folder / "pytorch_model.bin")
                shutil.copy(get(family) / "config.json", folder)
            else:
                tiny_models.tiny_model(family).save_pretrained(folder, max_shard_size="40KB")
                assert len(list(folder.glob("*.safetensors"))) > 2
        return made[name]

    return get


def convert(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str], *words: str, verb: str = "hf-to-megatron"
) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["convert", verb, str(source), str(target), "--workers", "1", *words, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer.get("exit_code", 0) == code
    return answer


@pytest.mark.parametrize("name", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused_before_anything_is_written(
    name: str, models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, edit, key, message = WRONG_FOLDERS[name]
    source = tmp_path / "source"
    shutil.copytree(models(model), source)
    edit(source)
    error = convert(source, tmp_path / "target", capsys)["error"]
    assert (error["kind"], error["key"]) == ("job", key), error
    assert message in error["message"] and error["remedy"], error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class Hostile:
    """Unpickled by anything but an inert reader, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_a_pickle_that_calls_a_program_is_not_run(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, mark = tmp_path / "source", tmp_path / "mark"
    shutil.copytree(models("llama.bin"), source)
    state = torch.load(source / "pytorch_model.bin")
    torch.save(Hostile(mark), source / "pytorch_model.bin")
    error = convert(source, tmp_path / "target", capsys)["error"]
    assert error["key"] == "source" and ("missing: " in error["message"] or "posix.system" in error["message"])
    torch.save({**state, "extra": Hostile(mark)}, source / "pytorch_model.bin")  # beside weights that are whole
    answer = convert(source, tmp_path / "target", capsys)
    assert "error" not in answer or "posix.system" in answer["error"]["message"]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(models("llama.dist"), checkpoint)
    for content in (Hostile(mark), {"state_dict_metadata": Hostile(mark), "storage_data": {}}):
        (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
        error = convert(checkpoint, tmp_path / "hf", capsys, verb="megatron-to-hf")["error"]
        assert error["key"] == "source" and ".metadata cannot be read" in error["message"]
    assert not mark.exists()


def data_file(folder: Path) -> Path:
    return folder / "__0_0.distcp"


def flip(path: Path, at: int, bits: int = 0xFF) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        old = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([old ^ bits]))


def flip_header(folder: Path) -> None:
    """The first byte of the first record's header in the first chunk."""
    flip(data_file(folder), 0)


def flip_directory(folder: Path) -> None:
    """The end record of the first chunk's archive."""
    content = data_file(folder).read_bytes()
    flip(data_file(folder), content.index(b"PK\x05\x06"))


WRONG_CHECKPOINTS: dict[str, tuple[Edit, str, str]] = {
    # name: (what is done to a torch_dist checkpoint, kind of error, a piece of the message)
    "truncated .metadata": (cut(".metadata", 100), "job", ".metadata cannot be read"),
    "empty .metadata": (written(".metadata", b""), "job", ".metadata cannot be read"),
    ".metadata is a dict": (written(".metadata", pickle.dumps({"a": 1})), "job", ".metadata cannot be read"),
    ".metadata is a list": (written(".metadata", pickle.dumps([1])), "job", ".metadata cannot be read"),
    ".metadata is text": (written(".metadata", b"hello"), "job", ".metadata cannot be read"),
    "missing .distcp": (removed("__0_0.distcp"), "job", "names __0_0.distcp, which is missing"),
    "truncated .distcp": (cut("__0_0.distcp"), "job", "__0_0.distcp has"),
    "empty .distcp": (written("__0_0.distcp", b""), "job", "__0_0.distcp has 0 bytes"),
    "flipped header": (flip_header, "run", "__0_0.distcp is damaged"),
    "flipped directory": (flip_directory, "run", "__0_0.distcp is damaged"),
    "config of another size": (
        lambda folder: configured(num_hidden_layers=4)(folder / "hf"),
        *("job", "missing: decoder.layers.3."),
    ),
    "no config": (lambda folder: shutil.rmtree(folder / "hf"), "job", "does not say what model it is"),
    "broken tokenizer": (
        lambda folder: void((folder / "hf" / "tokenizer.json").write_text("{")),
        *("job", "tokenizer.json cannot be read"),
    ),
}


@pytest.mark.parametrize("name", WRONG_CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused(
    name: str, models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, kind, message = WRONG_CHECKPOINTS[name]
    source = tmp_path / "source"
    shutil.copytree(models("llama.dist"), source)
    edit(source)
    error = convert(source, tmp_path / "target", capsys, verb="megatron-to-hf")["error"]
    assert error["kind"] == kind and message in error["message"] and error["remedy"], error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("verb", ["hf-to-megatron", "megatron-to-hf"])
def test_what_is_no_model_at_all(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, file = tmp_path / "empty", tmp_path / "file.safetensors"
    empty.mkdir()
    file.write_bytes(b"")
    for source, message in ((empty, "holds neither"), (file, "is not a folder"), (tmp_path / "no", "is not a folder")):
        error = convert(source, tmp_path / "target", capsys, verb=verb)["error"]
        assert error["key"] == "source" and message in error["message"] and error["remedy"]
    (empty / "config.json").write_text("{}")
    assert "but no weights" in convert(empty, tmp_path / "target", capsys, verb=verb)["error"]["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file.safetensors"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("--dtype", "int8"), "dtype"),
        (("--max_shard_size", "5QB"), "max_shard_size"),
        (("--max_shard_size", "0"), "max_shard_size"),
        (("--storage_rate", "fast"), "storage_rate"),
        (("--workers", "0"), "workers"),
        (("--workers", "many"), "workers"),
        (("--launcher", "slurm"), "launcher"),
        (("--logits", "maybe"), "logits"),
        (("--logits_tolerance", "-1"), "logits_tolerance"),
        (("--hf_config", "/nowhere"), "hf_config"),
        (("--colour", "red"), "colour"),
    ],
)
def test_unknown_values_of_options(
    words: tuple[str, str], key: str, models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = convert(models("llama"), tmp_path / "target", capsys, *words)["error"]
    assert error["kind"] == "job" and key in error["key"] + error["message"], error
    assert words[1] in error["message"] or words[0] == "--colour", error
    assert not list(tmp_path.iterdir())


def test_a_tied_model_whose_output_layer_differs(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = models("llama")
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    configured(tie_word_embeddings=True)(source)
    error = convert(source, tmp_path / "target", capsys)["error"]
    assert error["key"] == "source" and "lm_head.weight must repeat another tensor" in error["message"]
    assert "tie_word_embeddings to false" in error["remedy"]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nan_and_infinity_are_reported_and_with_strict_refused(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(models("llama"), source)
    bad = torch.tensor([math.nan, math.inf, -math.inf])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][3, :3] = bad

    retensored(change, 0)(source)
    error = convert(source, target, capsys, "--strict", "true")["error"]
    assert error["kind"] == "run" and "word_embeddings.weight: 3 values are NaN or infinite" in error["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    result = convert(source, target, capsys)
    assert result["non_finite"] == {"embedding.word_embeddings.weight": 3}
    assert json.loads((target / "conversion_report.json").read_text())["non_finite"] == result["non_finite"]
    assert "3" in (target / "conversion_report.md").read_text()
    back = convert(target, tmp_path / "back", capsys, "--verify", "true", "--logits", "never", verb="megatron-to-hf")
    assert back["non_finite"] == {"model.embed_tokens.weight": 3} and back["verified"]["equal"]


def test_a_value_beyond_fp16_is_not_made_infinite(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(models("llama"), source)
    replaced(lambda values: torch.full_like(values, 70000.0))(source)
    error = convert(source, tmp_path / "target", capsys, "--dtype", "fp16")["error"]
    assert error["kind"] == "run" and "beyond float16's range" in error["message"]
    assert "--dtype bf16 or fp32" in error["remedy"]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert convert(source, tmp_path / "target", capsys, "--dtype", "bf16")["non_finite"] == {}


def test_compressed_archives_are_refused(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(models("llama.bin"), source)
    file = source / "pytorch_model.bin"
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    (tmp_path / "packed").rename(file)
    assert "is compressed" in convert(source, tmp_path / "target", capsys)["error"]["message"]
