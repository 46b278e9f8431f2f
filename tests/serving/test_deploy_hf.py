"""A deployment of the hf engine that follows a run: what the openai client gets through front and replica."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_model import save_chat_model
from deployment import Deployment, wait_until
from openai import OpenAI

QUESTION = [{"role": "user", "content": "the red moon"}]
ASKED = {"model": "chat", "messages": QUESTION, "temperature": 0, "max_tokens": 12}


def save_checkpoint(run: Path, step: int, seed: int) -> Path:
    """A whole checkpoint, and then its name, in the order of a run."""
    folder = save_chat_model(run / "checkpoints" / f"step_{step}", seed=seed)
    point_to(run, folder.name)
    return folder


def point_to(run: Path, name: str) -> None:
    part = run / "checkpoints" / ".latest"
    part.write_text(name)
    part.replace(run / "checkpoints" / "latest")


def expected(model: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    output = network.generate(**ids, do_sample=False, max_new_tokens=12)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("train") / "run"
    save_checkpoint(run, 1, seed=0)
    return run


@pytest.fixture(scope="module")
def deployment(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    words = ["--follow", str(run), "--served_model_name", "chat", "--infer_backend", "hf", "--dtype", "fp32"]
    with Deployment(tmp_path_factory.mktemp("run") / "deployment", *words) as running:
        yield running.wait_ready()


@pytest.fixture
def client(deployment: Deployment) -> OpenAI:
    return OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=60)


def said(client: OpenAI) -> str:
    return str(client.chat.completions.create(**ASKED).choices[0].message.content)


def test_chat_is_what_transformers_generates(client, run):
    first = expected(run / "checkpoints" / "step_1")
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ASKED, stream=True)]
    assert said(client) == first
    assert "".join(parts) == first
    assert [card.id for card in client.models.list()] == ["chat"]


def test_a_new_checkpoint_replaces_the_model_and_a_damaged_one_does_not(deployment, client, run):
    second = save_checkpoint(run, 2, seed=1)
    wait_until(lambda: "step_2 is deployed" in deployment.stderr, 120, "the second checkpoint")
    answer = expected(second)
    assert answer != expected(run / "checkpoints" / "step_1")
    assert said(client) == answer
    damaged = shutil.copytree(second, run / "checkpoints" / "step_3")
    (damaged / "model.safetensors").unlink()
    point_to(run, "step_3")
    wait_until(lambda: "step_3 is skipped" in deployment.stderr, 30, "the damaged checkpoint")
    assert said(client) == answer
