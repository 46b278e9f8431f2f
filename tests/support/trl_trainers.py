"""TRL's own trainers, each with a tiny random model and a tokenizer trained on the spot: no network, nothing saved."""

from __future__ import annotations

import contextlib
import copy
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

PAD = 3


@contextlib.contextmanager
def trl_trainers(folder: Path) -> Iterator[SimpleNamespace]:
    """One trainer each (sft, dpo, kto, reward, cpo, orpo), and the reference model of dpo and kto.

    What making them changes in this process is put back afterwards.
    """
    environment, dice, numpy_dice = dict(os.environ), random.getstate(), np.random.get_state()
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    try:
        with torch.random.fork_rng(devices=[]):
            yield make_trainers(str(folder))
    finally:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for shared in (AcceleratorState, GradientState, PartialState):
            shared._shared_state.clear()
        random.setstate(dice)
        np.random.set_state(numpy_dice)
        os.environ.clear()
        os.environ.update(environment)


def make_trainers(folder: str) -> SimpleNamespace:
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import (
        DPOConfig,
        DPOTrainer,
        KTOConfig,
        KTOTrainer,
        RewardConfig,
        RewardTrainer,
        SFTConfig,
        SFTTrainer,
    )
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    tokenizer = make_tokenizer()
    common = {"output_dir": folder, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    common |= {"gradient_checkpointing": False, "per_device_train_batch_size": 4, "disable_tqdm": True}
    # What is computed on is handed over below; the trainers want a data set to be made.
    pairs = Dataset.from_dict({"prompt": ["a b", "a c"], "chosen": ["d e", "f"], "rejected": ["g", "h i"]})
    judged = Dataset.from_dict({"prompt": ["a b", "a c"], "completion": ["d e", "f"], "label": [True, False]})
    ranked = Dataset.from_dict({"chosen": ["a b", "a c"], "rejected": ["d e", "f"]})
    texts = Dataset.from_dict({"text": ["a b", "a c"]})
    reference = make_model(1)

    def made(trainer: Any, config: Any, data: Any, model: Any = None, **more: Any) -> Any:
        with_data = {"args": config(**common), "train_dataset": data, "processing_class": tokenizer}
        return trainer(model or make_model(0), **with_data, **more)

    score = make_model(0, LlamaForSequenceClassification, num_labels=1)
    return SimpleNamespace(
        sft=made(SFTTrainer, SFTConfig, texts),
        dpo=made(DPOTrainer, DPOConfig, pairs, ref_model=copy.deepcopy(reference)),
        kto=made(KTOTrainer, KTOConfig, judged, ref_model=copy.deepcopy(reference)),
        reward=made(RewardTrainer, RewardConfig, ranked, score),
        cpo=made(CPOTrainer, partial(CPOConfig, loss_type="simpo", cpo_alpha=0.0), pairs),
        orpo=made(ORPOTrainer, ORPOConfig, pairs),
        reference=reference,
    )


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words.train_from_iterator(
        ["a b c d e f g h i j k l m n o p q r s t u v w x"], trainers.WordLevelTrainer(special_tokens=special)
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def make_model(seed: int, kind: Any = None, **more: Any) -> torch.nn.Module:
    """A random model whose probabilities are far from even, so that terms are of about the same size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return (kind or LlamaForCausalLM)(
        LlamaConfig(vocab_size=28, **sizes, initializer_range=0.3, pad_token_id=PAD, **more)
    )
