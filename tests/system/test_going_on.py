"""Runs that begin where another one stood, and runs that end at a step which should not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import Command
from same_end import assert_same_checkpoint, metrics
from toy_job import INTERVAL, STEPS, Run

from swift_dist.checkpoint import open_checkpoint

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
Start = Callable[..., Command]


def test_another_runs_checkpoint_goes_on_to_the_same_end(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    loaded = undisturbed.output / "checkpoints" / f"step_{STEPS - INTERVAL}"
    output = tmp_path / "run"
    command = start(*undisturbed.words, "--checkpoint.load", str(loaded), "--output", str(output))
    assert command.wait() == 0, command.stderr
    assert_same_checkpoint(output, undisturbed)
    assert metrics(output) == metrics(undisturbed.output)[-INTERVAL:]


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        # its step would be another place in the data
        (("--train.global_batch_size", "16"), "train.global_batch_size", "--train.global_batch_size 8"),
        (("--train.steps", "3"), "train.steps", f"--train.steps {STEPS + 3} for 3 more"),
        (
            ("--train.steps", "50", "--model.config.num_hidden_layers", "2"),
            "checkpoint.load",
            "give the job that model",
        ),
    ],
)
def test_what_cannot_go_on(
    undisturbed: Run, start: Start, tmp_path: Path, words: tuple[str, ...], key: str, remedy: str
) -> None:
    words = ("--checkpoint.load", str(undisturbed.output), *words)
    command = start(*undisturbed.words, *words, "--output", str(tmp_path / "run"))
    assert command.wait() == 2, command.stderr
    error = command.result()["error"]
    assert error["key"] == key and remedy in error["remedy"]
    assert not (tmp_path / "run").exists()


def test_a_finished_run_starts_nothing(undisturbed: Run, start: Start) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.output.rglob("*")}
    command = start(*undisturbed.words, "--output", str(undisturbed.output))
    assert command.wait() == 0, command.stderr
    assert (command.result()["state"], command.result()["step"]) == ("done", STEPS)
    assert f"is at step {STEPS} of {STEPS}: raise train.steps to go on" in command.stderr
    assert {path: path.stat().st_mtime_ns for path in undisturbed.output.rglob("*")} == before


def test_a_dry_run_says_what_more_steps_do_to_the_rate(undisturbed: Run, start: Start) -> None:
    command = start(*undisturbed.words, "--output", str(undisturbed.output), "--train.steps", "80", "--dry-run")
    assert command.wait() == 0, command.stderr
    (warning,) = command.result()["warnings"]
    assert f"the learning rate jumps at step {STEPS + 1} from " in warning
    words = ("--train.steps", "80", "--schedule.decay_steps", str(STEPS), "--dry-run")
    command = start(*undisturbed.words, "--output", str(undisturbed.output), *words)
    assert command.wait() == 0 and command.result()["warnings"] == []


def test_what_a_launcher_would_start_can_be_saved(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    """Alone with --render, as a comment below the job with --dry-run; a wrong job is refused by both."""
    more = ("--output", str(tmp_path / "run"), "--launcher", "slurm", "--cluster.accelerator", "cpu")
    words = [word for word in undisturbed.words if word != "--json"]
    rendered, planned = (start(*words, *more, how) for how in ("--render", "--dry-run"))
    assert rendered.wait() == planned.wait() == 0, rendered.stderr + planned.stderr
    script, plan = rendered.out.read_text(), planned.out.read_text()
    assert script.startswith("#!/usr/bin/env bash\n") and "\nray_cluster_run swift-dist pretrain" in script
    assert yaml.safe_load(plan)["output"] == str(tmp_path / "run")  # still a job file
    assert "# would run: #!/usr/bin/env bash\n" in plan and "\n#     ray_cluster_run swift-dist pretrain" in plan
    wrong = start(*words, *more, "--render", "--tp", "3")
    assert wrong.wait() == 2 and wrong.out.read_text() == ""
    assert not (tmp_path / "run").exists()


def test_without_ray_nothing_is_asked_of_a_ray_cluster(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    nowhere = ("--cluster.address", "127.0.0.1:1")
    words = (*undisturbed.words, "--output", str(tmp_path / "run"), "--dry-run", *nowhere)
    plans = [start(*words, "--launcher", name) for name in ("torchrun", "local")]
    assert [plan.wait() for plan in plans] == [0, 2], plans[0].stderr
    assert plans[0].result()["cluster"] == "machines that each start a part of it, without Ray"
    assert plans[1].result()["error"]["key"] == "cluster.address"


def test_a_nan_ends_the_run_and_keeps_the_checkpoint_before_it(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    """The first update throws the weights out of range; the checkpoint after it is being written by then."""
    output = tmp_path / "run"
    words = ("--optimizer.lr", "1e30", "--checkpoint.interval", "1")
    command = start(*undisturbed.words, *words, "--output", str(output))
    assert command.wait() == 1, command.stderr
    error = command.result()["error"]
    assert "step 2 (samples 8-15 of the data order): the " in error["message"]
    assert "--train.nan_policy skip" in error["remedy"]
    assert open_checkpoint(output).step == 1
    assert [p.name for p in (output / "checkpoints").glob("step_*")] == ["step_1"]
    command.assert_nothing_left()
