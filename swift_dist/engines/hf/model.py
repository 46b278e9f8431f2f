"""The model of a job, as transformers and the job's tuners make it: the same whole weights on every rank."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from swift_dist.config import JobConfig
from swift_dist.config.applies import key_that_packs, reason_for_padding
from swift_dist.data.samples.collate import Layout
from swift_dist.engines.hf import attention
from swift_dist.errors import JobError
from swift_dist.models import model_folder
from swift_dist.objectives.base import Needs
from swift_dist.sequence_parallel import attention as shared_attention
from swift_dist.sequence_parallel.rotary import show_longest
from swift_dist.tuners import TunerStack

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_AUTO = {
    "tokens": "AutoModelForCausalLM",
    "sequence_scores": "AutoModelForSequenceClassification",
    "token_scores": "AutoModelForTokenClassification",
}


def load_base(
    job: JobConfig,
    hf_config: dict[str, Any],
    needs: Needs,
    tuners: TunerStack | None,
    *,
    num_labels: int | None = None,
    path: str | None = None,
    on_meta: bool = False,
) -> torch.nn.Module:
    """A model as transformers makes it, on the CPU.

    Args:
        job: the job.
        hf_config: the model's config.json.
        needs: what it is to return; decides its head.
        tuners: say how weights are to be loaded; the base of an adapter is held in the compute precision, what
            learns as a whole in fp32. None: nothing learns (a reference).
        num_labels: outputs of its head (None: as config.json says).
        path: another model than the job's.
        on_meta: on the meta device, of files' headers only: the same model without its numbers.

    Raises:
        JobError: transformers has no such model, or cannot read it.
    """
    import transformers

    auto = getattr(transformers, _AUTO[needs])
    learns_whole = tuners is not None and tuners.saves == "model"
    dtype = torch.float32 if learns_whole else DTYPES[job.train.precision]
    arguments = {"dtype": dtype, "trust_remote_code": job.model.trust_remote_code}
    if job.model.attention:
        arguments["attn_implementation"] = job.model.attention
    if needs != "tokens" and num_labels:
        arguments["num_labels"] = num_labels
    try:
        source = path or job.model.path
        if source and (path or job.model.resolved_init == "pretrained"):
            arguments |= tuners.load_arguments() if tuners else {}
            folder = model_folder(source, weights=True)
            if on_meta:
                with _without_numbers():
                    return auto.from_pretrained(folder, device_map="meta", **arguments)
            return auto.from_pretrained(folder, **arguments)
        config = _config(job, hf_config)
        if "num_labels" in arguments:
            config.num_labels = arguments.pop("num_labels")
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            model = auto.from_config(config, **arguments)
        model.to(dtype)
        return model
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise JobError(
            "model.path" if path is None else "objective.reference",
            f"transformers cannot make this model: {str(error).splitlines()[0]}",
            f"give a folder or id that {_AUTO[needs]}.from_pretrained reads",
        ) from error


@contextlib.contextmanager
def _without_numbers() -> Iterator[None]:
    """transformers 5.23 reads every tensor of a file even where it is to lie on the meta device."""
    from transformers import core_model_loading

    read = core_model_loading._materialize_copy

    def shape_only(tensor: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = tensor.get_shape()
        dtype = dtype or (tensor[:0] if shape else tensor[...]).dtype
        return torch.empty(shape, dtype=dtype, device="meta")

    core_model_loading._materialize_copy = shape_only
    try:
        yield
    finally:
        core_model_loading._materialize_copy = read


def is_quantized(config: Any, tuners: TunerStack | None) -> bool:
    """Whether a model's weights are quantised in its files, or become so as they are read.

    Args:
        config: its config.json.
        tuners: see `load_base`.
    """
    return bool(config.get("quantization_config") or (tuners and tuners.load_arguments()))


def _config(job: JobConfig, hf_config: dict[str, Any], path: str | None = None) -> Any:
    from transformers import AutoConfig

    path = path or job.model.path
    if path:
        folder = model_folder(path, weights=False)
        return AutoConfig.from_pretrained(folder, trust_remote_code=job.model.trust_remote_code)
    values = dict(hf_config)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def text_config(job: JobConfig, hf_config: dict[str, Any], path: str | None = None) -> dict[str, Any]:
    """The text model's configuration with all that config.json leaves to transformers' defaults; config.json itself
    where transformers cannot read it (`load_base` says why).

    Args:
        job, hf_config, path: see `load_base`.
    """
    try:
        config = _config(job, hf_config, path).get_text_config()
        return {**config.to_dict(), "num_attention_heads": config.num_attention_heads}
    except (ValueError, KeyError, OSError, ImportError, AttributeError):
        return hf_config


def choose_layout(job: JobConfig, model: Any, needs: Needs) -> Layout:
    """ "packed" or "padded": how a micro-batch is laid out for this model; sets the attention that goes with it.

    Raises:
        JobError: packing, or a layout without padding, is asked for and the model cannot do it.
    """
    wanted, shares = job.data.padding_free, job.parallel.context_parallel_size > 1
    reason = reason_for_padding(job, needs) or attention.refusal(model)
    key = key_that_packs(job)
    if reason and key:
        raise JobError(key, f"{type(model).__name__}: {reason}", f"leave out {key}")
    if reason or (wanted is False and not job.data.packing):
        if reason and job.task != "pretrain":
            log.info("batches are padded: %s", reason)
        return "padded"
    attention.register(is_compiled=job.train.compile)
    model.set_attn_implementation(attention.NAME)
    if shares:
        shared_attention.register(attention.attend_whole_rows)
        model.set_attn_implementation(shared_attention.NAME)
        show_longest(model)
    return "packed"


def tiles_loss(job: JobConfig) -> bool | None:
    """Whether log-probabilities are made without logits. By default where sequences are long enough to be shared, and
    the model's output layer can (None)."""
    shares = job.parallel.context_parallel_size > 1
    return job.train.tiled_loss if job.train.tiled_loss is not None or shares else False


def recompute_layers(model: Any) -> None:
    """Keep the input of each layer alone; the backward pass computes the rest of it again (arXiv 1604.06174).

    Raises:
        JobError: transformers cannot do it with this model.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise JobError("train.recompute", str(error).splitlines()[0], "leave it out") from error


def compile_layers(model: torch.nn.Module) -> None:
    """torch.compile each layer by itself, for any length: all layers share what was compiled for one.

    Raises:
        JobError: the model does not say what its layers are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise JobError("train.compile", f"{type(model).__name__} does not name its layers", "leave it out")
    for layer in layers:
        layer.compile(dynamic=True)


def apply_tuners(model: torch.nn.Module, tuners: TunerStack, seed: int, *, on_meta: bool = False) -> torch.nn.Module:
    """Let every tuner change the model; what learns is held in fp32 from here on.

    Args:
        model: as `load_base` makes it.
        tuners: of the job.
        seed: of what they draw.
        on_meta: `model` is on the meta device.

    Raises:
        JobError: nothing is left that learns.
    """
    with torch.device("meta") if on_meta else contextlib.nullcontext():  # what they add lies where the rest does
        model = tuners.apply(model, seed=seed)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learning:
        raise JobError("tuner.name", "no weight of the model learns", "look at the tuner's patterns of names")
    for parameter in learning:
        parameter.data = parameter.data.float()
    return model
