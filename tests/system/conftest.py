"""What the tests of whole runs share: a small dataset, and one run that nothing disturbed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from commands import Command
from toy_job import INTERVAL, STEPS, Run, job, write_dataset, write_job


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a small dataset."""
    return write_dataset(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands; what a failed test leaves running is ended."""
    commands: list[Command] = []

    def begin(*words: str, **variables: str) -> Command:
        commands.append(Command(list(words), tmp_path, variables))
        return commands[-1]

    yield begin
    for command in commands:
        command.kill_everything()


@pytest.fixture(scope="session")
def run_words(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command of the run that is disturbed, without its --output."""
    path = tmp_path_factory.mktemp("job") / "job.yaml"
    values = job(
        dataset,
        train={"steps": STEPS},
        checkpoint={"interval": INTERVAL},
        parallel={"tensor_model_parallel_size": 2},
        cluster={"nproc_per_node": 2, "max_failures": 1000},
    )
    return ("pretrain", write_job(path, values), "--json")


@pytest.fixture(scope="session")
def undisturbed(run_words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """That run, with nothing in its way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(run_words, folder / "run")
    command = Command([*run_words, "--output", str(run.output)], folder)
    try:
        assert command.wait() == 0, command.stderr
        assert command.result()["restarts"] == 0
        command.assert_nothing_left()
    finally:
        command.kill_everything()
    return run
