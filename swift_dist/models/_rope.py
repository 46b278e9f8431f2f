"""Rotary position embeddings as numbers: the inverse frequencies that transformers would use, for any supported type.

Megatron's own RoPE options cannot state every Hugging Face config: its llama3 scaling has three of the four constants
built in, its yarn has no attention_factor. So the frequencies travel as data, and the engine puts them into the model's
``rotary_pos_emb.inv_freq``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swift_dist.errors import JobError

_TYPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {  # rope type: required keys, further keys
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor"}), frozenset()),
    "yarn": (
        frozenset({"factor"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
}
_COMMON = frozenset({"rope_type", "type", "rope_theta", "original_max_position_embeddings"})


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one model.

    Args:
        inverse_frequencies: head_dim / 2 numbers, each exactly representable in float32, computed by the same torch
            operations on the CPU as transformers 5.23 (modeling_rope_utils.py), so bit-equal to its ``inv_freq``.
        attention_scaling: factor on cosine and sine (yarn); 1.0 otherwise.
    """

    inverse_frequencies: tuple[float, ...]
    attention_scaling: float

    def megatron_attributes(self) -> dict[str, float]:
        """Attributes to set on the TransformerConfig object (they are no fields of it) for `attention_scaling`.

        megatron's attention reads its factor from there (``_yarn_get_concentration_factor_from_config``) as
        (0.1 * mscale * ln(scale) + 1) / (0.1 * mscale_all_dim * ln(scale) + 1); with scale = e and mscale_all_dim = 0
        that is 0.1 * mscale + 1.
        """
        if self.attention_scaling == 1.0:
            return {}
        return {
            "yarn_rotary_scaling_factor": math.e,
            "yarn_mscale": (self.attention_scaling - 1.0) * 10.0,
            "yarn_mscale_all_dim": 0.0,
        }


def rope_parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config's RoPE parameters in transformers 5's form, from either version's keys.

    Version 4 writes ``rope_theta`` and ``rope_scaling`` (with ``type`` or ``rope_type``), version 5
    ``rope_parameters``. Precedence as in transformers' ``convert_rope_params_to_dict``.

    Raises:
        JobError: a type or a key that would change the numbers and is not supported, or a missing key.
    """
    stated = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(stated, Mapping):
        raise JobError(
            "model.config.rope_parameters",
            f"must be a mapping, got {stated!r}",
            "correct it in the model's configuration",
        )
    parameters = {key: value for key, value in stated.items() if value is not None}
    if parameters.get("partial_rotary_factor") == 1.0:
        del parameters["partial_rotary_factor"]
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in _TYPES:
        raise JobError(
            "model.config.rope_parameters",
            f"RoPE type {rope_type!r} is not supported; supported: {', '.join(sorted(_TYPES))}",
            "a type that depends on the sequence's length (dynamic, longrope) cannot be trained with fixed frequencies",
        )
    required, optional = _TYPES[rope_type]
    missing = required - parameters.keys()
    unknown = parameters.keys() - required - optional - _COMMON
    if missing or unknown:
        problem = f"lacks {sorted(missing)}" if missing else f"has keys that are not understood: {sorted(unknown)}"
        raise JobError("model.config.rope_parameters", f"type {rope_type!r} {problem}", "correct the model's config")
    parameters.pop("type", None)
    parameters["rope_type"] = rope_type
    parameters.setdefault("rope_theta", hf.get("rope_theta") or 10000.0)
    if rope_type in ("llama3", "yarn"):
        longest = hf["max_position_embeddings"]
        original = hf.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = original or longest
    return parameters


def rope(hf: Mapping[str, Any], head_dim: int) -> Rope:
    """Frequencies of a config whose defaults are filled in.

    Source: transformers 5.23, modeling_rope_utils.py; llama3: Meta's Llama 3.1; yarn: arXiv:2309.00071. With
    theta_i = base ** (-2 i / d):

        linear: theta_i / factor
        llama3: theta_i, or theta_i / factor for wavelengths beyond original_length / low_freq_factor, and between that
                and original_length / high_freq_factor an interpolation of both
        yarn:   theta_i / factor * ramp_i + theta_i * (1 - ramp_i)
    """
    import torch  # imported here so that reading a config stays cheap

    parameters = rope_parameters(hf)
    base = parameters["rope_theta"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float) / head_dim
    frequencies = 1.0 / (base**exponents)
    scaling = 1.0
    if parameters["rope_type"] == "linear":
        frequencies = frequencies / parameters["factor"]
    elif parameters["rope_type"] == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif parameters["rope_type"] == "yarn":
        frequencies = _yarn(base**exponents, parameters, head_dim)
        scaling = _yarn_attention_factor(parameters)
    return Rope(tuple(frequencies.tolist()), scaling)


def _llama3(frequencies: Any, parameters: Mapping[str, Any]) -> Any:
    import torch

    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = parameters["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    between = ~(wavelengths < original / high) * ~(wavelengths > original / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def _yarn(powers: Any, parameters: Mapping[str, Any], dim: int) -> Any:
    import torch

    base, original = parameters["rope_theta"], parameters["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns this often within the original length."""
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return 1.0 / (parameters["factor"] * powers) * (1 - keep) + 1.0 / powers * keep


def _yarn_attention_factor(parameters: Mapping[str, Any]) -> float:
    def mscale(factor: float, weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if (stated := parameters.get("attention_factor")) is not None:
        return float(stated)
    factor, weight, all_dim = parameters["factor"], parameters.get("mscale"), parameters.get("mscale_all_dim")
    if weight and all_dim:
        return mscale(factor, weight) / mscale(factor, all_dim)
    return mscale(factor)
