"""A deployment of the hf engine with a tiny model: what the openai client gets through front and replica."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_model import save_chat_model
from deployment import Deployment
from openai import OpenAI

QUESTION = [{"role": "user", "content": "the red moon"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def deployment(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("run") / "deployment"
    with Deployment(folder, "--model", str(model), "--infer_backend", "hf", "--dtype", "fp32") as running:
        yield running.wait_ready()


def test_chat_is_what_transformers_generates(deployment, model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    output = network.generate(**ids, do_sample=False, max_new_tokens=12)
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    client = OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=60)
    asked = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert whole.choices[0].message.content == expected
    assert "".join(parts) == expected
    assert [card.id for card in client.models.list()] == ["tiny"]
