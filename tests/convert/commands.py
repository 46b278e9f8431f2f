"""`swift-dist convert` as processes of their own, which tests may kill; and models of random weights to convert."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_MAIN = [sys.executable, "-c", "from swift_dist.cli import main; raise SystemExit(main())", "convert"]
_MARK = "SWIFT_DIST_CONVERT_TEST"


class Command:
    """A running `swift-dist convert ...`; its workers are known by a mark in their environment."""

    def __init__(self, *words: str | Path) -> None:
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self.process = subprocess.Popen(
            [*_MAIN, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, name: value},
            start_new_session=True,
        )

    def running(self) -> list[int]:
        """Processes of this command that live, workers included."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError):
                    if self._mark in (folder / "environ").read_bytes().decode(errors="replace").split("\0"):
                        found.append(int(folder.name))
        return found

    def wait_for(self, condition: Callable[[], Any]) -> bool:
        """Wait until it holds; False: the command ended before."""
        while not condition():
            if self.process.poll() is not None:
                return bool(condition())
            time.sleep(0.001)
        return True

    def send(self, number: int) -> None:
        """Send a signal as a terminal does: to the command's process group (its workers have groups of their own)."""
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) when it has ended; then nothing of it may be left running."""
        out, err = self.process.communicate(timeout=250)
        deadline = time.monotonic() + 30
        while (left := self.running()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left, f"still running: {left}"
        return self.process.returncode, out, err


def run(*words: str | Path) -> tuple[int, str, str]:
    return Command(*words).end()


def result_of(*words: str | Path) -> dict[str, Any]:
    """What a command that must succeed answers with ``--json``: one JSON object, nothing else."""
    code, out, err = run(*words, "--json")
    assert code == 0, err
    return json.loads(out)


def work_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def recorded(target: Path) -> list[str]:
    """Files that an unfinished conversion has noted as whole."""
    with suppress(OSError):
        lines = (work_folder(target) / ".written.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line)["file"] for line in lines if line.endswith("\n")]
    return []


def report(target: Path) -> dict[str, Any]:
    return json.loads((target / "conversion_report.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path, the reports (which hold times) aside."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("conversion_report")
    }


def write_llama(folder: Path, hidden: int, layers: int, vocabulary: int = 2048) -> Path:
    """A Llama with random bf16 weights, about ``(12 * layers * hidden + 2 * vocabulary) * hidden`` of them."""
    from safetensors.torch import save_file

    from swift_dist.converters.mapping import hf_shapes
    from swift_dist.models import find_family

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "tie_word_embeddings": False,
    }
    generator = torch.Generator().manual_seed(7)
    shapes = hf_shapes(find_family(config).rows(config))
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
