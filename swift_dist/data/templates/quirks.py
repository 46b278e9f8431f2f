"""What chat templates do not say about themselves: few families, as data. Each has a test with its real template."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirk:
    """What is known about a family's chat template.

    Args:
        family: for messages to people.
        signs: a template is of this family if all of these texts occur in it.
        ends: the tokens that end an assistant's turn, where it is not always the one that ends a plain answer.
        next_header_ends: the model ends its turn with the first token of the next turn: ``ends[0]`` before a user's,
            `end_of_call` before a tool's. The template writes it with the next message, so it is missing at the end of
            a conversation and is added there.
        end_of_call: see `next_header_ends`.
        answer: the generation prompt holds the beginning of the answer, and the template does not write an answer that
            way: how the last answer goes on after that prompt, with {reasoning} and {content}.
    """

    family: str
    signs: tuple[str, ...]
    ends: tuple[str, ...] = ()
    next_header_ends: bool = False
    end_of_call: str = ""
    answer: str = ""


QUIRKS = (
    # eos_token_id of generation_config.json: <|endoftext|>, <|user|>, <|observation|>.
    Quirk(
        "GLM-4",
        signs=("[gMASK]<sop>", "<|assistant|>", "<|user|>"),
        ends=("<|user|>", "<|observation|>"),
        next_header_ends=True,
        end_of_call="<|observation|>",
    ),
    # eos_token_id of generation_config.json: <|return|>, <|endoftext|>, <|call|>.
    Quirk(
        "gpt-oss",
        signs=("<|channel|>", "<|return|>", "<|call|>"),
        ends=("<|return|>", "<|call|>"),
    ),
    # A call ends where the tool's result begins, which the template writes into the same turn (ai.google.dev,
    # "Gemma 4 prompt formatting": an additional stop sequence).
    Quirk("Gemma 4", signs=("<|turn>", "<turn|>", "<|tool_response>"), ends=("<turn|>", "<|tool_response>")),
    # DeepSeek-R1 and its distilled models answer after "<think>\n"; the template leaves the thinking out of answers.
    Quirk(
        "DeepSeek-R1",
        signs=("<｜Assistant｜><think>\\n", "content.split('</think>')[-1]"),
        answer="{reasoning}\n</think>\n\n{content}",
    ),
)


def quirk_of(chat_template: str) -> Quirk | None:
    """The family's quirk, or None for a template that explains itself."""
    return next((quirk for quirk in QUIRKS if all(sign in chat_template for sign in quirk.signs)), None)
