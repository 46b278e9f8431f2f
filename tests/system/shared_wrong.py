"""Wrong jobs whose ranks share their sequences, and the models of some of them."""

from __future__ import annotations

from collections.abc import Sequence

CONFIGS = {
    "softcapped": {"model_type": "gemma2"},
    "sunk": {"model_type": "gpt_oss"},
    "latent": {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    "stateful": {"layer_types": ["mamba", "full_attention"]},
    "falcon": {"model_type": "falcon"},
    "headless": {"num_attention_heads": None},
}
"""Models of which there is a config.json alone: of 4 heads, with these changes."""

_ON_2, _ON_3, _ON_4 = (f"--nproc_per_node {n} --sequence_parallel_size {n}" for n in (2, 3, 4))
_SIZE = "context_parallel_size"
_SHARED: dict[str, tuple[str, str, Sequence[str], str]] = {
    "ranks": (
        "--nproc_per_node 6 --sequence_parallel_size 4",
        _SIZE,
        ["4 does not divide the 6 ranks"],
        "one of 2, 3, 6",
    ),
    "more than ranks": ("--nproc_per_node 2 --sequence_parallel_size 4", _SIZE, ["the 2 ranks"], "one of 1, 2"),
    "heads": (f"{_ON_3} --parallel.ulysses_size 3", "ulysses_size", ["4 query and 2 key-value heads"], "one of 1"),
    "alone": ("--nproc_per_node 2 --parallel.ulysses_size 2", "ulysses_size", ["no effect"], "context_parallel_size"),
    "compiled": (f"{_ON_2} --train.compile true", "train.compile", [f"{_SIZE} 2"], "leave one"),
    "attention": (f"{_ON_2} --attn_impl sdpa", _SIZE, ["sdpa does not keep"], "leave out"),
    "padded": (f"{_ON_2} --padding_free false", "data.padding_free", [f"{_SIZE} 2"], "leave one"),
    "noise": (f"{_ON_2} --tuner_type full,neftune", "tuner.name", [f"{_SIZE} 2"], "leave one"),
    "classes": (f"{_ON_2} --objective.name classification", _SIZE, ["classification head"], "leave out"),
    "reward": (f"{_ON_2} --rlhf_type reward", _SIZE, ["classification head"], "leave out"),
    "state": (f"{_ON_2} --model stateful", _SIZE, ["its mamba layers"], "leave it out"),
    "packed state": ("--model stateful --packing true", "data.packing", ["its mamba layers"], "leave out"),
    "interface": (f"{_ON_2} --model falcon", _SIZE, ["falcon", "does not reach"], "leave it out"),
    "no heads": (f"{_ON_2} --model headless", _SIZE, ["no num_attention_heads"], "leave it out"),
    "softcap": (f"{_ON_3} --model softcapped", _SIZE, ["3 ranks", "4 query", "a softcap"], "one of 1, 2, 4"),
    "sinks": (
        f"{_ON_4} --model sunk --parallel.ulysses_size 2",
        "ulysses_size",
        ["2 of 4", "sinks"],
        "leave it out, or 4",
    ),
    "values": (f"{_ON_3} --model latent", _SIZE, ["values of 8 numbers and keys of 12"], "one of 1, 2, 4"),
    "reference": (
        f"{_ON_4} --rlhf_type dpo --objective.reference sunk --parallel.ulysses_size 2",
        "ulysses_size",
        ["objective.reference", "sinks"],
        "leave it out, or 4",
    ),
}
"""Words, the key (without its section `parallel`), and what is said."""


def _case(words: str, key: str, says: Sequence[str], remedy: str) -> tuple[str, str, str, Sequence[str], str]:
    verb, rows = ("rlhf", "pairs") if "--rlhf_type" in words else ("sft", "rows")
    key = key if "." in key else f"parallel.{key}"
    return verb, f"--dataset {rows}.jsonl {words}", key, says, remedy


CASES = {name: _case(*case) for name, case in _SHARED.items()}
"""As those of test_sft_wrong.py: (verb, words, key, what is said, remedy)."""
