"""An adapter merged into the weights of its base: a model of its own, for programs that know no adapters."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.errors import JobError
from swift_dist.tuners._export import write_model, written_whole
from swift_dist.tuners._peft import WEIGHTS

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_BESIDE = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "added_tokens.json")
_POOLING = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*")


def merge(
    base_folder: str | Path,
    adapter_folder: str | Path,
    target: str | Path,
    *,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> Path:
    """Write the model that an adapter makes of its base: W + s B A of LoRA, and so on, for every kind that PEFT merges.

    Products are added in fp32 and rounded once, to the dtype of the base's weights. The tokenizer's files, and what
    sentence-transformers wrote of a model for embeddings, come from the adapter's folder, where it has them, else from
    the base's. One module's weights are in memory at a time, beside the adapter; where an adapter or an architecture
    does not allow that, a warning says why, and what the whole needs.

    Args:
        base_folder: whole weights, not quantised.
        adapter_folder: what PEFT or an export of ours wrote.
        target: the folder to write; replaced when the new one is whole.

    Returns:
        `target`.

    Raises:
        JobError: the folders are none, or do not belong together, or one of them is not whole; `target` cannot be made.
        RunError: the disk has no room.
    """
    base, adapter, folder_out = Path(base_folder), Path(adapter_folder), Path(target)
    for key, folder, needed in (("base", base, "config.json"), ("adapter", adapter, "adapter_config.json")):
        if not (folder / needed).is_file():
            raise JobError(key, f"{folder} has no {needed}", "name a folder that holds one")
    from swift_dist.converters.safetensors_io import parse_size
    from swift_dist.tuners._loading import read_config
    from swift_dist.tuners._merge_by_module import merge_by_module
    from swift_dist.tuners._stored import NotStreamed

    shard_bytes = parse_size(max_shard_size)
    config = read_config(adapter)
    with _new_folder(folder_out) as new:
        try:
            empty_model = _empty_model(base, adapter, trust_remote_code)
            merge_by_module(base, adapter, config, empty_model, new, shard_bytes)
        except NotStreamed as reason:
            _say_whole(base, reason)
            for file in new.iterdir():
                file.unlink()
            _merge_whole(base, adapter, config, new, max_shard_size, trust_remote_code)
        for pattern in _BESIDE:
            for file in {f.name: f for folder in (base, adapter) for f in folder.glob(pattern) if f.is_file()}.values():
                shutil.copyfile(file, new / file.name)
        for folder in [f for f in (adapter, base) if (f / "modules.json").is_file()][:1]:
            _copy_pooling(folder, new)
    return folder_out


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """`written_whole`, with a JobError where there can be no such folder."""
    with ExitStack() as stack:
        try:
            new = stack.enter_context(written_whole(target))
        except OSError as error:
            raise JobError(
                "target",
                f"{target} cannot be made: {error.strerror}: {error.filename}",
                "name a new folder in one that can be written to",
            ) from None
        yield new


def _copy_pooling(folder: Path, new: Path) -> None:
    """How sentence-transformers makes a text's vector of hidden states: files, and a folder for each step."""
    for pattern in _POOLING:
        for found in folder.glob(pattern):
            (shutil.copytree if found.is_dir() else shutil.copyfile)(found, new / found.name)


def _say_whole(base: Path, reason: Exception) -> None:
    files = [*base.glob("*.safetensors")] or [*base.glob("*.bin")]
    size = sum(file.stat().st_size for file in files)
    log.warning(
        "the whole model is held in memory, in fp32, to merge this adapter (%s): %.1f GiB if its files are in 16 bits, "
        "%.1f GiB if they are in fp32, and what the adapter needs",
        *(reason, 2 * size / 2**30, size / 2**30),
    )


def _merge_whole(
    base: Path, adapter: Path, config: Any, new: Path, max_shard_size: str, trust_remote_code: bool
) -> None:
    """What `merge_by_module` does, by PEFT's own `merge_and_unload`."""
    from swift_dist.tuners._loading import load_adapter, merging, refuse_parted_beneath
    from swift_dist.tuners._stored import tied_weights

    model = _whole_model(base, adapter, trust_remote_code)
    stored = model.dtype
    tied = bool(tied_weights(model))
    wrapped = load_adapter(model.float(), adapter, config, on_meta=False)
    refuse_parted_beneath(wrapped)
    with merging(adapter):
        merged: Any = wrapped.merge_and_unload(safe_merge=True)
    if tied:
        _refuse_untied(merged)
    weights: dict[str, torch.Tensor] = {
        name: tensor.to(stored) if tensor.is_floating_point() else tensor
        for name, tensor in merged.state_dict().items()
    }
    with _without_deepspeeds_log():
        write_model(merged, weights, new, max_shard_size)


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


def _base_kind(base: Path, adapter: Path) -> tuple[Any, dict[str, Any]]:
    """(transformers' class with the head that the adapter's task asks for, what its config says otherwise than the
    base's)."""
    import transformers
    from safetensors import SafetensorError, safe_open

    from swift_dist.tuners._loading import refuse_torn

    task = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    if task == "FEATURE_EXTRACTION" or (task is None and _has_no_head(base)):
        return transformers.AutoModel, {}
    classes = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    }
    kind = classes.get(task, transformers.AutoModelForCausalLM)
    if kind is transformers.AutoModelForCausalLM:
        return kind, {}
    try:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            heads = [n for n in file.keys() if n.rsplit(".", 2)[-2] in ("score", "classifier") and n.endswith("weight")]  # noqa: SIM118
            return kind, {"num_labels": file.get_slice(heads[0]).get_shape()[0]} if heads else {}
    except (OSError, SafetensorError) as error:
        refuse_torn(adapter)
        raise JobError("adapter", f"{adapter / WEIGHTS} cannot be read: {error}", "get the adapter again") from None


def _has_no_head(base: Path) -> bool:
    """Whether a folder's weights are of a model that gives hidden states."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return MODEL_MAPPING_NAMES.get(config.get("model_type")) in (config.get("architectures") or ())


def _empty_model(base: Path, adapter: Path, trust_remote_code: bool) -> Callable[[], Any]:
    """What makes the base's model without its weights.

    Raises:
        NotStreamed: it is quantised.
    """
    from transformers import AutoConfig

    from swift_dist.tuners._merge_by_module import empty
    from swift_dist.tuners._stored import NotStreamed

    kind, changes = _base_kind(base, adapter)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, **changes)
    if getattr(config, "quantization_config", None):
        raise NotStreamed("the base is quantised")
    return lambda: empty(kind, config, trust_remote_code)


def _whole_model(base: Path, adapter: Path, trust_remote_code: bool) -> Any:
    """The base in the dtype of its weights."""
    kind, changes = _base_kind(base, adapter)
    model = kind.from_pretrained(base, dtype="auto", trust_remote_code=trust_remote_code, **changes)
    if getattr(model, "is_quantized", False):
        raise JobError("base", f"{base} is quantised", "merge into the weights it was quantised from")
    return model


def _refuse_untied(model: Any) -> None:
    """Refuse a model whose config ties the embedding with the output layer, and whose adapter has parted them."""
    import torch

    from swift_dist.tuners._loading import refuse_parted
    from swift_dist.tuners._stored import tied_weights

    for alias, kept in tied_weights(model).items():
        a, b = model.get_parameter(alias), model.get_parameter(kept)
        if a.data_ptr() != b.data_ptr() and not torch.equal(a, b):
            refuse_parted(alias)
