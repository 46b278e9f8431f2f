"""How many bytes of activations a rank of the hf engine holds for its part of a row. Pure arithmetic, no torch.

Weights, their gradients, the optimizer's state and the weights that a strategy gathers come on top. Counts are of what
autograd keeps and of the widest moment of the backward pass, as transformers' models compute (Llama, Qwen, Mistral and
their like); `tests/engines/hf/test_length_memory.py` holds them to measured peaks, on CPUs. Not counted: what an
attention kernel works with inside (in bfloat16 on a CPU, float32 sums of a sequence's gradients: up to a third more at
a peak that tiles and recomputing have made low). The idea of such a count is that of
Korthikanti et al. (arXiv 2205.05198), section 4.1, whose layer is another one (dropout, GELU, no gate).
"""

from __future__ import annotations

from dataclasses import dataclass

from swift_dist.parallel.shape import ModelShape

_LEAST_ROWS = 256  # of a tile of the loss (kernels/linear_cross_entropy.py)
_CHUNK_ELEMENTS = 1 << 22  # of logits in float32 at a time (engines/hf/logps.py)


@dataclass(frozen=True, kw_only=True)
class MemoryFeatures:
    """What a job does against the memory of long rows: ``train.recompute full``, ``train.offload_activations``,
    ``train.tiled_loss``, ``train.tiled_mlp``."""

    recompute: bool = False
    offload: bool = False
    tiled_loss: bool = False
    tiled_mlp: bool = False


@dataclass(frozen=True)
class ActivationBytes:
    """Of one rank, on its device.

    Args:
        stored: what all layers keep between the passes.
        layer: what the backward pass of one layer needs beside it.
        loss: what the loss needs beside it, between the passes.
    """

    stored: int
    layer: int
    loss: int

    @property
    def peak(self) -> int:
        return self.stored + max(self.layer, self.loss)


def activation_bytes(
    shape: ModelShape,
    row_tokens: int,
    features: MemoryFeatures,
    *,
    sharing_ranks: int = 1,
    learning_tokens: int | None = None,
    element_bytes: int = 2,
) -> ActivationBytes:
    """Of a micro-batch's row, which `sharing_ranks` ranks share.

    With t = row_tokens / sharing_ranks, rounded up, and L layers whose backward pass needs S bytes a token for good and
    more for a moment (`layer_bytes_per_token`):

        stored = t (L S + 2 e d)       what every layer keeps; the rotary embedding's sines and cosines, of a head
               = t (L e h + 2 e d)     recompute: a layer's input alone
               = t (min(L, 2) e h + 2 e d)     offload: the one in use and the one on its way

    A recomputed layer needs S - e h beside its stored input while it is differentiated. A tile of an MLP (tiled_mlp) is
    h tokens, and the sums of its weights' gradients and one tile's part of them are held meanwhile.

    Args:
        shape: of the model.
        row_tokens: of the whole row.
        features: of the job.
        sharing_ranks: N of ``parallel.context_parallel_size``.
        learning_tokens: tokens of the whole row that count in the loss. Default: all.
        element_bytes: e of activations: 4 in fp32, else 2.

    Raises:
        ValueError: layers with experts or latent attention, which have not been measured.
    """
    if shape.is_moe or shape.latent_attention is not None:
        raise ValueError("the memory of experts and of latent attention has not been measured")
    tokens = -(-row_tokens // sharing_ranks)
    learning = -(-(row_tokens if learning_tokens is None else learning_tokens) // sharing_ranks)
    hidden = element_bytes * shape.hidden_size
    saved, attention, mlp = layer_bytes_per_token(
        shape, features, sharing_ranks=sharing_ranks, element_bytes=element_bytes
    )
    at_work = max(tokens * attention, tokens * mlp + (_mlp_tile_bytes(shape, element_bytes) * features.tiled_mlp))
    if not features.recompute:
        stored = shape.num_layers * saved
        layer = at_work - tokens * saved
    else:
        stored = (min(shape.num_layers, 2) if features.offload else shape.num_layers) * hidden
        layer = at_work - tokens * hidden
    stored += 2 * element_bytes * shape.head_dim
    return ActivationBytes(tokens * stored, layer, _loss_bytes(shape, tokens, learning, features, element_bytes))


def layer_bytes_per_token(
    shape: ModelShape,
    features: MemoryFeatures,
    *,
    sharing_ranks: int = 1,
    element_bytes: int = 2,
) -> tuple[int, int, int]:
    """(S, attention, MLP): bytes a token that a layer keeps for its backward pass, and that are held, S included, in
    the widest moment of the backward pass of its attention and of its MLP.

    In elements of e bytes, h: hidden, q: heads x their width, k: key-value heads x their width, f: MLP.

        norm       its input h, and beside it 8 h bytes: what it normalised in float32 (4; in float32 its input itself),
                   the same times the weight's input (e) and the output, which the products behind it read (e)
        attention  q + 2 k, its result q, and q for the output product's input, in which tokens lie before heads
                   (CUDA's kernel for packed rows on one rank gives it so, and needs no copy)
        MLP        gate, its activation, up, their product: 4 f; without a gate 2 f. tiled_mlp: none of it

        S = h + 8 h / e + (attention) + h + 8 h / e + (MLP)

    Moments. MLP: the gradient of the layer's output h, and, the product being done with, the gradients of product,
    activation and up: 2 f more than S (1 f without a gate); tiled_mlp: the gradient of its input, h. Attention: the
    MLP and its norm are done with; gradients of the residual h, of the result q (a second one in the place of the
    copy), and of queries, keys and values; where ranks share the row once more q + 2 k, the exchange's buffer.
    """
    e, h, f = element_bytes, shape.hidden_size, shape.ffn_hidden_size
    queries = shape.num_attention_heads * shape.head_dim
    keys_values = 2 * shape.num_query_groups * shape.head_dim
    norm = 8 * h
    of_attention = e * (queries + keys_values + 2 * queries)
    of_mlp = 0 if features.tiled_mlp else e * f * (4 if shape.gated_mlp else 2)
    saved = 2 * (e * h + norm) + of_attention + of_mlp
    mlp = saved + e * h
    mlp += e * h if features.tiled_mlp else e * f * (2 if shape.gated_mlp else 1)
    exchanged = e * (queries + keys_values) * (sharing_ranks > 1)
    attention = e * h + norm + of_attention + e * (h + queries + queries + keys_values) + exchanged
    return saved, attention, mlp


def _mlp_tile_bytes(shape: ModelShape, element_bytes: int) -> int:
    """h tokens' intermediate values and their gradients, the sums of the weights' gradients in float32 and a part."""
    h, f = shape.hidden_size, shape.ffn_hidden_size
    wide, matrices = (6, 3) if shape.gated_mlp else (3, 2)
    return h * f * (wide * element_bytes + matrices * (4 + element_bytes))


def _loss_bytes(shape: ModelShape, tokens: int, learning: int, features: MemoryFeatures, element_bytes: int) -> int:
    """Final norm (its input, which is the last layer's output, and 8 h bytes) and the rows that learn, then

    logits     e V a row, and as many in float32 as are worked on at a time (up to 2^22 numbers)
    tiled      e V + 4 V for a tile of max(256, rows x h / V) rows (4 V in plain torch alone), the gradient of the rows,
               and V h float32 of the weight's
    """
    h, vocabulary = shape.hidden_size, shape.vocab_size
    kept = tokens * (element_bytes * h + 8 * h) + learning * element_bytes * h
    if features.tiled_loss:
        rows = min(learning, max(_LEAST_ROWS, learning * h // vocabulary))
        return kept + rows * vocabulary * (element_bytes + 4) + learning * element_bytes * h + 4 * vocabulary * h
    return kept + learning * vocabulary * element_bytes + 4 * min(learning * vocabulary, _CHUNK_ELEMENTS)
