"""The verb that trains a byte-level BPE tokenizer."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from swift_dist.data.sources import ReadOptions
from swift_dist.errors import JobError

logger = logging.getLogger(__name__)

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""OpenAI's ChatML, as the model cards of Qwen and Yi have it."""


class TrainTokenizerOptions(ReadOptions):
    output: str = Field(description="folder to write: tokenizer.json and its configuration")
    vocab_size: int = Field(32000, gt=256, description="tokens, the 256 bytes and the special token included")
    min_frequency: int = Field(2, gt=0, description="how often a pair must occur to become a token")
    eos_token: str = Field("<|endoftext|>", min_length=1, description="the special token that ends a document")
    chat_template: Literal["none", "chatml"] = Field(
        "none", description="chat template and its special tokens, for models that are to be fine-tuned to chat"
    )
    max_megabytes: float = Field(1000, gt=0, description="text to train on; of more, an evenly spread sample is taken")
    overwrite: bool = Field(False, description="replace an existing folder")


def train_tokenizer(options: TrainTokenizerOptions) -> dict[str, Any]:
    """Train a byte-level BPE tokenizer (GPT-2's pre-tokenizer; every text can be encoded) and save it.

    Returns:
        output, vocab_size, documents, text_bytes, skipped (bad rows left out).

    Raises:
        JobError: an input is missing, or the output exists.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from swift_dist.data.sampling import Sample

    output = Path(options.output).expanduser()
    if output.exists() and not options.overwrite:
        raise JobError("output", f"{output} exists", "give another folder, or --overwrite true")
    sample = Sample(options, int(options.max_megabytes * 1e6))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=options.min_frequency,
        special_tokens=[options.eos_token, *(CHATML_TOKENS if options.chat_template == "chatml" else ())],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample.texts(), trainer)
    if not sample.documents:
        raise JobError("input", f"no document in {', '.join(options.input)}", "check --text_key and --format")
    if tokenizer.get_vocab_size() < options.vocab_size:
        logger.warning("the text gives only %d tokens, not %d", tokenizer.get_vocab_size(), options.vocab_size)
    _save(tokenizer, options, output)
    return {
        "output": str(output),
        "vocab_size": tokenizer.get_vocab_size(),
        "documents": sample.documents,
        "text_bytes": sample.text_bytes,
        "skipped": sample.skipped,
    }


def _save(tokenizer: Any, options: TrainTokenizerOptions, output: Path) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": options.eos_token,
        "pad_token": options.eos_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        tokenizer.save(str(temporary / "tokenizer.json"))
        (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if options.chat_template == "chatml":
            (temporary / "chat_template.jinja").write_text(CHATML)
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def render(result: dict[str, Any]) -> str:
    left_out = f", {result['skipped']} bad rows left out" if result["skipped"] else ""
    return (
        f"tokenizer of {result['vocab_size']} tokens in {result['output']} "
        f"(from {result['documents']} documents, {result['text_bytes'] / 1e6:.1f} MB{left_out})"
    )
