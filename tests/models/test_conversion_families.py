"""Families that are converted but not trained: their rows against megatron-core's own model, parameter by parameter,
and the numbers of the filled model against transformers'.

The model is built from megatron's layer spec for Transformer Engine, with its parts in plain torch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_dist.converters.mapping import TensorMap, checkpoint_key, expand, global_name, slices
from swift_dist.engines.megatron import cpu_shim
from swift_dist.models import find_family

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, window": ("mixtral", {"sliding_window": 5}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2_lite, yarn": ("deepseek_v2_lite", {"rope_parameters": YARN}),
    "deepseek_v2, no dense layer": ("deepseek_v2", {"first_k_dense_replace": 0}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3, yarn": ("deepseek_v3", {"rope_parameters": YARN}),
    "deepseek_v3_mtp": ("deepseek_v3_mtp", {}),
}


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    """megatron-core on this CPU, as the only rank."""
    undo = cpu_shim.apply()
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    undo()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, megatron: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """.folder, .tensors, .hf, .family; .maps (by global name), .model (megatron's, filled from them)."""
    from safetensors.torch import load_file, save_file

    name, changes = CASES[request.param]
    folder = tmp_path_factory.mktemp("model")
    tiny_models().save_tiny_model(name, folder, **changes)
    hf = json.loads((folder / "config.json").read_text())
    tensors = {key: livelier(key, values) for key, values in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    family = find_family(hf)
    hf = family.for_folder(hf, tensors.keys())
    maps = {tensor.name: tensor for tensor in expand(family.rows(hf))}
    model = build(family, hf)
    fill(model, maps, tensors)
    return SimpleNamespace(folder=folder, tensors=tensors, hf=hf, family=family, maps=maps, model=model)


def livelier(name: str, values: torch.Tensor) -> torch.Tensor:
    """Weights so large that every nonlinearity shows: with small ones gate and up change places unnoticed."""
    return 1 + 4 * values if "norm" in name else 6 * values


def tiny_models() -> Any:
    file = Path(__file__).parents[1] / "converters" / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("models_tests_tiny_models", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build(family: Any, hf: dict[str, Any]) -> Any:
    """megatron's GPTModel of a config, by its own layer spec for Transformer Engine."""
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    arguments = family.transformer_config(hf)
    kind = MLATransformerConfig if "multi_latent_attention" in arguments else TransformerConfig
    config = kind(**arguments, moe_token_dispatcher_type="alltoall", bias_dropout_fusion=False)
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    backend = torch_backend()
    with pytest.MonkeyPatch.context() as patch:  # these two names exist there only where Transformer Engine imports
        patch.setattr(specs, "TESpecProvider", backend, raising=False)
        patch.setattr(specs, "TENorm", backend().layer_norm(), raising=False)
        block = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True)
        mtp = specs.get_gpt_mtp_block_spec(config, block, use_transformer_engine=True)
    return GPTModel(config, block, **family.gpt_model(hf), mtp_block_spec=mtp).eval()


def torch_backend() -> Any:
    """The engine's parts and, for latent attention, what it has not built yet."""
    from swift_dist.engines.megatron.attention import DotProductAttention
    from swift_dist.engines.megatron.spec import TorchBackend

    class CoreAttention(DotProductAttention):
        def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **rest: Any):
            super().__init__(*args, **rest)

    class Backend(TorchBackend):
        def core_attention(self) -> type:
            return CoreAttention

        def linear(self) -> type:  # the same parameters as TELinear's: on one rank nothing is split
            return self.column_parallel_linear()

    return Backend


def live_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and what else a checkpoint holds, by global name."""
    found = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()
    }
    return {global_name(name): tensor for name, tensor in found.items()}


@torch.no_grad()
def fill(model: Any, maps: dict[str, TensorMap], tensors: dict[str, torch.Tensor]) -> None:
    for name, live in live_tensors(model).items():
        for piece in maps[name].pieces:
            live[slices(piece.megatron_box)] = tensors[piece.hf][slices(piece.hf_box)]


def test_rows_name_every_tensor_of_megatrons_model_with_its_shape(case: SimpleNamespace) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in live_tensors(case.model).items()}
    assert shapes == {name: tensor.shape for name, tensor in case.maps.items()}


def test_what_keeps_its_dtype_is_what_megatron_keeps_in_float32(case: SimpleNamespace) -> None:
    kept = {name for name, tensor in case.maps.items() if tensor.keep_dtype}
    assert kept == {name for name in case.maps if name.endswith("router.expert_bias")}


def test_checkpoints_have_the_keys_and_shapes_of_the_rows(case: SimpleNamespace) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    sharded = case.model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    stored = {entry.key: entry.global_shape for entry in flatten(sharded) if isinstance(entry, ShardedTensor)}
    expected = {}
    for name, tensor in case.maps.items():
        key, expert = checkpoint_key(name)
        shape = tensor.shape if expert is None else (case.model.config.num_moe_experts, *tensor.shape)
        expected[key] = shape
    assert stored == expected


def flatten(sharded: dict[str, Any]) -> Iterator[Any]:
    """Tensors as a checkpoint stores them: what is stored as several is taken apart by its factory."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    apply_factories(sharded)
    yield from nested_values(sharded)


def tokens(case: SimpleNamespace) -> torch.Tensor:
    return torch.randint(0, case.hf["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_are_those_of_transformers(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    inputs = tokens(case)
    expected = AutoModelForCausalLM.from_pretrained(case.folder)(inputs).logits
    monkeypatch.setattr(case.model, "mtp_process", False)  # it is for training: megatron asks for labels
    monkeypatch.setattr(case.model.config, "mtp_num_layers", None)
    logits = case.model(inputs, torch.arange(inputs.shape[1]).expand_as(inputs), None)
    assert expected.std() > 1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_multi_token_prediction_is_that_of_transformers(case: SimpleNamespace) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    if not case.hf.get("num_nextn_predict_layers"):
        assert not any(name.startswith("mtp.") for name in case.maps)
        return
    main = AutoModelForCausalLM.from_pretrained(case.folder)
    # transformers finds the layer by what its class does not load, which is written down as number 61
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{case.hf['num_hidden_layers']}.*"]
    theirs = MtpModel.from_pretrained(main).layers[0]
    generator = torch.Generator().manual_seed(0)
    embedded, hidden = (torch.randn(2, 32, case.hf["hidden_size"], generator=generator) for _ in range(2))
    positions = torch.arange(32)[None]
    rotary = main.model.rotary_emb(hidden, positions)
    expected = theirs(embedded, hidden, rotary, None, positions, None)
    got = case.model.mtp.layers[0]._proj_and_transformer_layer(
        hidden_states=hidden.transpose(0, 1), decoder_input=embedded.transpose(0, 1), attention_mask=None
    )
    torch.testing.assert_close(got.transpose(0, 1), expected, rtol=1e-4, atol=1e-4)
