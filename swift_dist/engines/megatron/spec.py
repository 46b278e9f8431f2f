"""Which class each part of a transformer layer is: transformer-engine's on a GPU where it imports, ours elsewhere."""

from __future__ import annotations

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from swift_dist.engines.megatron.attention import DotProductAttention
from swift_dist.engines.megatron.norm import Norm, NormColumnParallelLinear
from swift_dist.engines.megatron.requirements import have_transformer_engine


class TorchBackend(BackendSpecProvider):
    """The layer's parts in plain torch, fused and named as transformer-engine's are."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return Norm

    def core_attention(self) -> type:
        return DotProductAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules]:
        return SequentialMLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def activation_func(self) -> None:  # type: ignore[override]
        return None  # the configuration's own activation function


def backend() -> BackendSpecProvider:
    """The parts that this machine builds a layer from."""
    if torch.cuda.is_available() and have_transformer_engine():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return TorchBackend()


def block_spec(
    config: TransformerConfig, vp_stage: int | None = None, separate_documents: bool = False
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (of its chunk `vp_stage`) and the final norm.

    Attention is our own wherever documents are kept apart: transformer-engine's wants each document's length to be a
    multiple of 2 CP, and padded samples have more tokens on some ranks than on others.
    """
    parts = backend()
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    attention = DotProductAttention if separate_documents else parts.core_attention()
    kinds = [layer_spec(config, parts, attention, is_moe) for is_moe in moe_layers(config)[offset : offset + count]]
    return TransformerBlockSubmodules(layer_specs=kinds, layer_norm=parts.layer_norm())


def moe_layers(config: TransformerConfig) -> list[bool]:
    """For each layer of the model, whether it has experts. `moe_layer_freq` is one in n, or a list of 0 and 1."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(config.moe_layer_freq, int):
        return [layer % config.moe_layer_freq == 0 for layer in range(config.num_layers)]
    assert len(config.moe_layer_freq) == config.num_layers, "moe_layer_freq must have an entry for each layer"
    return [bool(entry) for entry in config.moe_layer_freq]


def layer_spec(config: TransformerConfig, parts: BackendSpecProvider, core_attention: type, is_moe: bool) -> ModuleSpec:
    """A decoder layer: attention and a dense or an expert MLP, each after a norm and added to the residual."""
    qk_norm = parts.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.column_parallel_layer_norm_linear(),
            core_attention=core_attention,
            linear_proj=parts.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = get_mlp_module_spec_for_backend(
        backend=parts,
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.layer_norm() if is_moe else IdentityOp,  # a dense MLP's norm is in its linear_fc1
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
