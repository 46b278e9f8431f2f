"""Small tokenizers with the real chat templates of `jinja/`."""

from __future__ import annotations

import copy
import re
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.templates.template import Template

JINJA = Path(__file__).parent / "jinja"
_SPECIAL = re.compile(
    r"<[|｜][^<>|｜]+[|｜]>|<bos>|</?s>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|\[/?INST\]|</?think>|</?tool_call>"
    r"|<\|[a-z_]+>|<[a-z_]+\|>"  # Gemma 4's
)
# Qwen's: line breaks stay together, whatever follows them.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT = "hello there how are you it is cold in the city\n\n\nuser assistant system model\nthe weather tool"


@cache
def _bpe(trim_offsets: bool, gpt2: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    tokenizer.pre_tokenizer = byte_level if gpt2 else pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_TEXT] * 20, trainer)
    return tokenizer


def made_with(source: str | None, trim_offsets: bool = False, gpt2: bool = False) -> Any:
    """A byte-level BPE tokenizer with this chat template and the special tokens in it.

    Args:
        trim_offsets: a token's place in the text leaves its leading space out, as Llama 3's does.
        gpt2: cut the text into words as GPT-2 does: the last of several line breaks goes apart if text follows.
    """
    from transformers import PreTrainedTokenizerFast

    special = sorted(set(_SPECIAL.findall(source or "")) - {"<s>", "</s>"})
    made = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_bpe(trim_offsets, gpt2)),
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special,
    )
    made.chat_template = source
    return made


@cache
def tokenizer(name: str, trim_offsets: bool = False) -> Any:
    """One with the chat template of `jinja/<name>.jinja`."""
    return made_with((JINJA / f"{name}.jinja").read_text(encoding="utf-8"), trim_offsets)


def template(name: str, *, trim_offsets: bool = False, **section: Any) -> Template:
    return Template(tokenizer(name, trim_offsets), TemplateSection(**section), name=name)


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(text: str = "", **more: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    return answer(text, tool_calls=[{"id": "abcdefghi", "type": "function", "function": function}], **more)


def named(function: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": function, "arguments": {}}}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": text}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def shown(template: Template, encoded: Any) -> str:
    """The text of a sequence with ⟦ ⟧ around what learns."""
    text = ""
    for learns, run in groupby(zip(encoded.ids.tolist(), (encoded.weights > 0).tolist(), strict=True), lambda t: t[1]):
        piece = template.tokenizer.decode([token for token, _ in run])
        text += f"⟦{piece}⟧" if learns else piece
    return text
