"""A few damaged bytes anywhere but among the values: a message or no harm, never other values and never a traceback."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from swift_dist.cli import main
from swift_dist.convert.sources import open_source
from swift_dist.converters.reading import Reader
from swift_dist.errors import JobError, RunError
from tests.converters import tiny_models

FILES = {
    "safetensors header": ("hf", "model-00002-of-00003.safetensors"),
    "safetensors index": ("hf", "model.safetensors.index.json"),
    ".bin": ("bin", "pytorch_model.bin"),
    "torch_dist index": ("dist", ".metadata"),
    "torch_dist data": ("dist", "__0_0.distcp"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny model in each format."""
    top = tmp_path_factory.mktemp("whole")
    model = tiny_models.tiny_model("llama")
    model.save_pretrained(top / "hf", max_shard_size="40KB")
    (top / "bin").mkdir()
    torch.save(model.state_dict(), top / "bin" / "pytorch_model.bin")
    shutil.copy(top / "hf" / "config.json", top / "bin")
    assert main(["convert", "hf-to-megatron", str(top / "hf"), str(top / "dist"), "--workers", "1"]) == 0
    return top


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A damaged pickle may ask for any amount."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def read(folder: Path) -> dict[str, bytes]:
    source, reader = open_source(str(folder)), Reader()
    return {name: reader.read(stored).tobytes() for name, stored in source.side.tensors.items()}


def beside_values(folder: Path, file: str) -> list[int]:
    """Bytes of a file that are no tensor's values."""
    content = (folder / file).read_bytes()
    free = bytearray(b"\1") * len(content)
    for values in read(folder).values():
        at = content.find(values)
        if at >= 0:
            free[at : at + len(values)] = bytes(len(values))
    return [at for at, mark in enumerate(free) if mark]


@contextmanager
def damaged(path: Path, places: set[int], at: int, draw: random.Random) -> Iterator[str]:
    whole = path.read_bytes()
    content = bytearray(whole)
    how = draw.choice(("bit", "byte", "cut", "zeros"))
    count = draw.randrange(1, 9)
    if how == "bit":
        content[at] ^= 1 << draw.randrange(8)
    elif how == "byte":
        content[at] = draw.randrange(256)
    elif how == "cut":
        del content[at : at + count]
    else:
        for place in places.intersection(range(at, at + count)):
            content[place] = 0
    path.write_bytes(content)
    yield f"{how} {count} at byte {at}"
    path.write_bytes(whole)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=pytest.mark.table)])
def test_damage_is_noticed_or_does_no_harm(folders: Path, name: str, times: int) -> None:
    folder, file = folders / FILES[name][0], FILES[name][1]
    whole, places = read(folder), beside_values(folder, file)
    seed = random.SystemRandom().randrange(1 << 32)
    draw = random.Random(seed)
    noticed = 0
    for _ in range(times):
        with damaged(folder / file, set(places), draw.choice(places), draw) as what:
            try:
                assert read(folder) == whole, f"{name}: {what}, seed {seed}"
            except (JobError, RunError) as error:
                assert error.remedy, error
                noticed += 1
            except Exception as error:
                raise AssertionError(f"{name}: {what}, seed {seed}") from error
    assert noticed > times // 10
    assert read(folder) == whole
