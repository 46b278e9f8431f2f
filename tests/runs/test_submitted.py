"""`runs show`, `logs` and `stop` of a run whose job was handed to another system and has not begun there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swift_dist.cli import main
from swift_dist.config import JobConfig
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.submission import write_submission

LAUNCHER = """
from pathlib import Path
from swift_dist.errors import RunError

class Handle:
    def __init__(self, submission):
        self.folder = Path(submission.address)
    def status(self):
        state = (self.folder / "state").read_text()
        if state == "away":
            raise RunError("no answer")
        return state
    def logs(self, follow=False):
        yield from ("queued", "starting", *(("the end",) if follow else ()))
    def stop(self):
        (self.folder / "state").write_text("interrupted")

class Launcher:
    def attach(self, submission):
        return Handle(submission)

LAUNCHER = Launcher()
"""


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system that holds one job, in the state that its file says; the job's run folder is `run` in it."""
    (tmp_path / "their_launcher.py").write_text(LAUNCHER)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "state").write_text("waiting")
    write_submission(tmp_path / "run", {"launcher": "their_launcher:LAUNCHER", "id": "job-7", "address": str(tmp_path)})
    return tmp_path


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_waiting_job_is_shown_and_stopped(system, capsys):
    run = str(system / "run")
    code, shown = ask(capsys, "runs", "show", run)
    assert (code, shown["status"], shown["submission"]["id"]) == (0, "waiting", "job-7")
    assert main(["runs", "show", run]) == 0
    assert "as job-7" in capsys.readouterr().out
    code, stopped = ask(capsys, "runs", "stop", run, "--wait", "5")
    assert (code, stopped["status"], stopped["ended"]) == (0, "interrupted", True)
    code, refused = ask(capsys, "runs", "stop", run)
    assert code == 2 and "is interrupted" in refused["error"]["message"]


def test_its_log_is_the_systems(system, capsys):
    run = str(system / "run")
    _, result = ask(capsys, "runs", "logs", run, "--lines", "1")
    assert [x["text"] for x in result["lines"]] == ["starting"]
    _, result = ask(capsys, "runs", "logs", run, "--follow", "--grep", "e")
    assert [x["text"] for x in result["lines"]] == ["queued", "the end"]
    code, refused = ask(capsys, "runs", "logs", run, "--rank", "0")
    assert code == 2 and refused["error"]["key"] == "rank"


def test_a_system_that_does_not_answer_is_no_reason_to_fail(system, capsys):
    (system / "state").write_text("away")
    code, shown = ask(capsys, "runs", "show", str(system / "run"))
    assert (code, shown["status"]) == (0, "unknown") and "no answer" in shown["message"]


def test_once_the_run_begins_its_folder_speaks(system, capsys):
    folder = RunFolder(system / "run")
    folder.begin(JobConfig())
    (system / "state").write_text("away")  # is not asked
    code, shown = ask(capsys, "runs", "show", str(folder.path))
    assert (code, shown["status"], shown["submission"]["id"]) == (0, "running", "job-7")
    folder.end("done")
    (system / "state").write_text("waiting")
    write_submission(folder.path, {"launcher": "their_launcher:LAUNCHER", "id": "job-8", "address": str(system)})
    _, shown = ask(capsys, "runs", "show", str(folder.path))  # the next job, of the same run
    assert (shown["status"], shown["submission"]["id"]) == ("waiting", "job-8")


def test_an_unknown_launcher_is_named(system, capsys):
    write_submission(system / "run", {"launcher": "no_such", "id": "1", "address": ""})
    code, refused = ask(capsys, "runs", "show", str(system / "run"))
    assert code == 2 and "no_such" in refused["error"]["message"]
