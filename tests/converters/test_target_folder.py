"""A folder that is published by a process that dies at any step of it: no file that was whole is lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from swift_dist.converters import target_folder
from swift_dist.converters.target_folder import TargetFolder

FILES = {"a.bin": b"one", "b.bin": b"three", "part/c.bin": b"seven"}
IDENTITY = {"source": "x"}


def written(target: Path) -> TargetFolder:
    folder = TargetFolder(target, IDENTITY)
    for name, content in FILES.items():
        path = folder.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        folder.record(name, {})
    return folder


def publish_and_die(folder: TargetFolder, step: int) -> bool:
    """Publish in a child that ends before its call number `step` that changes or syncs the disk; whether it came to the
    end instead."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > step:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        target_folder.sync = counted(target_folder.sync)
        for name in ("unlink", "rename", "rmdir"):
            setattr(Path, name, counted(getattr(Path, name)))
        folder.publish(())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("step", range(12))
def test_a_publisher_that_dies_loses_no_file(tmp_path: Path, step: int) -> None:
    target = tmp_path / "target"
    folder = written(target)
    ended = publish_and_die(folder, step)
    if not target.exists():
        assert not ended
        os.close(folder._lock_fd)  # as the process's end does
        again = TargetFolder(target, IDENTITY)
        assert set(again.written) == set(FILES)
        again.publish(())
        again.close()
    assert {name: (target / name).read_bytes() for name in FILES} == FILES
    if ended:
        assert {path.name for path in target.iterdir()} == {"a.bin", "b.bin", "part"}
    assert not (tmp_path / ".target.partial").exists()


def test_the_steps_above_reach_the_end(tmp_path: Path) -> None:
    assert not publish_and_die(written(tmp_path / "early"), 3)
    assert publish_and_die(written(tmp_path / "late"), 11)
