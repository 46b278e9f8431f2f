"""transformers' logits against those of Megatron checkpoints, loaded by megatron-core itself at several layouts."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4  # relative to the largest logit
TP1, TP2, PP2, EP2 = {"tp": 1}, {"tp": 2}, {"pp": 2}, {"ep": 2}
TP2PP2, PP2VPP2 = {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}
DENSE = [TP1, TP2, PP2, TP2PP2, PP2VPP2]
EXPERTS = [TP1, EP2, PP2, {"tp": 2, "etp": 1}, {"tp": 2, "ep": 2, "etp": 1}, {"ep": 2, "pp": 2}]
# tied embeddings, all biases and padding in one; experts and a dense layer
CELLS: list[tuple[str, list[dict[str, int]]]] = [
    ("llama_biased", DENSE),
    ("qwen3_moe", [EP2]),
]
TABLE: list[tuple[str, list[dict[str, int]]]] = [
    *((name, DENSE) for name in ("llama", "mistral", "qwen2", "qwen3")),
    ("qwen3_moe", EXPERTS),
]


def _tiny_models() -> ModuleType:
    file = Path(__file__).parents[1] / "converters" / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("engines_tests_tiny_models", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_checkpoints(worker: Any, hf: str, folders: dict[str, str]) -> None:
    """In a rank of its own: the folder's weights as torch_dist checkpoints, sound and otherwise."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from swift_dist.engines.megatron import groups, logits, logits_rank, model, state

    request = logits.Request.of({"hf": hf, "layouts": [TP1]})
    layout, job = request.layouts[0].layout(request)
    built = logits_rank.build(worker, job, layout, request.hf_config, 60)
    state.load_pretrained(built, Path(hf))
    for kind, folder in folders.items():
        wanted = logits_rank.request(built)
        if kind == "lacking":
            del wanted["model"]["decoder.layers.1.self_attention.linear_proj.weight"]
        if kind == "changed":
            with torch.no_grad():
                model.unwrap(built.chunks[0]).decoder.layers[1].self_attention.linear_proj.weight[3, 5] += 0.5
        if kind == "surplus":
            other = wanted["model"]["decoder.final_layernorm.weight"].data
            wanted["model"]["other"] = ShardedTensor.from_rank_offsets("decoder.layers.4.other.weight", other)
        if kind == "unpadded":
            for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                real = wanted["model"][key].data[: request.shape.vocab_size].detach()
                wanted["model"][key] = ShardedTensor.from_rank_offsets(key, real)
        Path(folder).mkdir()
        dist_checkpointing.save(wanted, folder, validate_access_integrity=False)
    groups.leave()


def ask_in_a_rank(worker: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The comparison in a fork of a process that has imported everything but transformers."""
    from swift_dist.engines.megatron import logits

    return logits.compare(logits.Request.of(request))


def make(gang: Any, base: Path, name: str, *kinds: str) -> dict[str, str]:
    """A tiny model's folder, and checkpoints of it by kind."""
    hf = base / "hf"
    model = _tiny_models().tiny_model(name, num_hidden_layers=4)
    for parameter in model.parameters():  # sharper attention than what is drawn, or rotations would hardly count
        parameter.data = parameter.data * 4 if parameter.dim() > 1 else parameter.data + 1
    model.save_pretrained(hf)
    folders = {kind: str(base / kind) for kind in kinds}
    gang.run(__file__, "write_checkpoints", 1, hf=str(hf), folders=folders)
    return {"hf": str(hf), **folders}


def check(answer: dict[str, Any], layouts: list[dict[str, int]]) -> None:
    assert answer["prompts"] == [1, 7, 16, 33]
    assert answer["scale"] > 1
    for layout, found in zip(layouts, answer["layouts"], strict=True):
        assert layout.items() <= found.items()
        assert found["error"] is None
        assert 0 < found["relative"] < TOLERANCE, found
        assert found["relative"] == pytest.approx(found["max_difference"] / answer["scale"])
        assert found["same_argmax"] is True


def command(base: Path, **request: Any) -> subprocess.Popen[str]:
    file = base / "request.json"
    file.write_text(json.dumps(request))
    return subprocess.Popen(
        [sys.executable, "-m", "swift_dist.engines.megatron.logits", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(base)},
    )


@pytest.mark.parametrize(("name", "layouts"), CELLS, ids=[name for name, _ in CELLS])
def test_logits_are_those_of_transformers(gang: Any, tmp_path: Path, name: str, layouts: list[dict[str, int]]) -> None:
    files = make(gang, tmp_path, name, "sound")
    request = {"hf": files["hf"], "checkpoint": files["sound"], "layouts": layouts}
    answer = gang.run(__file__, "ask_in_a_rank", 1, request=request)[0]
    check(answer, layouts)


@pytest.mark.table
@pytest.mark.parametrize(("name", "layouts"), TABLE, ids=[name for name, _ in TABLE])
def test_table_of_logits(gang: Any, tmp_path: Path, name: str, layouts: list[dict[str, int]]) -> None:
    test_logits_are_those_of_transformers(gang, tmp_path, name, layouts)


@pytest.fixture(scope="module")
def qwen3(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    kinds = ("sound", "unpadded", "lacking", "surplus", "changed")  # the last one changes the model
    return make(gang, tmp_path_factory.mktemp("qwen3"), "qwen3", *kinds)


def test_the_command_compares_one_rank_and_one_split_by_default(qwen3: dict[str, str], tmp_path: Path) -> None:
    process = command(tmp_path, hf=qwen3["hf"], checkpoint=qwen3["unpadded"])
    answer, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    check(json.loads(answer), [TP1, TP2])
    assert "Warning" not in errors


def test_a_failed_comparison_is_told_by_the_exit_code_and_on_stderr(qwen3: dict[str, str], tmp_path: Path) -> None:
    process = command(tmp_path, hf=qwen3["hf"], checkpoint=qwen3["sound"], layouts=[{"tp": 3}])
    answer, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.endswith(json.loads(answer)["layouts"][0]["error"] + "\n")


def test_one_changed_weight_shows(gang: Any, qwen3: dict[str, str]) -> None:
    request = {"hf": qwen3["hf"], "checkpoint": qwen3["changed"], "layouts": [TP1], "prompts": [[3, 1, 4, 1, 5]]}
    answer = gang.run(__file__, "ask_in_a_rank", 1, request=request)[0]
    assert answer["prompts"] == [5]
    assert answer["layouts"][0]["relative"] > 10 * TOLERANCE


def test_weights_from_the_folder_itself(gang: Any, qwen3: dict[str, str]) -> None:
    """And a layout that is impossible takes nothing from the one that is not."""
    answer = gang.run(__file__, "ask_in_a_rank", 1, request={"hf": qwen3["hf"], "layouts": [{"tp": 3}, PP2]})[0]
    assert "3 does not divide the model's 4 attention heads" in answer["layouts"].pop(0)["error"]
    check(answer, [PP2])


def not_finite(worker: Any, hf: str) -> list[str]:
    """In a rank of its own: what is said where one prompt's logits, not the first one's, are no numbers."""
    import torch

    from swift_dist.engines.megatron import logits, logits_rank
    from swift_dist.errors import RunError

    sound, broken = torch.ones(1, 4), torch.full((1, 4), torch.nan)
    said = []
    for call in (
        lambda: logits._reference(Path(hf), [[1], [2, 5]], Path(hf) / "reference.pt", None),
        lambda: logits_rank._difference([sound, sound], [sound, broken]),
        lambda: logits_rank._difference([sound, broken], [sound, sound]),
    ):
        try:
            call()
        except RunError as error:
            said.append(error.message)
    return said


def test_logits_that_are_no_numbers_are_not_compared(gang: Any, tmp_path: Path) -> None:
    model = _tiny_models().tiny_model("qwen3")
    model.model.embed_tokens.weight.data[5] = float("nan")
    model.save_pretrained(tmp_path)
    reference, *differences = gang.run(__file__, "not_finite", 1, hf=str(tmp_path))[0]
    assert "those of prompts[1] are not finite" in reference
    assert [text.partition(":")[0] for text in differences] == [
        "the reference logits are not finite",
        "the logits are not finite",
    ]


@pytest.mark.parametrize(("kind", "layout", "reason"), [
    ("lacking", PP2, "lacks weights of the model: decoder.layers.1.self_attention.linear_proj.weight"),
    ("surplus", TP1, "holds weights that the model has not: decoder.layers.4.other.weight"),
])  # fmt: skip
def test_another_model_is_an_error_of_the_layout(
    gang: Any, qwen3: dict[str, str], kind: str, layout: dict[str, int], reason: str
) -> None:
    request = {"hf": qwen3["hf"], "checkpoint": qwen3[kind], "layouts": [layout], "prompts": [[1, 2]]}
    found = gang.run(__file__, "ask_in_a_rank", 1, request=request)[0]["layouts"][0]
    assert reason in found["error"]
    assert found["max_difference"] is found["relative"] is found["same_argmax"] is None


def hang(worker: Any, folder: str) -> str:
    """Two forked processes that do not answer; what is said of them."""
    from swift_dist.engines.megatron.forked import Processes
    from swift_dist.errors import RunError

    pids = Path(folder) / "pids"
    try:
        with Processes([(_sleep, {"pids": str(pids)})] * 2, Path(folder) / "answers", 0.5) as processes:
            processes.answers("layout tp 2")
    except RunError as error:
        assert not any(_alive(int(pid)) for pid in pids.read_text().split())
        return str(error)
    raise AssertionError("they answered")


def _sleep(pids: str) -> None:
    with Path(pids).open("a") as file:
        file.write(f"{os.getpid()} ")
    time.sleep(600)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_processes_that_hang_are_ended_and_named(gang: Any, tmp_path: Path) -> None:
    assert gang.run(__file__, "hang", 1, folder=str(tmp_path)) == [
        "layout tp 2: no answer from process 0, 1 within 0.5 s"
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_command(qwen3: dict[str, str], tmp_path: Path, number: int) -> None:
    process = command(tmp_path, hf=qwen3["hf"], checkpoint=qwen3["sound"])
    children: list[int] = []
    end = time.monotonic() + 60
    while not children and time.monotonic() < end:
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert children and process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=120)
    end = time.monotonic() + 60
    while any(map(_alive, children)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(_alive, children))
    assert number == signal.SIGKILL or list(tmp_path.iterdir()) == [tmp_path / "request.json"]


def test_a_wrong_request_is_refused(qwen3: dict[str, str], tmp_path: Path) -> None:
    for wrong, key in (
        ({"prompts": [[61]]}, "prompts[0]"),
        ({"layout": [TP1]}, "layout"),
        ({"layouts": [{"dp": 2}]}, "layouts"),
    ):
        process = command(tmp_path, hf=qwen3["hf"], **wrong)
        answer, errors = process.communicate(timeout=200)
        assert (process.returncode, answer) == (2, "")
        assert errors.startswith(f"{key}: ")
