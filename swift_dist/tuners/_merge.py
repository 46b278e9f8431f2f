"""An adapter merged into the weights of its base: a model of its own, for programs that know no adapters."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from swift_dist.errors import JobError
from swift_dist.tuners._export import write_model, written_whole
from swift_dist.tuners._peft import WEIGHTS, adapted_ties

if TYPE_CHECKING:
    import torch

_BESIDE = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "added_tokens.json")


def merge(
    base_folder: str | Path,
    adapter_folder: str | Path,
    target: str | Path,
    *,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> Path:
    """Write the model that an adapter makes of its base: W + s B A of LoRA, and so on, for every kind that PEFT merges.

    Products are added in fp32 and rounded once, to the dtype of the base's weights. The tokenizer's files come from the
    adapter's folder, where it has them, else from the base's.

    Args:
        base_folder: whole weights, not quantised.
        adapter_folder: what PEFT or an export of ours wrote.
        target: the folder to write; replaced when the new one is whole.

    Returns:
        `target`.

    Raises:
        JobError: the folders are none, or do not belong together.
    """
    base, adapter, folder_out = Path(base_folder), Path(adapter_folder), Path(target)
    for key, folder, needed in (("base", base, "config.json"), ("adapter", adapter, "adapter_config.json")):
        if not (folder / needed).is_file():
            raise JobError(key, f"{folder} has no {needed}", "name a folder that holds one")
    import torch
    from peft import PeftModel

    model = _base_model(base, adapter, trust_remote_code)
    stored = model.dtype
    tied = bool(getattr(model, "all_tied_weights_keys", None))
    wrapped = PeftModel.from_pretrained(model.float(), adapter)
    parted = adapted_ties(wrapped)
    if parted:
        _refuse_parted(parted[0])
    merged: Any = wrapped.merge_and_unload(safe_merge=True)
    if tied:
        _refuse_untied(merged)
    weights: dict[str, torch.Tensor] = {
        name: tensor.to(stored) if tensor.is_floating_point() else tensor
        for name, tensor in merged.state_dict().items()
    }
    assert stored in (torch.float32, torch.bfloat16, torch.float16)
    with written_whole(folder_out) as new:
        with _without_deepspeeds_log():
            write_model(merged, weights, new, max_shard_size)
        for pattern in _BESIDE:
            for file in {f.name: f for folder in (base, adapter) for f in folder.glob(pattern) if f.is_file()}.values():
                shutil.copyfile(file, new / file.name)
    return folder_out


@contextmanager
def _without_deepspeeds_log() -> Iterator[None]:
    """accelerate imports DeepSpeed to save any model, where it is installed, which on a CPU warns of that on stdout."""
    log = logging.getLogger("DeepSpeed")
    log.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _base_model(base: Path, adapter: Path, trust_remote_code: bool) -> Any:
    """The base with the head that the adapter's task asks for, in the dtype of its weights."""
    import transformers
    from safetensors import safe_open

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    arguments: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code}
    classes = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    }
    kind = classes.get(config.get("task_type"), transformers.AutoModelForCausalLM)
    if kind is not transformers.AutoModelForCausalLM:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            heads = [n for n in file.keys() if n.rsplit(".", 2)[-2] in ("score", "classifier") and n.endswith("weight")]  # noqa: SIM118
            if heads:
                arguments["num_labels"] = file.get_slice(heads[0]).get_shape()[0]
    model = kind.from_pretrained(base, **arguments)
    if getattr(model, "is_quantized", False):
        raise JobError("base", f"{base} is quantised", "merge into the weights it was quantised from")
    return model


def _refuse_untied(model: Any) -> None:
    """Refuse a model whose config ties the embedding with the output layer, and whose adapter has parted them."""
    import torch

    for alias, kept in model.all_tied_weights_keys.items():
        a, b = model.get_parameter(alias), model.get_parameter(kept)
        if a.data_ptr() != b.data_ptr() and not torch.equal(a, b):
            _refuse_parted(alias)


def _refuse_parted(name: str) -> NoReturn:
    raise JobError(
        "adapter",
        f"it changes {name}, which is also another weight of the base (tied), without the other",
        "use the adapter without merging it",
    )
