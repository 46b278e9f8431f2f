"""What a model family is: one `FAMILY` in one file. How a Hugging Face config becomes numbers for the engine.

A family file states transformers' own defaults for its config class, the configurations it can express, and the rows of
its weights. What a config says and the engine cannot do is refused by name; nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from swift_dist.config.keys import did_you_mean
from swift_dist.converters.mapping import Rows
from swift_dist.errors import JobError
from swift_dist.models._rope import Rope, rope, rope_parameters
from swift_dist.parallel import ModelShape

Config = dict[str, Any]
"""A Hugging Face config.json with the family's defaults filled in and checked (`Family.complete`)."""

# Keys that describe files, tokens, generation or bookkeeping and change no number in training.
_NEUTRAL = frozenset(
    """
    architectures auto_map bos_token_id chunk_size_feed_forward decoder_start_token_id dtype eos_token_id
    finetuning_task id2label is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id max_window_layers
    model_type name_or_path num_labels output_attentions output_hidden_states pad_token_id prefix pretraining_tp
    problem_type return_dict sep_token_id task_specific_params tokenizer_class torch_dtype torchscript
    transformers_version unk_token_id use_cache
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature tf_legacy_loss top_k top_p typical_p
    use_bfloat16 cross_attention_hidden_size add_cross_attention tie_encoder_decoder pruned_heads
    unsloth_fixed unsloth_version
    """.split()
)
_GEOMETRY = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size "
    "num_experts moe_intermediate_size num_experts_per_tok "
    "n_routed_experts kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
).split()
_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"})
_HARMLESS = {"partial_rotary_factor": 1.0}
# transformers 5 names some keys twice (a config class's ``attribute_map``) and saves them under either name.
_ALIASES = {"num_local_experts": "num_experts", "num_mtp_layers": "num_nextn_predict_layers"}
_COUNTS = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings num_experts num_experts_per_tok moe_intermediate_size decoder_sparse_step
    n_routed_experts n_shared_experts kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    """.split()
)
_FLAGS = frozenset(
    "attention_bias mlp_bias tie_word_embeddings use_sliding_window norm_topk_prob output_router_logits".split()
)


@dataclass(frozen=True)
class Family:
    """One model family.

    The methods take a config.json as a plain dict (transformers 4 or 5), check it, and are pure. They import torch only
    where their result holds torch objects (`transformer_config`, `rope`).

    Args:
        name: the file's name; equal to the config's ``model_type``.
        architectures: the class names that config.json may state.
        defaults: what transformers assumes for keys that config.json does not state, for every key understood.
        make_shape, make_transformer_config, make_rows: from a completed config; see the methods of those names.
        trainable: whether the engine trains it. Weights of the others are converted only.
        fit_folder: see `for_folder`; None: a folder always holds what its config says.
    """

    name: str
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    make_shape: Callable[[Config], ModelShape]
    make_transformer_config: Callable[[Config], dict[str, Any]]
    make_rows: Callable[[Config], Rows]
    trainable: bool = True
    fit_folder: Callable[[Config, Collection[str]], Config] | None = None

    def require_trainable(self) -> None:
        """Refuse a family that is converted only.

        Raises:
            JobError: the engine does not train it.
        """
        if not self.trainable:
            raise JobError(
                "model.config.model_type",
                f"{self.name!r} can be converted but is not trained yet by the megatron engine",
                "use a model of a family that is trained; swift-dist convert takes this one's weights to and fro",
            )

    def for_folder(self, hf: Mapping[str, Any], names: Collection[str]) -> Config:
        """The config to use for weights that are there, of which config.json may state more than there are.

        Args:
            hf: the config.json.
            names: the tensors of a Hugging Face folder, or of a Megatron checkpoint.
        """
        return dict(hf) if self.fit_folder is None else self.fit_folder(dict(hf), names)

    def complete(self, hf: Mapping[str, Any]) -> Config:
        """The config with this family's defaults filled in.

        Raises:
            JobError: a value is impossible, or a key is not understood: a setting that nobody reads would change the
                numbers without a word. Keys that are switched off (null, false, 0, empty) and bookkeeping are let
                through.
        """
        stated = {key: value for key, value in hf.items() if not key.startswith("_")}
        for alias, key in _ALIASES.items():
            self._take_alias(stated, alias, key)
        for key, value in stated.items():
            if key in self.defaults or key in _NEUTRAL or key in _ROPE or not value or _HARMLESS.get(key) == value:
                continue
            hint = did_you_mean(key, sorted(self.defaults.keys() | _NEUTRAL | _ROPE))
            raise JobError(
                f"model.config.{key}",
                f"is not understood for {self.name} models; ignoring {value!r} might change the numbers",
                f"{hint} remove the key from the model's config if it does not affect the computation".strip(),
            )
        config = {**self.defaults, **stated}
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = config["num_attention_heads"]
        for key in self.defaults.keys() & _COUNTS - {"head_dim"}:
            _check_count(key, config[key])
        if "qk_rope_head_dim" in self.defaults:  # latent attention: RoPE turns this part of a head, as in transformers
            config["head_dim"] = config["qk_rope_head_dim"]
        if config.get("head_dim") is None:
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        self._check_values(config)
        return config

    def require_geometry(self, hf: Mapping[str, Any]) -> None:
        """Refuse a config that leaves the size of the model to transformers' defaults.

        Raises:
            JobError: names the first size that is missing, and all of them.
        """
        stated = {_ALIASES.get(key, key) for key, value in hf.items() if value is not None}
        missing = [key for key in _GEOMETRY if key in self.defaults and key not in stated]
        if missing:
            raise JobError(
                f"model.config.{missing[0]}",
                f"is not stated; a {self.name} model of one's own states its sizes, and these are missing: "
                + ", ".join(missing),
                "state them in model.config, or give model.path: a folder with a config.json",
            )

    def shape(self, hf: Mapping[str, Any]) -> ModelShape:
        """The geometry. Raises JobError as `complete`."""
        return self.make_shape(self.complete(hf))

    def transformer_config(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of megatron-core's TransformerConfig that the model decides; not precision, layout or fusions.

        With ``multi_latent_attention`` they are those of its MLATransformerConfig.

        ``hidden_dropout`` is 0 (these models have none), ``init_method_std`` is ``initializer_range``; megatron then
        scales the two output projections of a layer by 1 / sqrt(2 * num_layers), which transformers does not.
        """
        return self.make_transformer_config(self.complete(hf))

    def gpt_model(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of megatron-core's GPTModel that the model decides.

        ``vocab_size`` is the real one. Whoever pads it (`ModelShape.padded_vocab_size`) must keep the padding out of
        the softmax: a padded row of zeros has logit 0 and would count. The frequencies come from `rope`, not from
        ``rotary_base``.
        """
        config = self.complete(hf)
        return {
            "vocab_size": config["vocab_size"],
            "max_sequence_length": config["max_position_embeddings"],
            "position_embedding_type": "rope",
            "rotary_percent": 1.0,
            "rotary_base": rope_parameters(config)["rope_theta"],
            "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        }

    def rope(self, hf: Mapping[str, Any]) -> Rope:
        """Rotary frequencies, bit-equal to transformers'."""
        config = self.complete(hf)
        return rope(config, config["head_dim"])

    def rows(self, hf: Mapping[str, Any]) -> Rows:
        """The weights: every Hugging Face tensor and where it goes."""
        return self.make_rows(self.complete(hf))

    def _take_alias(self, stated: Config, alias: str, key: str) -> None:
        """Put a value that goes by another name under ours."""
        if alias in stated and key in self.defaults:
            value = stated.pop(alias)
            if stated.setdefault(key, value) != value:
                raise JobError(f"model.config.{key}", f"is {stated[key]} but {alias} is {value}", "state one of them")

    def _check_values(self, config: Config) -> None:
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        if heads % groups:
            raise JobError(
                "model.config.num_attention_heads",
                f"{heads} is not a multiple of num_key_value_heads {groups}",
                "every key-value head serves the same number of query heads",
            )
        _check_count("head_dim", config["head_dim"])
        if config["head_dim"] % 2:
            raise JobError(
                "model.config.head_dim", f"{config['head_dim']} is odd", "RoPE rotates pairs: use an even one"
            )
        for key in self.defaults.keys() & _FLAGS:
            if not isinstance(config[key], bool):
                raise JobError(
                    f"model.config.{key}",
                    f"must be true or false, got {config[key]!r}",
                    "correct it in the model's configuration",
                )
        for key, low, high in (("rms_norm_eps", 0, 1), ("initializer_range", 0, 1), ("attention_dropout", 0, 1)):
            value = config[key]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
                raise JobError(
                    f"model.config.{key}",
                    f"must be a number in [{low}, {high}), got {value!r}",
                    "correct it in the model's configuration",
                )
        rope_parameters(config)
        self._check_special(config)

    def _check_special(self, config: Config) -> None:
        if config["hidden_act"] not in ACTIVATIONS:
            raise JobError(
                "model.config.hidden_act",
                f"{config['hidden_act']!r} is not supported; supported: {', '.join(ACTIVATIONS)}",
                "use one of these activations",
            )
        if config.get("is_encoder_decoder"):
            raise JobError(
                "model.config.is_encoder_decoder",
                "encoder-decoder models are not supported",
                "use a decoder-only model",
            )


def _check_count(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise JobError(
            f"model.config.{key}",
            f"must be a positive whole number, got {value!r}",
            "correct it in the model's configuration",
        )


ACTIVATIONS = ("silu", "gelu", "relu")


def activation_function(name: str) -> Callable[[Any], Any]:
    """torch's function for a config's ``hidden_act`` (one of `ACTIVATIONS`; "gelu" is the exact one)."""
    import torch.nn.functional as functional  # imported here so that reading a config stays cheap

    return getattr(functional, name)
