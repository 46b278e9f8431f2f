"""A tiny model that chats: random weights, a tokenizer trained on a few sentences, ChatML; and rows to tune it on."""

from __future__ import annotations

import json
import random
from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "red green blue seven eleven moon river stone bird letter morning silver quiet bright engine window".split()


def save_chat_model(folder: Path, *, seed: int = 0, num_labels: int | None = None, **changes: object) -> Path:
    """A llama of 2 layers (or what `changes` say of its config) with its tokenizer, as `from_pretrained` reads them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = save_tokenizer(folder)
    values = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": -(-size // 8) * 8,
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        **changes,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> int:
    """Byte-level BPE; returns its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"the {a} {b} is {c}." for a in WORDS for b in WORDS for c in WORDS[:3]], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="<|im_end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return len(fast)


def sentence(rng: random.Random, least: int = 2, most: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def conversations(count: int, seed: int = 0) -> list[dict]:
    """Rows of messages, with one to three rounds."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            messages += [
                {"role": "user", "content": sentence(rng)},
                {"role": "assistant", "content": sentence(rng, 2, 20)},
            ]
        rows.append({"messages": messages})
    return rows


def preferences(count: int, seed: int = 0) -> list[dict]:
    """Rows with a chosen and a rejected answer."""
    rng = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(rng)},
                {"role": "assistant", "content": sentence(rng) + " yes"},
            ],
            "rejected_response": sentence(rng) + " no",
        }
        for _ in range(count)
    ]


def save_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
