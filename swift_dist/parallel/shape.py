"""`ModelShape`: the geometry of a decoder-only transformer: all that validity, parameter counts and FLOPs need.

Pure arithmetic, no torch. A model family (`swift_dist/models/<family>.py`) produces it from a Hugging Face config.
"""

from __future__ import annotations

from dataclasses import dataclass

VOCAB_MULTIPLE = 128  # megatron's --make-vocab-size-divisible-by


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434): low-rank queries, keys and values.

    Args:
        q_lora_rank: rank of the query projection; None: queries are projected directly.
        kv_lora_rank: rank of the joint key-value projection.
        qk_nope_head_dim: per-head query/key width without rotary position.
        qk_rope_head_dim: per-head query/key width with rotary position (the key's is shared by all heads).
        v_head_dim: per-head value width.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of one decoder-only transformer with RMSNorm. Counts are of the whole model, before any split.

    Args:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads.
        num_query_groups: key/value heads (= num_attention_heads without grouped-query attention).
        head_dim: width of one head (need not be hidden_size / num_attention_heads).
        ffn_hidden_size: inner width of a plain MLP layer. Unused where every layer is MoE.
        vocab_size: rows of the embedding before padding.
        tie_embeddings: the output layer reuses the embedding matrix.
        gated_mlp: the MLP has a gate beside the up projection (SwiGLU), so three matrices instead of two.
        num_experts: routed experts per MoE layer; None: a dense model.
        moe_top_k: routed experts that one token visits.
        moe_ffn_hidden_size: inner width of one routed expert.
        shared_expert_ffn_hidden_size: inner width of all shared experts of a layer together; None: there are none.
        shared_expert_gate: the shared experts' output is gated by a learned vector (Qwen2-MoE).
        num_dense_layers: layers of a MoE model that have a plain MLP (first_k_dense_replace, mlp_only_layers).
        router_bias: the router carries one learned bias per expert (DeepSeek-V3's e_score_correction_bias).
        qkv_bias: biases on the query, key and value projections (Qwen2).
        attention_output_bias: a bias on the attention output projection (Llama's attention_bias, beside qkv_bias).
        mlp_bias: biases on the MLP's matrices (Llama's mlp_bias).
        qk_norm: RMSNorm over each head's query and key (Qwen3).
        sliding_window: keys that a token attends to at most; None: all before it.
        max_position_embeddings: longest sequence the model states; None: unstated.
        latent_attention: MLA geometry; then head_dim and num_query_groups do not shape any weight.

    Raises:
        ValueError: a MoE field is missing, or heads are not a multiple of query groups.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    tie_embeddings: bool = False
    gated_mlp: bool = True
    num_experts: int | None = None
    moe_top_k: int | None = None
    moe_ffn_hidden_size: int | None = None
    shared_expert_ffn_hidden_size: int | None = None
    shared_expert_gate: bool = False
    num_dense_layers: int = 0
    router_bias: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_position_embeddings: int | None = None
    latent_attention: LatentAttention | None = None

    def __post_init__(self) -> None:
        if self.num_experts is not None and (self.moe_top_k is None or self.moe_ffn_hidden_size is None):
            raise ValueError("a model with num_experts needs moe_top_k and moe_ffn_hidden_size")
        if self.num_experts is None and (self.num_dense_layers or self.shared_expert_ffn_hidden_size is not None):
            raise ValueError("num_dense_layers and shared experts belong to a model with num_experts")
        if self.latent_attention is None and self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )

    @property
    def is_moe(self) -> bool:
        return self.num_experts is not None

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers if self.is_moe else 0

    @property
    def num_plain_mlp_layers(self) -> int:
        return self.num_layers - self.num_moe_layers

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding as Megatron stores it: vocab_size rounded up to a multiple of 128 * tp."""
        multiple = VOCAB_MULTIPLE * tp
        return -(-self.vocab_size // multiple) * multiple

    def num_parameters(self) -> int:
        """All learned parameters as Hugging Face counts them: vocabulary unpadded, tied embeddings once."""
        return self._count(experts_per_layer=self.num_experts or 0)

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: as `num_parameters`, with moe_top_k instead of num_experts experts."""
        return self._count(experts_per_layer=self.moe_top_k or 0)

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of forward + backward for one token of a sequence of this many tokens.

        F = 3 * (2 * M + L * 2 * (d_qk + d_v) * A * K)

        M: parameters of the matrices that one token is multiplied with (output layer included, embedding lookup,
        norms and biases not); L: layers; A: heads; d_qk, d_v: head widths of the two attention products; K: the mean
        number of keys that a token attends to, (S + 1) / 2 under a causal mask, less with a sliding window. A
        multiply-add counts 2, the backward twice the forward; recomputed activations are not counted.

        Source: Narayanan et al. 2021 (arXiv:2104.04473), appendix, with the causal half of the attention products
        left out as Megatron-LM's throughput figure does.
        """
        mean_keys = (sequence_length + 1) / 2
        if self.sliding_window is not None and self.sliding_window < sequence_length:
            window = self.sliding_window
            mean_keys = window - window * (window - 1) / (2 * sequence_length)
        if self.latent_attention is None:
            head_widths = 2 * self.head_dim
        else:
            latent = self.latent_attention
            head_widths = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
        attention = self.num_layers * 2 * head_widths * self.num_attention_heads * mean_keys
        return 3 * (2 * self._matrix_parameters_per_token() + attention)

    def _matrix_parameters_per_token(self) -> int:
        attention = self._attention_matrices()
        mlp = self._mlp_matrices(self.ffn_hidden_size)
        moe = 0
        if self.is_moe:
            assert self.moe_ffn_hidden_size is not None and self.moe_top_k is not None and self.num_experts is not None
            moe = self.moe_top_k * self._mlp_matrices(self.moe_ffn_hidden_size) + self.num_experts * self.hidden_size
            if self.shared_expert_ffn_hidden_size is not None:
                moe += self._mlp_matrices(self.shared_expert_ffn_hidden_size)
        return (
            self.num_layers * attention
            + self.num_plain_mlp_layers * mlp
            + self.num_moe_layers * moe
            + self.vocab_size * self.hidden_size
        )

    def _attention_matrices(self) -> int:
        hidden, heads = self.hidden_size, self.num_attention_heads
        if self.latent_attention is None:
            return hidden * self.head_dim * (2 * heads + 2 * self.num_query_groups)
        latent = self.latent_attention
        q_out = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        if latent.q_lora_rank is None:
            queries = hidden * q_out
        else:
            queries = hidden * latent.q_lora_rank + latent.q_lora_rank * q_out
        keys_values = hidden * (latent.kv_lora_rank + latent.qk_rope_head_dim) + latent.kv_lora_rank * heads * (
            latent.qk_nope_head_dim + latent.v_head_dim
        )
        return queries + keys_values + heads * latent.v_head_dim * hidden

    def _attention_vectors(self) -> int:
        """Biases and norms inside attention."""
        count = 0
        if self.latent_attention is not None:
            count += (self.latent_attention.q_lora_rank or 0) + self.latent_attention.kv_lora_rank
        if self.qkv_bias:
            count += self.head_dim * (self.num_attention_heads + 2 * self.num_query_groups)
        if self.attention_output_bias:
            count += self.hidden_size
        if self.qk_norm:
            count += 2 * self.head_dim
        return count

    def _mlp_matrices(self, inner: int) -> int:
        return self.hidden_size * inner * (3 if self.gated_mlp else 2)

    def _mlp(self, inner: int) -> int:
        biases = inner * (2 if self.gated_mlp else 1) + self.hidden_size if self.mlp_bias else 0
        return self._mlp_matrices(inner) + biases

    def _count(self, experts_per_layer: int) -> int:
        layer = self._attention_matrices() + self._attention_vectors() + 2 * self.hidden_size
        moe = 0
        if self.is_moe:
            assert self.moe_ffn_hidden_size is not None and self.num_experts is not None
            moe = experts_per_layer * self._mlp(self.moe_ffn_hidden_size) + self.num_experts * self.hidden_size
            moe += self.num_experts if self.router_bias else 0
            if self.shared_expert_ffn_hidden_size is not None:
                moe += self._mlp(self.shared_expert_ffn_hidden_size)
                moe += self.hidden_size if self.shared_expert_gate else 0
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return (
            embeddings
            + self.num_layers * layer
            + self.num_plain_mlp_layers * self._mlp(self.ffn_hidden_size)
            + self.num_moe_layers * moe
            + self.hidden_size
        )
