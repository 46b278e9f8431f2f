"""A deployment of the hf engine, of a run that it follows and of a model for embeddings, through the openai client.

Its processes have a proxy in their environment that nobody answers at: it is not for servers of their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_model import save_chat_model
from deployment import Deployment, free_port, wait_until
from openai import BadRequestError, OpenAI

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


def save_embedder(folder: Path, seed: int) -> Path:
    """A model without a head."""
    from transformers import LlamaModel

    LlamaModel.from_pretrained(save_chat_model(folder, seed=seed)).save_pretrained(folder)
    return folder


def vector_of(model: Path, text: str) -> list[float]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(text)["input_ids"]])
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(model, dtype=torch.float32)(ids).last_hidden_state[0, -1]
    return list(torch.nn.functional.normalize(hidden, dim=0).tolist())


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder") / "first", seed=5)


@pytest.fixture(scope="module")
def deployment(run: Path, embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    words = ["--follow", str(run), "--served_model_name", "chat", "--infer_backend", "hf", "--dtype", "fp32"]
    words += ["--models", f"vectors={embedder}", "--max_num_seqs", "16", "--model_options", "vectors.max_model_len=64"]
    dead = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), f"http://127.0.0.1:{free_port()}")
    dead |= {"no_proxy": "", "NO_PROXY": ""}
    with Deployment(tmp_path_factory.mktemp("run") / "deployment", *words, variables=dead) as running:
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
    cards = [(card.id, card.task) for card in client.models.list()]
    assert cards == [("chat", "generate"), ("vectors", "embed")]


def test_text_and_embeddings_behind_one_address(deployment, client, embedder):
    texts = ["the red moon", "seven"]
    answer = client.embeddings.create(model="vectors", input=texts, encoding_format="float")
    for entry, text in zip(answer.data, texts, strict=True):
        assert entry.embedding == pytest.approx(vector_of(embedder, text), abs=1e-5)
    with pytest.raises(BadRequestError, match="64"):
        client.embeddings.create(model="vectors", input="moon " * 200)
    with pytest.raises(BadRequestError, match="served for embeddings"):
        client.chat.completions.create(**{**ASKED, "model": "vectors"})
    with pytest.raises(BadRequestError, match="served for text"):
        client.embeddings.create(model="chat", input=texts)
    shown = deployment.change("--status").stdout
    assert "chat  text\n" in shown and "vectors  embeddings\n" in shown
    assert f"logs: {deployment.folder.logs}" in shown and shown.count("1 of 1 replicas ready") == 2
    load = deployment.change("--load_adapter", f"a={embedder}", "--served_model_name", "vectors")
    assert load.returncode == 1 and "vectors is served for embeddings" in load.stderr


def test_a_model_is_replaced_by_one_for_the_same(deployment, client, embedder, tmp_path):
    refused = deployment.change("--update", str(embedder), "--served_model_name", "chat")
    assert refused.returncode == 2 and "is for embeddings" in refused.stderr
    assert "served_model_name: there are several" in deployment.change("--update", str(embedder)).stderr
    second = save_embedder(tmp_path / "second", seed=6)
    done = deployment.change("--update", str(second), "--served_model_name", "vectors")
    assert done.returncode == 0, done.stderr
    answer = client.embeddings.create(model="vectors", input="the red moon", encoding_format="float")
    assert answer.data[0].embedding == pytest.approx(vector_of(second, "the red moon"), abs=1e-5)


def test_a_new_checkpoint_replaces_the_model_and_a_damaged_one_does_not(deployment, client, run):
    second = save_checkpoint(run, 2, seed=1)
    wait_until(lambda: "step_2 is deployed" in deployment.stderr, 120, "the second checkpoint")
    answer = expected(second)
    assert answer != expected(run / "checkpoints" / "step_1")
    assert said(client) == answer
    damaged = shutil.copytree(second, run / "checkpoints" / "step_3")
    (damaged / "model.safetensors").unlink()
    point_to(run, "step_3")
    wait_until(lambda: "step_3 is skipped" in deployment.stderr, 120, "the damaged checkpoint")
    assert said(client) == answer
