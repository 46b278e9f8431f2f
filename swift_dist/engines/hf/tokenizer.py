"""The tokenizer of a job, as its exports and its padding need it."""

from __future__ import annotations

import logging
from typing import Any

from swift_dist.config import JobConfig
from swift_dist.objectives.base import Needs

log = logging.getLogger(__name__)


def tokenizer_of(job: JobConfig) -> Any:
    """``model.tokenizer``, else what lies in the model's folder; None: there is none.

    Raises:
        OSError, ValueError: ``model.tokenizer`` is none.
    """
    from transformers import AutoTokenizer

    path = job.model.tokenizer or job.model.path
    if path is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=job.model.trust_remote_code)
    except (OSError, ValueError) as error:
        if job.model.tokenizer:
            raise
        log.info("%s has no tokenizer that could go with the weights (%s)", path, str(error).splitlines()[0])
        return None


def choose_pad(model: Any, job: JobConfig, needs: Needs) -> int:
    """The token that fills rows up. Any would do for a loss of tokens, none of which it is; a classification head must
    know it: it reads the last token that is another.

    Where the head's config.json names none, it becomes the tokenizer's, with which whoever loads the export will pad
    (Qwen's is not the end of a turn); without one, the end of a text.
    """
    config = model.config.get_text_config()
    stated = getattr(config, "pad_token_id", None)  # CodeGen's has none

    def is_token(number: Any) -> bool:
        return number is not None and 0 <= number < config.vocab_size

    if is_token(stated) or needs == "tokens":
        return int(stated) if stated is not None and is_token(stated) else 0
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    candidates = [getattr(tokenizer_of(job), "pad_token_id", None), *ends, 0]
    config.pad_token_id = next(number for number in candidates if is_token(number))
    return config.pad_token_id
