"""What answers are compared with: a tiny model and adapters of it, as transformers and PEFT compute them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from chat_model import save_chat_model

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall a tool as <tool_call>\n{name, arguments}\n</tool_call>\n"
    "{% for tool in tools %}{{ tool.function | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_LEN = 8192


def save_model(folder: Path) -> Path:
    """A model whose heads every engine can compute with, and whose greedy answers are not the same token for ever."""
    save_chat_model(folder, seed=3, hidden_size=128, max_position_embeddings=MAX_LEN, initializer_range=0.1)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def save_adapter(base: Path, folder: Path, seed: int) -> Path:
    """A LoRA of random factors, large enough to change what is said."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


class Reference:
    """transformers, in fp32."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if adapter is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return [int(token) for token in ids]

    def logits(self, ids: list[int]) -> Any:
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].float()

    def greedy(self, prompt: list[int], number: int, frequency: float = 0.0, presence: float = 0.0) -> list[int]:
        """Tokens, each the likeliest after OpenAI's penalties of those already generated; ends before <|im_end|>."""
        out: list[int] = []
        while len(out) < number:
            logits = self.logits(prompt + out)[-1].clone()
            for token in set(out):
                logits[token] -= frequency * out.count(token) + presence
            token = int(logits.argmax())
            if token == self.tokenizer.eos_token_id:
                break
            out.append(token)
        return out

    def text(self, ids: list[int]) -> str:
        return whole(str(self.tokenizer.decode(ids, skip_special_tokens=True)))


def whole(text: str) -> str:
    """Without a character that the last token began and did not end: some servers show it as U+FFFD, some not."""
    return text.rstrip("\ufffd")


@functools.cache
def reference(folder: Path, adapter: Path | None = None) -> Reference:
    return Reference(folder, adapter)
