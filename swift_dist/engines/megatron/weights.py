"""Random initial weights that do not depend on the layout.

Every tensor is drawn from normal(0, std^2) in blocks of whole rows of the *global* tensor, each block from a generator
seeded by (seed, tensor name, block number). A rank draws the blocks that its part touches and keeps its part. So the
same seed gives the same model on one rank as on a thousand, and loss curves of different layouts can be compared.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

_BLOCK = 1 << 16  # numbers in a block: enough to make seeding cheap, few enough to waste little at a part's edges


@torch.no_grad()
def initialise(chunk: GPTModel, config: TransformerConfig, metadata: dict[str, Any], seed: int) -> None:
    """Fill the matrices of a model chunk; biases become zero; norm weights keep their ones.

    The two projections that write to the residual stream get std / sqrt(2 * num_layers), as in megatron and GPT-2.
    """
    sharded = chunk.sharded_state_dict(metadata=metadata)
    apply_factories(sharded)  # a gated projection is two tensors (gate and up) in one parameter
    for part in nested_values(sharded):
        if not isinstance(part, ShardedTensor) or part.data is None or not part.data.is_floating_point():
            continue
        if part.key.endswith("bias"):
            part.data.zero_()
        elif len(part.global_shape) - part.prepend_axis_num > 1:
            std = config.init_method_std
            if part.key.endswith(("linear_proj.weight", "linear_fc2.weight")):
                std /= math.sqrt(2 * config.num_layers)
            _fill(part, std, seed)


def _fill(part: ShardedTensor, std: float, seed: int) -> None:
    """Draw this part of the global tensor. Axes before the matrix (an expert's number) select another name."""
    outer = part.prepend_axis_num
    name = f"{part.key}{list(part.global_offset[:outer])}"
    first_row, first_column = part.global_offset[outer], part.global_offset[outer + 1]
    num_rows, num_columns = part.data.shape
    width = part.global_shape[outer + 1]
    rows_per_block = max(_BLOCK // width, 1)
    device = part.data.device
    row = first_row
    while row < first_row + num_rows:
        number = row // rows_per_block
        generator = torch.Generator(device).manual_seed(_seed(seed, name, number))
        block = torch.empty(rows_per_block, width, device=device).normal_(0.0, std, generator=generator)
        start = row - number * rows_per_block
        stop = min(rows_per_block, start + first_row + num_rows - row)
        target = part.data[row - first_row : row - first_row + stop - start]
        target.copy_(block[start:stop, first_column : first_column + num_columns])
        row += stop - start


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")
