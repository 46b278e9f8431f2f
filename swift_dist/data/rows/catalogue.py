"""Well-known datasets of the hubs: their ids, splits, formats and columns. None was fetched to write this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class HubDataset:
    """One dataset.

    Args:
        name: what ``data.train`` may call it, besides its ids.
        format: of its rows, a file of this folder.
        hf: id on the Hugging Face hub; ms: on ModelScope. None: not there, or not known to be.
        subset: its configuration, where it has several.
        split: the one to train on; validation: the one to evaluate on, where it has one for that.
        columns: {name that the format knows: name in the dataset}.
    """

    name: str
    format: str
    hf: str | None = None
    ms: str | None = None
    subset: str | None = None
    split: str = "train"
    validation: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


_SFT = "train_sft"
_QUESTION = {"query": "problem", "response": "solution"}

CATALOGUE: tuple[HubDataset, ...] = (
    # instructions
    HubDataset("alpaca-en", "alpaca", "tatsu-lab/alpaca"),
    HubDataset("alpaca-cleaned", "alpaca", "yahma/alpaca-cleaned", "AI-ModelScope/alpaca-cleaned"),
    HubDataset("alpaca-gpt4-en", "alpaca", "vicgalle/alpaca-gpt4", "AI-ModelScope/alpaca-gpt4-data-en"),
    HubDataset("alpaca-gpt4-zh", "alpaca", "llm-wizard/alpaca-gpt4-data-zh", "AI-ModelScope/alpaca-gpt4-data-zh"),
    HubDataset("belle-0.5m", "alpaca", "BelleGroup/train_0.5M_CN", "AI-ModelScope/train_0.5M_CN"),
    HubDataset("belle-1m", "alpaca", "BelleGroup/train_1M_CN", "AI-ModelScope/train_1M_CN"),
    HubDataset("belle-2m", "alpaca", "BelleGroup/train_2M_CN", "AI-ModelScope/train_2M_CN"),
    HubDataset("coig-cqia-ruozhiba", "alpaca", "m-a-p/COIG-CQIA", "AI-ModelScope/COIG-CQIA", subset="ruozhiba"),
    HubDataset(
        *("dolly-15k", "alpaca", "databricks/databricks-dolly-15k"),
        columns={"instruction": "instruction", "input": "context", "output": "response"},
    ),
    HubDataset(
        *("firefly-1.1m", "query_response", "YeungNLP/firefly-train-1.1M", "AI-ModelScope/firefly-train-1.1M"),
        columns={"query": "input", "response": "target"},
    ),
    HubDataset("long-alpaca-12k", "alpaca", "Yukang/LongAlpaca-12k", "AI-ModelScope/LongAlpaca-12k"),
    HubDataset("no-robots", "messages", "HuggingFaceH4/no_robots", "swift/no_robots"),
    HubDataset("open-platypus", "alpaca", "garage-bAInd/Open-Platypus", "AI-ModelScope/Open-Platypus"),
    HubDataset(
        *("open-orca", "query_response", "Open-Orca/OpenOrca", "AI-ModelScope/OpenOrca"),
        columns={"query": "question", "response": "response", "system": "system_prompt"},
    ),
    # conversations
    HubDataset("belle-dialogue", "alpaca", "BelleGroup/generated_chat_0.4M", "AI-ModelScope/generated_chat_0.4M"),
    HubDataset("capybara", "messages", "trl-lib/Capybara"),
    HubDataset("infinity-instruct-3m", "sharegpt", "BAAI/Infinity-Instruct", "swift/Infinity-Instruct", subset="3M"),
    HubDataset("magpie-pro-300k", "sharegpt", "Magpie-Align/Magpie-Pro-300K-Filtered"),
    HubDataset("oasst-guanaco", "text", "timdettmers/openassistant-guanaco"),
    HubDataset("open-hermes-2.5", "sharegpt", "teknium/OpenHermes-2.5", "swift/OpenHermes-2.5"),
    HubDataset("sharegpt-gpt4", "sharegpt", "shibing624/sharegpt_gpt4", "AI-ModelScope/sharegpt_gpt4"),
    HubDataset("slim-orca", "sharegpt", "Open-Orca/SlimOrca", "swift/SlimOrca"),
    HubDataset("smoltalk", "messages", "HuggingFaceTB/smoltalk", subset="all"),
    HubDataset("tulu-2", "messages", "allenai/tulu-v2-sft-mixture", "AI-ModelScope/tulu-v2-sft-mixture"),
    HubDataset("tulu-3", "messages", "allenai/tulu-3-sft-mixture"),
    HubDataset(
        *("ultrachat-200k", "messages", "HuggingFaceH4/ultrachat_200k", "swift/ultrachat_200k"),
        split=_SFT,
        validation="test_sft",
    ),
    HubDataset("wizardlm-evol-196k", "sharegpt", "WizardLM/WizardLM_evol_instruct_V2_196k"),
    # mathematics, code, reasoning
    HubDataset("belle-school-math", "alpaca", "BelleGroup/school_math_0.25M", "AI-ModelScope/school_math_0.25M"),
    HubDataset(
        *("chinese-r1-distill-110k", "alpaca", "Congliu/Chinese-DeepSeek-R1-Distill-data-110k-SFT"),
        "liucong/Chinese-DeepSeek-R1-Distill-data-110k-SFT",
    ),
    HubDataset("code-alpaca-20k", "alpaca", "sahil2801/CodeAlpaca-20k", "AI-ModelScope/CodeAlpaca-20k"),
    HubDataset("gsm8k", "query_response", "openai/gsm8k", "modelscope/gsm8k", subset="main"),
    HubDataset(
        *("magicoder-evol-110k", "alpaca", "ise-uiuc/Magicoder-Evol-Instruct-110K"), columns={"output": "response"}
    ),
    HubDataset("math", "query_response", "DigitalLearningGmbH/MATH-lighteval", columns=_QUESTION),
    HubDataset("math-instruct", "alpaca", "TIGER-Lab/MathInstruct", "AI-ModelScope/MathInstruct"),
    HubDataset("meta-math-qa", "query_response", "meta-math/MetaMathQA", "swift/MetaMathQA"),
    HubDataset("numina-math-cot", "messages", "AI-MO/NuminaMath-CoT", "AI-MO/NuminaMath-CoT"),
    HubDataset("openr1-math-220k", "messages", "open-r1/OpenR1-Math-220k", subset="default"),
    HubDataset("open-thoughts-114k", "sharegpt", "open-thoughts/OpenThoughts-114k"),
    HubDataset(
        *("sql-create-context", "alpaca", "b-mc2/sql-create-context", "AI-ModelScope/sql-create-context"),
        columns={"instruction": "question", "input": "context", "output": "answer"},
    ),
    # tools and agents
    HubDataset("glaive-function-calling-v2", "sharegpt", "hiyouga/glaive-function-calling-v2-sharegpt"),
    HubDataset("ms-agent-bench", "sharegpt", ms="damo/MSAgent-Bench"),
    HubDataset("toolbench", "toolbench", ms="swift/ToolBench"),
    HubDataset(
        *("xlam-function-calling-60k", "query_response", "Salesforce/xlam-function-calling-60k"),
        columns={"query": "query", "response": "answers"},  # the calls as JSON, which is what those models write
    ),
    # pairs and judged answers
    HubDataset("hh-rlhf", "preference", "Anthropic/hh-rlhf", "AI-ModelScope/hh-rlhf"),
    HubDataset("orca-dpo-pairs", "preference", "Intel/orca_dpo_pairs", "swift/orca_dpo_pairs"),
    HubDataset("orpo-dpo-mix-40k", "preference", "mlabonne/orpo-dpo-mix-40k"),
    HubDataset(
        *("ultrafeedback", "preference", "HuggingFaceH4/ultrafeedback_binarized"),
        split="train_prefs",
        validation="test_prefs",
    ),
    HubDataset("zhihu-rlhf-3k", "preference", "liyucheng/zhihu_rlhf_3k", "AI-ModelScope/zhihu_rlhf_3k"),
    HubDataset("kto-mix-14k", "kto", "trl-lib/kto-mix-14k"),
    HubDataset("ultrafeedback-kto", "kto", "argilla/ultrafeedback-binarized-preferences-cleaned-kto"),
    # classes, plain text
    HubDataset("ag-news", "classification", "fancyzhx/ag_news"),
    HubDataset("emotion", "classification", "dair-ai/emotion", subset="split", validation="validation"),
    HubDataset("imdb", "classification", "stanfordnlp/imdb"),
    HubDataset("sst2", "classification", "stanfordnlp/sst2", validation="validation", columns={"text": "sentence"}),
    HubDataset("conll2003", "token_classification", "eriktks/conll2003", validation="validation"),
    HubDataset("tiny-stories", "text", "roneneldan/TinyStories", validation="validation"),
)


def find_dataset(name: str) -> HubDataset | None:
    """The dataset of that name or id, in any case of letters; None if the catalogue has none."""
    wanted = name.lower()
    return next((entry for entry in CATALOGUE if wanted in _called(entry)), None)


def _called(entry: HubDataset) -> tuple[str, ...]:
    return tuple(name.lower() for name in (entry.name, entry.hf, entry.ms) if name)
