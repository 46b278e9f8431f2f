"""The RayJob manifest: valid field by field, and what its pods get."""

from __future__ import annotations

import copy
import json
import os
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from swift_dist.config import JobConfig
from swift_dist.config.load import load_job, parse_words
from swift_dist.errors import JobError, RunError
from swift_dist.launchers import kuberay
from swift_dist.launchers._base import Submission
from swift_dist.launchers.kuberay import LAUNCHER, name_of
from swift_dist.runs.submission import read_submission

SCHEMA = yaml.safe_load(Path(__file__).with_name("rayjob.schema.yaml").read_text())
WORDS = (
    "--output /shared/runs/My_Run --nnodes 2 --nproc_per_node 8 --cluster.accelerator gpu --train.steps 5 "
    "--launch.kuberay.image registry.example/swift-dist:1 --launch.kuberay.volume_claim data "
    "--launch.kuberay.mount_path /shared --launch.kuberay.node_selector '{gpu: h100}' "
    "--launch.kuberay.tolerations '[{key: gpu, operator: Exists}]'"
)


def job(*more: str) -> JobConfig:
    return load_job(None, [*shlex.split(WORDS), *more])


def check(manifest: dict[str, Any]) -> None:
    """Strictly: unknown fields are errors, in the RayJob and in the pods."""
    jsonschema.validate(manifest, SCHEMA)
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)


def test_the_manifest_is_valid_and_asks_for_what_the_job_needs() -> None:
    manifest = yaml.safe_load(LAUNCHER.render(job()))
    check(manifest)
    spec = manifest["spec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2
    pod = workers["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert pod["nodeSelector"] == {"gpu": "h100"} and pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/dev/shm", "/shared"}
    head = spec["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0", "no rank on the head"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_the_entrypoint_is_the_same_job() -> None:
    words = shlex.split(yaml.safe_load(LAUNCHER.render(job()))["spec"]["entrypoint"])
    assert words[:2] == ["swift-dist", "pretrain"]
    assert load_job(None, words[2:]) == job(
        "--cluster.replacement_timeout", "600"
    )  # for the pod that replaces a lost one
    asked = shlex.split(
        yaml.safe_load(LAUNCHER.render(job("--cluster.replacement_timeout", "5")))["spec"]["entrypoint"]
    )
    assert load_job(None, asked[2:]).cluster.replacement_timeout == 5


BREAK: list[Callable[[dict[str, Any]], Any]] = [
    lambda m: m["spec"].update(entryPoint="x"),
    lambda m: m["spec"].update(backoffLimit="0"),
    lambda m: m["metadata"].update(name="Not_A_Name"),
    lambda m: m["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("minReplicas"),
    lambda m: m["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(nodeSelektor={}),
    lambda m: m["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].pop("name"),
]


@pytest.mark.parametrize("number", range(len(BREAK)))
def test_the_check_finds_a_broken_manifest(number: int) -> None:
    manifest = copy.deepcopy(yaml.safe_load(LAUNCHER.render(job())))
    BREAK[number](manifest)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(manifest)


def test_names_are_valid_and_one_for_each_run() -> None:
    names = {name_of(job("--output", path)) for path in ("/a/run", "/b/run", "/a/Run", "/a/" + "x" * 80)}
    assert len(names) == 4
    for name in names:
        jsonschema.validate(name, SCHEMA["properties"]["metadata"]["properties"]["name"])


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--launch.kuberay.image", "none"], "launch.kuberay.image"),
        (["--launch.kuberay.mount_path", "none"], "launch.kuberay.mount_path"),
    ],
)
def test_what_is_missing_is_named(words: list[str], key: str) -> None:
    with pytest.raises(JobError) as caught:
        LAUNCHER.render(job(*words))
    assert caught.value.key == key


KUBECTL = """#!/usr/bin/env bash
printf '%s\n' "$*" >> "$0.calls"
case "$*" in
  *"create -f -"*) cat > "$0.manifest";;
  *"get rayjob"*)
    if [ -e "$0.silent" ]; then rm "$0.silent"; echo no route to host >&2; exit 1; fi
    if [ -e "$0.status" ]; then cat "$0.status"; fi;;
  *"delete rayjob"*) rm -f "$0.status";;
  *logs*) echo line one; echo line two;;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that notes how it is called and answers from a file: no Kubernetes here."""
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


def answer(kubectl: Path, **status: str) -> None:
    Path(f"{kubectl}.status").write_text(json.dumps({"status": status}))


def test_submitting_creates_what_was_rendered_and_follows_its_status(kubectl: Path, tmp_path: Path) -> None:
    sent = job("--output", str(tmp_path / "run"))
    handle = LAUNCHER.submit(sent)
    assert yaml.safe_load(Path(f"{kubectl}.manifest").read_text()) == yaml.safe_load(LAUNCHER.render(sent))
    noted = read_submission(tmp_path / "run")
    assert noted and noted["id"] == name_of(sent)
    again = LAUNCHER.attach(Submission(noted["launcher"], noted["id"], noted["address"]))
    for told, state in (
        ("PENDING", "waiting"),
        ("RUNNING", "running"),
        ("SUCCEEDED", "done"),
        ("STOPPED", "interrupted"),
    ):
        answer(kubectl, jobStatus=told)
        assert handle.status() == again.status() == state
    assert list(handle.logs()) == ["line one", "line two"]
    answer(kubectl, jobStatus="SUCCEEDED")
    assert handle.wait()["state"] == "done" and handle.wait()["output"] == str(tmp_path / "run")
    answer(kubectl, jobStatus="FAILED", message="exit code 2")
    with pytest.raises(RunError, match="ended as failed: exit code 2"):
        handle.wait()
    Path(f"{kubectl}.status").unlink()
    with pytest.raises(JobError, match="was deleted"):
        handle.wait()
    handle.stop()
    assert f"-n default delete rayjob {name_of(sent)} --wait=false" in Path(f"{kubectl}.calls").read_text()


def test_a_cluster_that_does_not_answer_once_is_asked_again(
    kubectl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kuberay, "_POLL_SECONDS", 0.1)
    handle = LAUNCHER.submit(job("--output", str(tmp_path / "run")))
    answer(kubectl, jobStatus="SUCCEEDED")
    silent = Path(f"{kubectl}.silent")
    silent.touch()
    assert handle.wait()["state"] == "done" and "no route to host; asking again" in caplog.text
    answer(kubectl, jobStatus="RUNNING")
    threading.Timer(0.5, Path(f"{kubectl}.status").unlink).start()  # runs stop, from elsewhere
    assert handle.wait()["state"] == "interrupted"
    answer(kubectl, jobStatus="", jobDeploymentStatus="Failed", reason="no such image")
    assert handle.status() == "failed"
    with pytest.raises(RunError, match="ended as failed: no such image"):
        handle.wait()
    monkeypatch.setattr(kuberay, "_PATIENCE_SECONDS", -1)
    silent.touch()
    with pytest.raises(RunError, match="no route to host"):
        handle.wait()


def test_an_earlier_attempt_makes_room_only_after_its_end(kubectl: Path, tmp_path: Path) -> None:
    sent = job("--output", str(tmp_path / "run"))
    answer(kubectl, jobStatus="RUNNING")
    with pytest.raises(JobError, match="has not ended"):
        LAUNCHER.submit(sent)
    answer(kubectl, jobStatus="", jobDeploymentStatus="Initializing")
    with pytest.raises(JobError, match="has not ended"):
        LAUNCHER.submit(sent)
    assert not Path(f"{kubectl}.manifest").exists()
    answer(kubectl, jobStatus="FAILED")
    LAUNCHER.submit(sent)
    calls = Path(f"{kubectl}.calls").read_text().splitlines()
    assert calls[-2:] == [f"-n default delete rayjob {name_of(sent)}", "-n default create -f -"]


def test_without_kubectl_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JobError, match="kubectl apply -f"):
        LAUNCHER.submit(job())


def test_options_are_keys_of_the_job() -> None:
    assert parse_words(["--launch.kuberay.cpus", "4"], JobConfig) == {"launch.kuberay.cpus": 4}
