"""Pretraining with data.separate_documents: curves of whole runs of both engines, beside each document run alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_model
import numpy as np
import pytest
import torch
from sft_runs import RANKS, Runs, curve

from swift_dist.config import JobConfig
from swift_dist.config.load import load_job
from swift_dist.data.loader import TrainingData
from swift_dist.errors import JobError
from swift_dist.resolve import resolve

LENGTH, EOD = 32, 2
DOCUMENTS = (1, 9, 2, 40, 1, 1, 5, 70, 3, 17, 31, 32, 33, 12, 1)
"""Tokens of each, the end-of-document token included: alone, longer than two samples, from a first to a last place."""
MODELS: dict[str, dict[str, Any]] = {"plain": {}, "window": {"sliding_window": 5}}


def text(prefix: Path, vocabulary: int, eod_id: int | None = EOD) -> str:
    """A prepared dataset of such documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(5)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in DOCUMENTS * 8:
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        ids[-1] = EOD
        builder.add_document(ids, [length])
    builder.finalize(f"{prefix}.idx")
    outputs = {suffix: {"bytes": Path(f"{prefix}.{suffix}").stat().st_size} for suffix in ("bin", "idx")}
    Path(f"{prefix}.manifest.json").write_text(json.dumps({"outputs": outputs, "eod_id": eod_id}))
    return str(prefix)


class Pretraining(Runs):
    """Runs of models of four layers on such text."""

    def __init__(self, gang: Any, folder: Path) -> None:
        super().__init__(gang, folder)
        self.models = {}
        for name, settings in MODELS.items():
            path = chat_model.save_chat_model(folder / name, num_hidden_layers=4)
            if settings:  # a Mistral has the weights of a Llama
                values = json.loads((path / "config.json").read_text())
                values |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **settings}
                (path / "config.json").write_text(json.dumps(values))
            self.models[name] = str(path)
        self.vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
        self.data = {"train": [text(folder / "text", self.vocabulary)], "sequence_length": LENGTH, "workers": None}
        self.references: dict[str, list[list[float]]] = {}

    def pretraining(self, model: str, **changes: Any) -> JobConfig:
        data = {**self.data, "separate_documents": True, **changes.pop("data", {})}
        return self.job("pretrain", model={"path": self.models[model]}, data=data, **changes)

    def documents(self) -> list[list[dict[str, list]]]:
        """The documents of each of five steps, {ids, weights}: with the token that follows the last as its label."""
        job = self.pretraining("plain", data={"separate_documents": False})
        data = TrainingData(job.data, seed=3, global_batch_size=8, micro_batch_size=8, dp_rank=0, dp_size=1)
        steps = []
        for step in range(5):
            (batch,) = data.micro_batches(step)
            found, begin = [], 0
            for row, following in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
                begin = 0
                for place, token in enumerate(row):
                    if token == EOD or place == LENGTH - 1:
                        ids = [*row[begin : place + 1], following[place]]
                        found.append({"ids": ids, "weights": [0.0, *[1.0] * (len(ids) - 1)]})
                        begin = place + 1
            steps.append(found)
        data.close()
        assert {len(sample["ids"]) - 1 for step in steps for sample in step} >= {1, 2, LENGTH}
        return steps

    def reference(self, model: str) -> list[list[float]]:
        if model not in self.references:
            arguments = {"model": self.models[model], "batches": self.documents(), "lr": 5e-3}
            (found,) = self.gang.run(RANKS, "reference", 1, **arguments, adapter=None, seed=3)
            self.references[model] = found
        return self.references[model]


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Pretraining:
    return Pretraining(gang, tmp_path_factory.mktemp("documents"))


TP, PP, CP = (f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
VPP, EVERY = "virtual_pipeline_model_parallel_size", pytest.mark.table
HF, RING = {"engine": "hf"}, {CP: 2, "ulysses_size": 1}
CASES = {
    "megatron": (1, {}, {}),
    "megatron cp2": (2, {CP: 2}, {}),
    "megatron tp2 cp2": (4, {TP: 2, CP: 2, "sequence_parallel": True}, {}),
    "megatron pp2 cp2": (4, {PP: 2, CP: 2}, {}),
    "megatron pp4": (4, {PP: 4}, {}),
    "hf": (2, {}, {**HF, "strategy": {"fsdp": "fsdp2"}}),
    "hf ulysses": (2, {CP: 2}, HF),
    "hf ring": (2, RING, {**HF, "strategy": {"fsdp": "fsdp2"}}),
}
MORE = {
    "megatron cp4": (4, {CP: 4}, {}),
    "megatron cp2 dp2": (4, {CP: 2}, {}),
    "megatron pp2 vpp2": (2, {PP: 2, VPP: 2}, {}),
    "megatron cp2 recompute": (2, {CP: 2}, {"train": {"recompute": "full"}}),
    "megatron cp2 selective": (2, {CP: 2}, {"train": {"recompute": "selective"}}),
    "hf both": (4, {CP: 4, "ulysses_size": 2}, HF),
    "hf zero3": (2, {CP: 2}, {**HF, "strategy": {"deepspeed": "zero3"}}),
    "hf recompute": (2, RING, {**HF, "train": {"recompute": "full"}}),
}
WINDOWED = ("megatron cp2", "hf ring")


@pytest.mark.parametrize(
    ("model", "case"),
    [
        *(("plain", case) for case in CASES),
        *(("window", case) for case in WINDOWED),
        *(pytest.param("plain", case, marks=EVERY) for case in MORE),
        *(pytest.param("window", case, marks=EVERY) for case in (*CASES, *MORE) if case not in WINDOWED),
    ],
)
def test_as_each_document_alone(runs: Pretraining, model: str, case: str) -> None:
    world, parallel, changes = {**CASES, **MORE}[case]
    folder, _ = runs.run(runs.pretraining(model, parallel=parallel, **changes), world)
    found, wanted = curve(folder), runs.reference(model)
    assert len(found) == 5 and wanted[-1] != wanted[0]
    for got, right in zip(found, wanted, strict=True):
        assert got == pytest.approx(right, rel=1e-5)


def test_documents_see_one_another_without_the_key(runs: Pretraining) -> None:
    """And then alike on both engines, with ranks that share samples: the reference above is another curve."""
    parallel, data = {CP: 2}, {"separate_documents": False}
    megatron, hf = (
        curve(runs.run(runs.pretraining("plain", data=data, parallel=parallel, engine=engine), 2)[0])
        for engine in ("megatron", "hf")
    )
    for got, right in zip(hf, megatron, strict=True):
        assert got == pytest.approx(right, rel=1e-5)
    assert abs(hf[0][0] - runs.reference("plain")[0][0]) > 1e-3


@pytest.mark.parametrize("engine", ["megatron", "hf"])
def test_the_command_line_means_the_same_on_both_engines(runs: Pretraining, engine: str, tmp_path: Path) -> None:
    words = f"--model {runs.models['plain']} --dataset {runs.data['train'][0]} --max_length {LENGTH} --train.steps 2"
    words += f" --engine {engine} --sequence_parallel_size 2 --data.separate_documents true"
    found = resolve(load_job(None, words.split()), nproc_per_node=4, on_cuda=False, output=str(tmp_path))
    assert (found.layout.cp, found.layout.dp) == (2, 2) and found.job.data.separate_documents
    bare = text(tmp_path / "bare", runs.vocabulary, eod_id=None)
    with pytest.raises(JobError, match=r"^data\.separate_documents.*\n?.*no end-of-document token"):
        job = load_job(None, [*words.split(), "--dataset", bare])
        resolve(job, nproc_per_node=4, on_cuda=False, output=str(tmp_path))


def test_refused(runs: Pretraining, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="has no effect on sft") as error:
        runs.resolved(runs.job("sft", data={"separate_documents": True}), 1, tmp_path)
    assert error.value.key == "data.separate_documents"
    with pytest.raises(JobError, match="sdpa does not keep packed sequences apart") as error:
        job = runs.pretraining("plain", engine="hf")
        job = job.model_copy(update={"model": job.model.model_copy(update={"attention": "sdpa"})})
        runs.resolved(job, 1, tmp_path)
    assert error.value.key == "data.separate_documents"
    with pytest.raises(JobError, match=r"instead: data\.separate_documents"):
        load_job(None, ["--reset-attention-mask", "true"])
