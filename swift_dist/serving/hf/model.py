"""Loading a folder: the model, its tokenizer, how long a text may be, which tokens end one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from swift_dist.errors import JobError, RunError
from swift_dist.serving.options import EngineOptions, ServedModel

log = logging.getLogger(__name__)

_DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNBOUNDED = 1 << 20  # tokens, for a model that names no limit (Mamba's state has none)


@dataclass
class Loaded:
    """A model with its tokenizer.

    Attributes:
        length: tokens of prompt and answer, by the model's configuration and `max_model_len`.
        ends: ids of its end tokens.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    length: int
    ends: tuple[int, ...] = field(default=())

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


def load(served: ServedModel) -> Loaded:
    """Load a folder.

    Raises:
        JobError: the model generates no text in the way of a decoder; `max_model_len` is more than it has positions.
        RunError: the folder cannot be read.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    trust = served.options.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(served.path, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(served.path, trust_remote_code=trust)
        if getattr(config, "is_encoder_decoder", False):
            raise JobError("model", f"{config.model_type} is an encoder-decoder", "serve a decoder-only model")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise JobError(
                "model",
                f"{type(tokenizer).__name__} is no tokenizer of the tokenizers library",
                "save a tokenizer.json",
            )
        auto = AutoModel if served.options.task == "embed" else AutoModelForCausalLM
        found: Any = auto.from_pretrained(
            served.path,
            dtype=_DTYPES[served.options.dtype],
            trust_remote_code=trust,
            local_files_only=True,
            output_loading_info=True,
        )
        model, info = found
        _require_whole(served, info["missing_keys"])
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, JobError):
            raise
        raise RunError(f"the model in {served.path} cannot be loaded: {error}", "look at its config.json") from error
    device = device_of(served)
    model = model.to(device)  # type: ignore[arg-type]  # a decorator of transformers hides torch's signature
    model.eval().requires_grad_(False)
    log.info("%s: %s, %s on %s", served.name, config.model_type, str(model.dtype).removeprefix("torch."), device)
    ends = _ends(getattr(getattr(model, "generation_config", None), "eos_token_id", None), tokenizer.eos_token_id)
    return Loaded(model, tokenizer, device, length_of(config, served.options), ends)


def _require_whole(served: ServedModel, missing: Iterable[str]) -> None:
    """Transformers would fill what is missing with random numbers. A pooler is not used: vectors are hidden states'."""
    lacking = sorted(name for name in missing if not (served.options.task == "embed" and "pooler" in name.split(".")))
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        remedy = "copy its files again" if served.options.task == "embed" else "copy its files again, or --task embed"
        raise JobError("model", f"{served.path} lacks the weight {lacking[0]}{more}", remedy)


def device_of(served: ServedModel) -> torch.device:
    return torch.device("cuda" if served.use_gpu else "cpu")


def length_of(config: Any, options: EngineOptions) -> int:
    """Tokens of prompt and answer that a model takes.

    Raises:
        JobError: `max_model_len` is more.
    """
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if options.max_model_len is None:
        return int(own or _UNBOUNDED)
    if own and options.max_model_len > own:
        raise JobError("max_model_len", f"{options.max_model_len} is more than the model's {own} positions", "lower it")
    return options.max_model_len


def _ends(*found: Any) -> tuple[int, ...]:
    ids = [i for part in found if part is not None for i in (part if isinstance(part, (list, tuple)) else [part])]
    return tuple(dict.fromkeys(ids))
