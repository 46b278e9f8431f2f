"""Findings provoked for real on this machine: what is found and what to do."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from looking import look_here, only

from swift_dist.doctor.checks import hf_cache, ports
from swift_dist.doctor.examine import all_checks, examine
from swift_dist.doctor.team import LocalTeam
from swift_dist.doctor.values import Check, Exam, Finding, Node, everywhere
from swift_dist.errors import JobError


def test_a_healthy_machine_has_nothing_bad(tmp_path: Path) -> None:
    began = time.monotonic()
    report = look_here(tmp_path, seconds=200)
    assert report.bad == []
    assert {finding.check for finding in report.findings} == set(all_checks())
    assert time.monotonic() - began < 150
    assert list(tmp_path.iterdir()) == [], "canaries are taken away"


def test_a_full_disk(tmpfs: Callable[..., Path]) -> None:
    disk = tmpfs("disk", "size=8m")
    (disk / "fill").write_bytes(bytes(7 * 2**20))
    found = only(look_here(disk, "space", checkpoint_bytes=3 * 2**20, num_checkpoints=3))
    assert found.level == "bad" and f"1.0 MiB free at {disk}" in found.found
    assert "needs 9.0 MiB for 3 checkpoints of 3.0 MiB" in found.found
    assert "--output DIR" in found.advice and "checkpoint.keep" in found.advice
    (disk / "fill").unlink()
    assert only(look_here(disk, "space", checkpoint_bytes=2 * 2**20, num_checkpoints=3)).level == "ok"
    held = only(look_here(disk, "space", checkpoint_bytes=3 * 2**20, num_checkpoints=3, held_bytes=3 * 2**20))
    assert held.level == "ok" and "needs 6.0 MiB" in held.found and "of which 3.0 MiB lie there" in held.found


def test_a_disk_without_room_for_files(tmpfs: Callable[..., Path]) -> None:
    disk = tmpfs("disk", "size=2g,nr_inodes=50")
    bad = [f for f in look_here(disk, "space").findings if f.level == "bad"]
    assert [f.found.split(" ")[1:3] for f in bad] == [["files", "more"]] and "--output DIR" in bad[0].advice


def test_an_unwritable_share(tmpfs: Callable[..., Path]) -> None:
    share = tmpfs("share", "size=1m,ro")
    found = only(look_here(share, "shared_folder"))
    assert (found.level, found.node) == ("bad", "here")
    assert found.found == f"{share} cannot be written: Read-only file system"
    assert "writable on every node: --output DIR" in found.advice


def test_a_share_that_is_not_there(tmp_path: Path) -> None:
    found = only(look_here(tmp_path / "nowhere", "shared_folder"))
    assert found.level == "bad" and "there is no such folder" in found.found


def test_a_full_share_cannot_take_the_canary(tmpfs: Callable[..., Path]) -> None:
    share = tmpfs("share", "size=64k")
    with pytest.raises(OSError), (share / "fill").open("wb") as stream:
        while True:
            stream.write(bytes(4096))
    found = only(look_here(share, "shared_folder"))
    assert found.level == "bad" and "No space left on device" in found.found


def test_a_blocked_port_is_named_with_who_holds_it(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("", 19120))
        holder.listen(1)
        found = only(look_here(tmp_path, "ports", bands={"torchrun": (19120, 19129)}))
        assert found.level == "warn" and "1 of the 10 ports 19120-19129 (torchrun) are taken: 19120 (" in found.found
        assert f"process {os.getpid()})" in found.found and "end what holds them" in found.advice
        assert only(look_here(tmp_path, "ports", bands={"torchrun": (19120, 19121)})).level == "bad"
    assert only(look_here(tmp_path, "ports", bands={"torchrun": (19120, 19129)})).level == "ok"


def test_ports_are_held_all_at_once_and_released() -> None:
    assert ports._taken(range(19200, 19300)) == []
    with socket.socket() as after:
        after.bind(("", 19250))


def test_a_band_inside_the_kernels_own_range(tmp_path: Path) -> None:
    ephemeral = ports._ephemeral()
    assert ephemeral is not None
    found = look_here(tmp_path, "ports", bands={"x": (ephemeral[0], ephemeral[0] + 1)}).findings[0]
    assert "the kernel may give ports of" in found.found and "ip_local_reserved_ports" in found.advice


def test_a_missing_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift_dist.doctor.checks.gpus.device_files", lambda: 1)
    monkeypatch.setattr("swift_dist.doctor.checks.gpus.load_nvml", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = only(look_here(tmp_path, "gpus", gpus=2))
    assert found.level == "bad" and found.found == "1 of the 2 GPUs that are needed"
    assert "nvidia-smi" in found.advice and "--nproc_per_node" in found.advice


def test_a_gpu_that_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift_dist.doctor.checks.gpus.device_files", lambda: 2)
    monkeypatch.setattr("swift_dist.doctor.checks.gpus.load_nvml", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "CUDA_VISIBLE_DEVICES hides" in only(look_here(tmp_path, "gpus", gpus=2)).advice


@pytest.mark.slow
def test_torch_without_the_gpus_that_are_needed(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = only(look_here(tmp_path, "accelerator", gpus=2, seconds=60))
    assert found.level == "bad"
    assert "2 GPUs" in found.found and ("CUDA build" in found.advice or "driver" in found.advice)


def test_few_open_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
        found = next(f for f in look_here(tmp_path, "limits").findings if f.level == "bad")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.found == "at most 1000 open files (ulimit -n)" and "ulimit -n 65535" in found.advice


def test_an_unwritable_cache_is_bad_only_for_who_fetches(tmpfs: Callable[..., Path], tmp_path: Path) -> None:
    cache = tmpfs("cache", "size=1m,ro")
    settings = {"variables": {"HF_HOME": str(cache)}}
    assert only(look_here(tmp_path, "hf_cache", **settings)).level == "warn"
    found = [f for f in look_here(tmp_path, "hf_cache", hub_ids=("a/b",), **settings).findings if "written" in f.found]
    assert found[0].level == "bad" and f"{cache}/hub cannot be written: Read-only" in found[0].found
    assert "export HF_HOME=" in found[0].advice


def test_the_cache_is_found_as_the_hub_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert hf_cache.cache_folder(dict(os.environ)) == Path(constants.HF_HUB_CACHE)
    assert hf_cache.cache_folder({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert hf_cache.cache_folder({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}) == Path("/b/hub")
    assert hf_cache.cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")


def test_missing_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "WANDB_MODE", "HF_HUB_OFFLINE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    needs = {"hub_ids": ("meta/gated",), "trackers": ("wandb", "mlflow")}
    hub, tracker = sorted(look_here(tmp_path, "tokens", **needs).findings, key=lambda f: f.level, reverse=True)
    assert (hub.level, hub.found) == ("warn", "no HF_TOKEN for meta/gated") and "export HF_TOKEN" in hub.advice
    assert tracker.level == "bad" and "no WANDB_API_KEY" in tracker.found and "WANDB_MODE=offline" in tracker.advice
    there = {"variables": {"HF_TOKEN": "set", "WANDB_API_KEY": "set"}}
    assert only(look_here(tmp_path, "tokens", **needs, **there)).level == "ok"
    (tmp_path / "token").write_text("hf_x")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert only(look_here(tmp_path, "tokens", **needs)).level == "ok"
    assert only(look_here(tmp_path, "tokens", trackers=("wandb",), variables={"WANDB_MODE": "offline"})).level == "ok"


def _hang(here: object) -> None:
    threading.Event().wait(60)


def _raise(here: object) -> None:
    raise OSError("Stale file handle")


def _examine(check: Check) -> list[Finding]:
    team = LocalTeam(Node("here"), Exam(token="t", folder="/"), time.monotonic() + 20)
    return examine(team, {"mine": check}).findings


def test_a_node_that_hangs_is_given_up_in_time() -> None:
    began = time.monotonic()
    (found,) = _examine(Check(lambda facts, exam: [], everywhere(_hang), seconds=0.5))
    assert (found.check, found.node, found.level) == ("mine", "here", "bad")
    assert "no answer within" in found.found and "may hang" in found.advice
    assert time.monotonic() - began < 15


def test_an_error_on_a_node_is_a_finding_and_one_of_ours_does_not_end_a_job() -> None:
    (found,) = _examine(Check(lambda facts, exam: [], everywhere(_raise)))
    assert found.level == "bad" and "OSError: Stale file handle" in found.found
    (ours,) = _examine(Check(lambda facts, exam: [][1], lambda team: {}))
    assert ours.level == "warn" and "the check itself failed: IndexError" in ours.found


def test_an_unknown_check_is_told() -> None:
    with pytest.raises(JobError) as caught:
        all_checks(["clocks"])
    assert caught.value.key == "checks" and caught.value.remedy == "--checks clock"
