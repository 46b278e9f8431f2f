"""Every tuner under every strategy: trains as in one process, or is refused with the reason.

`pytest tests/engines/hf` runs a covering subset; `pytest -m table tests/engines/hf` all of it, and rewrites
swift_dist/tuners/verified.json, which `swift-dist sft --list-tuners` prints.
"""

from __future__ import annotations

import datetime
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from sft_runs import Runs, curve
from test_runs import STRATEGIES

from swift_dist.errors import JobError
from swift_dist.plugins import names
from swift_dist.tuners._listing import VERIFIED

TOLERANCE = 1e-5
OPTIONS: dict[str, dict[str, Any]] = {
    "freeze": {"ratio": 0.5},
    "galore": {"rank": 4, "interval": 2},
    "lisa": {"active_layers": 1, "interval": 1},
    "llama_pro": {"blocks": 1},
    "adalora": {"initial_rank": 6, "target_rank": 3},
    "qlora": {"compute_dtype": "fp32", "lora_plus_ratio": 4.0},  # rates of their own reach every optimizer
    "neftune": {"alpha": 1e-6},  # noise differs from rank to rank: with more of it, so do losses
}
TUNERS = names("swift_dist.tuners")
COVERED = [("llama_pro", "zero3"), ("ia3", "fsdp2"), ("qlora", "zero2"), ("galore", "ddp"), ("lisa", "fsdp2")]


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, tmp_path_factory.mktemp("matrix"))


def changes(tuner: str) -> dict[str, Any]:
    options = OPTIONS.get(tuner)
    return {"tuner": {"name": [tuner], **({tuner: options} if options else {})}}


class Matrix:
    def __init__(self, runs: Runs) -> None:
        self.runs, self._one = runs, {}

    def cell(self, tuner: str, strategy: str) -> dict[str, Any]:
        """{"refused": reason} or {"difference": of loss and gradient norm from one process}."""
        job = self.runs.job(**changes(tuner), **STRATEGIES[strategy])
        try:
            folder = self.runs.run(job, 2)[0]
        except JobError as error:
            return {"refused": error.message.partition(": ")[2]}
        if tuner not in self._one:
            self._one[tuner] = curve(self.runs.run(self.runs.job(**changes(tuner)), 1)[0])
        return {"difference": _difference(curve(folder), self._one[tuner])}


def _difference(got: list[list[float]], wanted: list[list[float]]) -> float:
    assert len(got) == len(wanted) == 5
    return max(abs(a - b) / abs(b) for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True))


@pytest.fixture(scope="module")
def matrix(runs: Runs) -> Matrix:
    return Matrix(runs)


@pytest.mark.parametrize(("tuner", "strategy"), COVERED)
def test_tuners_train_as_in_one_process(matrix: Matrix, tuner: str, strategy: str) -> None:
    assert matrix.cell(tuner, strategy)["difference"] <= TOLERANCE


def test_refusals_are_those_of_the_table(matrix: Matrix) -> None:
    """What needs no run; a tuner or strategy that the table lacks is noticed."""
    table = json.loads(VERIFIED.read_text())["tuners"]
    assert set(table) == set(TUNERS)
    for tuner, cells in table.items():
        assert set(cells) == set(STRATEGIES)
        for strategy, cell in cells.items():
            job = matrix.runs.job(**changes(tuner), **STRATEGIES[strategy])
            if "refused" in cell:
                with pytest.raises(JobError, match="does not work under"):
                    matrix.runs.resolved(job, 2, matrix.runs.folder / "none")


@pytest.mark.table
@pytest.mark.timeout(3600)
def test_whole_matrix(matrix: Matrix) -> None:
    table = {tuner: {strategy: matrix.cell(tuner, strategy) for strategy in STRATEGIES} for tuner in TUNERS}
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "peft", "deepspeed", "transformers")},
        "tolerance": TOLERANCE,
        "tuners": table,
    }
    Path(VERIFIED).write_text(json.dumps(found, indent=1) + "\n")
    wrong = {
        f"{tuner} under {strategy}": cell
        for tuner, cells in table.items()
        for strategy, cell in cells.items()
        if cell.get("difference", 0) > TOLERANCE
    }
    assert not wrong
