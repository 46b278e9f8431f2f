"""DeepSeek-V3 as published, without its values: every shard with its real header and size, sparse on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swift_dist.converters.mapping import hf_shapes
from swift_dist.converters.safetensors_io import INDEX_NAME, TensorSpec, index_text, lay_out, plan_shards
from swift_dist.models import find_family

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
"""The published config.json, as far as it describes the model."""

_PLAIN = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "shared_head")
"""What is not quantised."""


def write_large_model(folder: Path) -> int:
    """Write the folder; returns the bytes that it would take in full."""
    config = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    specs = []
    for name, shape in hf_shapes(find_family(config).rows(config)).items():
        if name.endswith("e_score_correction_bias"):
            specs.append(TensorSpec(name, shape, "F32"))
        elif len(shape) != 2 or any(part in name for part in _PLAIN):
            specs.append(TensorSpec(name, shape, "BF16"))
        else:
            blocks = tuple(-(-extent // 128) for extent in shape)
            specs += [TensorSpec(name, shape, "F8_E4M3"), TensorSpec(f"{name}_scale_inv", blocks, "F32")]
    shards = plan_shards(specs, 4_300_000_000)
    folder.mkdir(parents=True)
    for file in lay_out(shards).files:
        with (folder / file.name).open("wb") as stream:
            for offset, content in file.literals:
                stream.seek(offset)
                stream.write(content)
            stream.truncate(file.size)
    (folder / INDEX_NAME).write_text(index_text(shards) or "")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return sum(spec.num_bytes for spec in specs)
