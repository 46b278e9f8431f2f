"""docs/tables/sequence_parallel.md: rows shared in every way by 2, 3, 4 and 8 ranks beside one process, in fp32.

`make tables` runs it and rewrites the page; `test_shared_rows.py` and `test_sequence_parallel.py` are what of it runs
always.
"""

from __future__ import annotations

import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import chat_model
import pytest
from sft_runs import LORA, Runs, curve
from test_shared_rows import FILE, LONG_ROPE

from swift_dist.sequence_parallel.degrees import fits_heads

PAGE = Path(__file__).parents[3] / "docs" / "tables" / "sequence_parallel.md"
TOLERANCE = 1e-5
WORLDS = (2, 3, 4, 8)
ROWS = {
    "dense": {"lengths": [61], "filling": 0},
    "packed": {"lengths": [9, 1, 22, 5, 24], "filling": 0},
    "padded": {"lengths": [20, 13], "filling": 28},
    "shorter than N": {"lengths": [2], "filling": 0},
}
SOME_LAYERS = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7, "num_hidden_layers": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "24 heads": ("llama", {"num_key_value_heads": 24}),
    "GQA, 2 kv heads": ("llama", {"num_key_value_heads": 2}),
    "MQA": ("llama", {"num_key_value_heads": 1}),
    "window of 7": ("mistral", {"num_key_value_heads": 12, "sliding_window": 7}),
    "window on some layers": ("qwen2", {"num_key_value_heads": 24, **SOME_LAYERS}),
    "longrope": ("phi3", {"num_key_value_heads": 24, **LONG_ROPE}),
}
HEADS = 24
COMMON = {"num_attention_heads": HEADS, "hidden_size": 4 * HEADS}
STRATEGIES = {
    "ddp": {},
    "fsdp2": {"strategy": {"fsdp": "fsdp2"}},
    "zero3": {"strategy": {"deepspeed": "zero3"}},
}


def degrees_of(world: int, kv_heads: int) -> list[list[int]]:
    """Every (ulysses, ring) that the heads allow."""
    return [[u, world // u] for u in range(world, 0, -1) if world % u == 0 and fits_heads(u, HEADS, kv_heads)]


def fitting(name: str) -> dict[str, Any]:
    """A model's settings; longrope's factors are half as many as a head has numbers."""
    settings = {**COMMON, **MODELS[name][1]}
    if name == "longrope":
        rope = settings["rope_parameters"]
        settings["rope_parameters"] = {**rope, "short_factor": [1.0, 2.0], "long_factor": [4.0, 9.0]}
    return settings


Cells = dict[tuple[str, str, str], dict[str, float]]


def attention_cells(gang: Any) -> Cells:
    """(row, "u x r", model) -> differences. The reference takes each sequence alone, and longrope looks at the longest
    one of a row, so a row of one sequence is what it can be compared on."""
    found: Cells = {}
    for model, (family, _) in MODELS.items():
        kinds = [kind for kind, row in ROWS.items() if model != "longrope" or len(row["lengths"]) == 1]
        for world in WORLDS:
            settings, rows = fitting(model), [ROWS[kind] for kind in kinds]
            degrees = degrees_of(world, settings["num_key_value_heads"])
            arguments = {"family": family, "settings": settings, "dtype": "float32", "degrees": degrees}
            of_ranks = gang.run(FILE, "compare", world, seconds=600, rows=rows, **arguments)
            for kind, cells in zip(kinds, zip(*of_ranks, strict=True), strict=True):
                for (ulysses, ring), each in zip(degrees, zip(*cells, strict=True), strict=True):
                    assert all(cell["size"] > 0 for cell in each)
                    worst = {name: max(cell[name] for cell in each) for name in ("loss", "logps", "gradients")}
                    found[kind, f"{ulysses} x {ring}", model] = worst
    return found


class Curves:
    """Runs of five steps through the whole training page, and the same on one rank."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self._alone = runs, {}
        folder = runs.folder
        heads = {"num_attention_heads": 8, "hidden_size": 32}
        models = {
            "eight": chat_model.save_chat_model(folder / "eight", **heads, num_key_value_heads=8),
            "one": chat_model.save_chat_model(folder / "one", **heads, num_key_value_heads=1),
            "window": chat_model.save_chat_model(folder / "window", **heads, num_key_value_heads=8),
        }
        config = models["window"] / "config.json"  # the same weights and names, with a window
        values = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 9}
        config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
        self._models = {name: {"model": {"path": str(path)}} for name, path in models.items()}
        small = {"global_batch_size": 4}
        self.cases: dict[str, tuple[str, dict[str, Any]]] = {
            "dense": ("sft", {**self._models["eight"], "train": {**small, "micro_batch_size": 1}}),
            "packed": ("sft", {**self._models["eight"], "data": {"packing": True}, "train": small}),
            "unequal rows": ("sft", {**self._models["eight"], "train": {**small, "micro_batch_size": 4}}),
            "window": ("sft", {**self._models["window"], "train": small}),
            "1 kv head": ("sft", {**self._models["one"], "train": small}),
            "DPO": ("rlhf", {**self._models["eight"], "train": small}),
            "DPO, LoRA": ("rlhf", {**self._models["eight"], "train": small, "tuner": LORA}),
        }

    def difference(self, case: str, world: int, strategy: str) -> float:
        """Largest relative difference of loss and gradient norm."""
        task, changes = self.cases[case]
        if case not in self._alone:
            self._alone[case] = curve(self.runs.run(self.runs.job(task, **changes), 1, seconds=600)[0])
        job = self.runs.job(task, parallel={"context_parallel_size": world}, **changes, **STRATEGIES[strategy])
        found, right = curve(self.runs.run(job, world, seconds=600)[0]), self._alone[case]
        assert len(found) == len(right) == 5 and right[0] != right[-1]
        return max(abs(a - b) / abs(b) for x, y in zip(found, right, strict=True) for a, b in zip(x, y, strict=True))


CurveCells = dict[tuple[str, str, int], float]


def curve_cells(curves: Curves) -> CurveCells:
    """(case, strategy, N) -> difference."""
    cells = [(case, s, world) for case in curves.cases for world in WORLDS for s in STRATEGIES]
    return {(case, s, world): curves.difference(case, world, s) for case, s, world in cells}


def page(attention: Cells, runs: CurveCells) -> str:
    names = ("torch", "transformers", "deepspeed", "peft")
    lines = [
        "# Rows that ranks share, beside one process",
        "",
        f"Largest relative differences in fp32; allowed: {TOLERANCE:g}. `make tables` makes this page",
        "(`tests/engines/hf/test_shared_table.py`).",
        "",
        f"{datetime.datetime.now(datetime.UTC).date()}; Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in names)
        + "; CPU, gloo",
        "",
        "## Attention",
        "",
        "Loss / log-probabilities / any weight's gradient (by the largest of all), against each sequence alone through",
        f"transformers' own attention. u x r: Ulysses x ring, all that {HEADS} query and the key-value heads allow",
        "(`-`: they do not; longrope is compared on rows of one sequence).",
    ]
    degrees = list(dict.fromkeys(key[1] for key in attention))
    for kind, row in ROWS.items():
        filling = f", {row['filling']} tokens of filling" if row["filling"] else ""
        lines += [
            "",
            f"### {kind[0].upper()}{kind[1:]}: sequences of {', '.join(map(str, row['lengths']))}{filling}",
            "",
        ]
        lines += ["| u x r | " + " | ".join(MODELS) + " |", "|---" * (1 + len(MODELS)) + "|"]
        for each in degrees:
            cells = (attention.get((kind, each, model)) for model in MODELS)
            words = (" / ".join(f"{n:.0e}" for n in cell.values()) if cell else "-" for cell in cells)
            lines.append(f"| {each} | " + " | ".join(words) + " |")
    cases = list(dict.fromkeys(key[0] for key in runs))
    lines += ["", "## Whole runs", ""]
    lines += ["Loss and gradient norm of five steps of `swift-dist sft` and `rlhf` against one rank.", ""]
    lines += ["| | N | " + " | ".join(cases) + " |", "|---" * (2 + len(cases)) + "|"]
    for strategy in STRATEGIES:
        for world in WORLDS:
            words = (f"{runs[case, strategy, world]:.0e}" for case in cases)
            lines.append(f"| {strategy} | {world} | " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


@pytest.mark.table
@pytest.mark.timeout(7200)
def test_whole_table(gang: Any, tmp_path: Path) -> None:
    attention = attention_cells(gang)
    runs = curve_cells(Curves(Runs(gang, tmp_path)))
    PAGE.write_text(page(attention, runs))
    wrong = {key: cell for key, cell in attention.items() if not max(cell.values()) <= TOLERANCE}
    assert not wrong and all(difference <= TOLERANCE for difference in runs.values())
