"""Guided decoding with llguidance: which tokens can still lead to a text of the wanted form.

llguidance rather than a grammar compiler that drops what it does not know: a JSON schema whose keywords it cannot
enforce is refused, so that an answer that came out does satisfy its schema.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from swift_dist.serving.hf.grammars import JSON_OPTIONS, after_thinking, calls_in_text
from swift_dist.serving.hf.requests import Calls, Guide

_JSON_OPTIONS: Any = JSON_OPTIONS
_KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")


class Guides:
    """Matchers over one tokenizer.

    Args:
        tokenizer: transformers', of the fast kind.
        vocabulary: how many logits the model has; those beyond the tokenizer's are never allowed.
        ends: ids of end tokens, allowed where the text is complete.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: list[int]) -> None:
        import llguidance.hf

        self._tokenizer = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=ends or None
        )
        self._vocabulary = vocabulary
        # also those that only look like special ones to llguidance, such as Qwen's <tool_call>
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self._special = {text: number for text, number in added.items() if self._tokenizer.is_special_token(number)}

    def matcher(self, guide: Guide) -> Any:
        """A fresh `llguidance.LLMatcher`.

        Raises:
            ValueError: the schema, expression or grammar is wrong, or says what cannot be enforced.
        """
        from llguidance import LLMatcher

        if isinstance(guide.value, Calls):
            grammar = calls_in_text(guide.value, guide.thinking, self._special)
        else:
            grammar = _grammar(guide)
            if guide.thinking is not None:
                grammar = after_thinking(grammar, guide.thinking, self._special)
        if problem := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise ValueError(f"guided decoding cannot follow this {guide.kind}: {problem.strip()}")
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"guided decoding cannot follow this {guide.kind}: {matcher.get_error()}")
        return matcher

    def piece(self, token: int) -> bytes:
        """A token's bytes; of a special token those of its name."""
        return bytes(self._tokenizer.decode_bytes([token]))

    def allowed(self, matchers: list[Any]) -> torch.Tensor:
        """Which token each matcher allows next [matchers, vocabulary], bool."""
        from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(len(matchers), self._tokenizer.vocab_size)
        for row, matcher in enumerate(matchers):
            fill_next_token_bitmask(matcher, bits, row)
        spread = (bits.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
        return spread.view(len(matchers), -1)[:, : self._vocabulary].bool()


def _grammar(guide: Guide) -> str:
    from llguidance import LLMatcher, grammar_from

    if guide.kind not in _KINDS:
        raise ValueError(f"no such guide: {guide.kind}; there are {', '.join(_KINDS)}")
    if guide.kind == "choice":
        alternatives = [guide.value] if isinstance(guide.value, str | Calls) else list(guide.value)
        if not alternatives or not all(isinstance(a, str) and a for a in alternatives):
            raise ValueError("a choice needs texts to choose from, none of them empty")
        return LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(a, ensure_ascii=False) for a in alternatives)
        )
    if guide.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON_OPTIONS)
    if not isinstance(guide.value, str) or not guide.value.strip():
        raise ValueError(f"a {guide.kind} is a text that is not empty")
    if guide.kind == "json_schema":
        try:
            schema = json.loads(guide.value)
        except ValueError as error:
            raise ValueError(f"the JSON schema is no JSON: {error}") from error
        if not isinstance(schema, dict):
            raise ValueError("a JSON schema is an object")
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    if guide.kind == "regex":
        return LLMatcher.grammar_from_regex(guide.value)
    if "::=" in guide.value:
        return grammar_from("gbnf", guide.value)
    return LLMatcher.grammar_from_lark(guide.value)
