"""An adapter's folder around a transformers model, to be merged: every tensor of it has its place, or it is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from swift_dist.errors import JobError, listed
from swift_dist.tuners._peft import ADAPTER, WEIGHTS, adapted_ties
from swift_dist.tuners._stored import NotStreamed


def read_config(adapter: Path) -> Any:
    """PEFT's configuration of an adapter.

    Raises:
        JobError: PEFT does not know it, or adds it to prompts rather than to weights.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # an unknown kind, keys of another version, no JSON: PEFT raises what it meets
        raise JobError(
            "adapter", f"PEFT cannot read {adapter / 'adapter_config.json'}: {error}", "correct or restore it"
        ) from None
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise JobError("adapter", f"{kind} adds to prompts and not to weights", "use the adapter without merging it")
    return config


def load_adapter(model: Any, adapter: Path, config: Any, *, on_meta: bool) -> Any:
    """PEFT's model of `model` with an adapter.

    Args:
        on_meta: the model is on the meta device; the adapter's tensors are on the CPU all the same.

    Raises:
        JobError: they do not belong together, or the adapter's weights are not whole.
        NotStreamed: PEFT cannot load it on the meta device.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    config.inference_mode = True
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern", UserWarning)
            wrapped = kind(model, config, ADAPTER, low_cpu_mem_usage=on_meta)
            if on_meta:
                _stay_on_the_cpu(wrapped)
            found = wrapped.load_adapter(str(adapter), ADAPTER, torch_device="cpu", low_cpu_mem_usage=on_meta)
    except NotImplementedError as error:
        raise NotStreamed(f"PEFT needs values to load it: {error}") from error
    except Exception as error:  # shapes, names, a damaged file: PEFT, torch and safetensors raise what they meet
        refuse_torn(adapter)
        said = listed((line.strip() for line in str(error).splitlines()), 4)  # torch's heading, then a line each
        raise JobError(
            "adapter", f"{adapter} does not fit its base: {said}", "name the base that it was trained on"
        ) from error
    shared = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")  # PEFT stores these once for all modules
    for problem, names in (("lacks", found.missing_keys), ("has", found.unexpected_keys)):
        names = [name for name in names if not any(part in name for part in shared)]
        if names:
            raise JobError(
                "adapter",
                f"{adapter} {problem} {names[0]}, other than its config says of this base ({len(names)} such tensors)",
                "name the base that it was trained on, or get the adapter again",
            )
    return wrapped


def refuse_torn(adapter: Path) -> None:
    """Raises JobError where an adapter's weights are not there, or not whole."""
    from swift_dist.converters.safetensors_io import read_bin, read_safetensors

    for file, read in ((adapter / WEIGHTS, read_safetensors), (adapter / "adapter_model.bin", read_bin)):
        if file.is_file():  # PEFT reads the first one that is
            try:
                read(file)
            except (OSError, ValueError) as error:
                raise JobError("adapter", f"{file} is not a whole weight file: {error}", "copy it again") from None
            return
    raise JobError("adapter", f"{adapter} holds no {WEIGHTS}", "copy the whole folder")


def _stay_on_the_cpu(wrapped: Any) -> None:
    """Leave an adapter's tensors where they are loaded: PEFT would move them to the device of their base.

    AdaLoRA's `ranknum` is in no file, and has been moved already: it is the rank (peft/tuners/adalora/layer.py).
    """
    import torch

    for module in wrapped.modules():
        if hasattr(module, "ranknum") and module.ranknum[ADAPTER].is_meta:
            rank = torch.tensor([float(module.r[ADAPTER])])
            module.ranknum[ADAPTER] = torch.nn.Parameter(rank, requires_grad=False)
        if hasattr(module, "_move_adapter_to_device_of_base_layer"):
            module._move_adapter_to_device_of_base_layer = lambda *_, **__: None


@contextmanager
def merging(adapter: Path) -> Iterator[None]:
    """PEFT's refusal of what is not finite, as an error about the adapter."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, JobError):
            raise
        raise JobError("adapter", f"{adapter} cannot be merged: {error}", "use an earlier one") from None


def refuse_parted_beneath(wrapped: Any) -> None:
    """Raises JobError where a weight beneath an adapter is another one of the base, too."""
    parted = adapted_ties(wrapped)
    if parted:
        refuse_parted(parted[0])


def refuse_parted(name: str) -> NoReturn:
    raise JobError(
        "adapter",
        f"it changes {name}, which is also another weight of the base (tied), without the other",
        "use the adapter without merging it",
    )
