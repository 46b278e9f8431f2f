from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift_dist.converters.live import LiveChunk, Shard, load_hf_slices
from swift_dist.converters.mapping import expand
from swift_dist.errors import JobError


def live_name(name: str, layer_offset: int, expert_offset: int, grouped: bool) -> str:
    """What a live module calls a global name (the inverse of `global_name`, written independently)."""
    name = re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) - layer_offset}", name)
    name = re.sub(r"local_experts\.(\d+)", lambda found: f"local_experts.{int(found[1]) - expert_offset}", name)
    return re.sub(r"local_experts\.(\d+)\.(linear_fc\d\.weight)", r"\2\1", name) if grouped else name


def build_rank(
    trained: Any, shard: Shard, layers: range, experts: range, *, pieces: str, padded: int, grouped: bool = False
) -> dict[str, torch.Tensor]:
    """Empty (NaN) parameters of one rank's chunk. `pieces`: "e" with the embedding, "o" with the output layer."""
    parameters = {}
    for tensor in expand(trained.rows, layers, experts):
        first = tensor.name.startswith("embedding")
        last = tensor.name.startswith(("output_layer", "decoder.final"))
        if (first and "e" not in pieces) or (last and "o" not in pieces) or (tensor.tied_copy and "e" in pieces):
            continue
        rank, size = (shard.tp_rank, shard.tp_size) if tensor.expert is None else (shard.etp_rank, shard.etp_size)
        part = tensor.shard(rank, size, padded if tensor.padded else None)
        name = live_name(tensor.name, layers.start, shard.expert_offset, grouped)
        parameters[name] = torch.full(part.shape, float("nan"))
    return parameters


def expected_part(name: str, whole: torch.Tensor, rank: int, size: int, padded: int) -> torch.Tensor:
    if "word_embeddings" in name or "output_layer" in name:
        whole = torch.cat([whole, torch.zeros(padded - len(whole), whole.shape[1])])
        return whole.chunk(size)[rank]
    if re.search(r"fc1\.(weight|bias)", name):
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    if re.search(r"linear_qkv\.(weight|bias)$", name):
        return whole.chunk(size)[rank]
    if re.search(r"linear_(proj|fc2)\.weight", name):
        return whole.chunk(size, dim=1)[rank]
    return whole


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
@pytest.mark.parametrize(("tp", "ep", "etp"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2)])
def test_each_rank_gets_its_slices(
    trained: Any, whole: dict[str, torch.Tensor], tp: int, ep: int, etp: int, grouped: bool
) -> None:
    """Three pipeline chunks (1 + 1 + 1 layers), every TP rank, every expert-parallel coordinate."""
    padded, num_experts = 64 * tp, trained.hf.get("num_local_experts", 0)
    for rank in range(tp):
        for ep_rank in range(ep if num_experts else 1):
            local = num_experts // ep
            shard = Shard(rank, tp, rank % etp, etp, expert_offset=ep_rank * local)
            experts = range(shard.expert_offset, shard.expert_offset + local)
            chunks = []
            for layer, pieces in enumerate(("e", "", "o")):
                live = build_rank(
                    trained, shard, range(layer, layer + 1), experts, pieces=pieces, padded=padded, grouped=grouped
                )
                chunks.append(LiveChunk(live, layer_offset=layer))
            assert load_hf_slices(chunks, trained.folder, trained.rows, shard) > 0
            for layer, chunk in enumerate(chunks):
                for tensor in expand(trained.rows, range(layer, layer + 1), experts):
                    name = live_name(tensor.name, layer, shard.expert_offset, grouped)
                    if name in chunk.parameters:
                        at = (rank, tp) if tensor.expert is None else (rank % etp, etp)
                        expected = expected_part(tensor.name, whole[tensor.name], *at, padded)
                        assert torch.equal(chunk.parameters[name], expected), name


def test_values_are_cast_to_the_models_precision(trained: Any, whole: dict[str, torch.Tensor]) -> None:
    live = build_rank(trained, Shard(), range(3), range(4), pieces="eo", padded=64)
    live = {name: tensor.bfloat16() for name, tensor in live.items()}
    load_hf_slices([LiveChunk(live)], trained.folder, trained.rows, Shard())
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    assert torch.equal(live[name], whole[name].bfloat16())


def test_a_parameter_that_no_row_describes_is_an_error(trained: Any) -> None:
    live = build_rank(trained, Shard(), range(3), range(4), pieces="eo", padded=64)
    live["decoder.layers.0.self_attention.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"no row describes.*extra"):
        load_hf_slices([LiveChunk(live)], trained.folder, trained.rows, Shard())


def test_a_model_that_lacks_a_parameter_is_an_error(trained: Any) -> None:
    live = build_rank(trained, Shard(), range(3), range(4), pieces="eo", padded=64)
    del live["decoder.layers.2.self_attention.linear_qkv.layer_norm_weight"]
    with pytest.raises(ValueError, match="layer_norm_weight"):
        load_hf_slices([LiveChunk(live)], trained.folder, trained.rows, Shard())


def test_a_parameter_of_another_shape_is_an_error(trained: Any) -> None:
    live = build_rank(trained, Shard(tp_size=2), range(3), range(4), pieces="eo", padded=128)
    with pytest.raises(ValueError, match="rank 0 of 1 needs"):
        load_hf_slices([LiveChunk(live)], trained.folder, trained.rows, Shard())


def damaged(trained: Any, tmp_path: Path, change: Any) -> Path:
    """A copy of the model's folder after `change` on its tensors."""
    folder = tmp_path / "damaged"
    shutil.copytree(trained.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def refusal(trained: Any, folder: Path) -> str:
    live = build_rank(trained, Shard(), range(3), range(4), pieces="eo", padded=64)
    with pytest.raises(JobError) as caught:
        load_hf_slices([LiveChunk(live)], folder, trained.rows, Shard())
    return str(caught.value)


def test_folders_of_another_model_are_refused(trained: Any, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.surprise"] = tensors.pop(name)
        tensors["model.norm.weight"] = torch.zeros(3)

    message = refusal(trained, damaged(trained, tmp_path, change))
    assert f"missing: {name}" in message
    assert "unexpected: model.surprise" in message
    assert "model.norm.weight: shape [3]" in message


def test_quantised_weights_are_refused(trained: Any, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)

    assert "holds fp8 weights" in refusal(trained, damaged(trained, tmp_path, change))


def test_output_layer_beside_tied_embeddings(trained: Any, tmp_path: Path) -> None:
    """Equal to the embedding it may be there; different it is refused; untied it is a tensor like others."""
    if not trained.hf["tie_word_embeddings"]:
        pytest.skip("not a tied model")
    embedding = trained.tensors["model.embed_tokens.weight"]

    def change(tensors: dict[str, torch.Tensor], values: torch.Tensor) -> None:
        tensors["lm_head.weight"] = values

    different = damaged(trained, tmp_path, lambda tensors: change(tensors, embedding + 1))
    assert "lm_head.weight must repeat" in refusal(trained, different)
    shutil.rmtree(different)
    equal = damaged(trained, tmp_path, lambda tensors: change(tensors, embedding.clone()))
    live = build_rank(trained, Shard(), range(3), range(4), pieces="eo", padded=64)
    load_hf_slices([LiveChunk(live)], equal, trained.rows, Shard())
    assert torch.equal(live["embedding.word_embeddings.weight"][:61], embedding)


def test_files_that_are_not_whole_are_refused(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(trained.folder, folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert "not a whole weight file" in refusal(trained, folder)
    file.unlink()
    assert "no *.safetensors" in refusal(trained, folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "which is missing" in refusal(trained, folder)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "outside the folder" in refusal(trained, folder)
    index.write_text("{")
    assert "cannot be read" in refusal(trained, folder)


def test_sharded_folders_are_read(trained: Any, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(trained.folder).save_pretrained(tmp_path / "s", max_shard_size="20KB")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    live = build_rank(trained, Shard(), range(3), range(4), pieces="eo", padded=64)
    load_hf_slices([LiveChunk(live)], tmp_path / "s", trained.rows, Shard())
    assert all(torch.equal(values[: len(whole[name])], whole[name]) for name, values in live.items())
