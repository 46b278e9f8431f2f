"""A transformers model as the scheduler steps it: rows of tokens in, the logits of each row's newest token out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from swift_dist.errors import JobError, RunError
from swift_dist.serving.hf.cache import BLOCK, Blocks, KeyValuePool, LayerShape, PooledCache, StepView, blocks_for
from swift_dist.serving.options import EngineOptions, ServedModel

log = logging.getLogger(__name__)

_DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNBOUNDED = 1 << 20  # tokens, for a model that names no limit (Mamba's state has none)
_SPARE_GPU = 1 << 30  # bytes for activations, where the cache takes the rest


class Row(Protocol):
    """What the model needs to know of a sequence.

    Attributes:
        tokens: prompt and answer.
        cached: how many of them the model has seen.
        blocks: its part of the pool.
        state: a model's own cache of this sequence, where there is no pool.
    """

    tokens: list[int]
    cached: int
    blocks: Blocks
    state: dict[str, Any] | None


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
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trust = served.options.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(served.path, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(served.path, trust_remote_code=trust)
        if getattr(config, "is_encoder_decoder", False):
            raise JobError("model", f"{config.model_type} is an encoder-decoder", "serve a decoder-only model")
        model = AutoModelForCausalLM.from_pretrained(
            served.path, dtype=_DTYPES[served.options.dtype], trust_remote_code=trust, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, JobError):
            raise
        raise RunError(f"the model in {served.path} cannot be loaded: {error}", "look at its config.json") from error
    device = device_of(served)
    model = model.to(device)  # type: ignore[arg-type]  # a decorator of transformers hides torch's signature
    model.eval().requires_grad_(False)
    log.info("%s: %s, %s on %s", served.name, config.model_type, str(model.dtype).removeprefix("torch."), device)
    ends = _ends(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    return Loaded(model, tokenizer, device, length_of(config, served.options), ends)


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


class PooledRunner:
    """Any number of rows in one forward, over a `KeyValuePool`."""

    batched = True

    def __init__(self, loaded: Loaded, options: EngineOptions) -> None:
        self._loaded, self._model = loaded, loaded.model
        shapes = _layer_shapes(self._model)
        per_token = sum(shape.bytes for shape in shapes)
        tokens = min(_cache_bytes(loaded.device, options) // per_token, options.max_num_seqs * _whole(loaded.length))
        if options.max_model_len is not None and tokens < loaded.length:
            raise RunError(
                f"keys and values of {loaded.length} tokens take {loaded.length * per_token / 2**30:.2f} GiB: "
                f"only {tokens} tokens fit",
                "raise cpu_cache_gib (on a GPU gpu_memory_utilization) or lower max_model_len",
            )
        self.pool = KeyValuePool(shapes, tokens, loaded.device)
        self.length = min(loaded.length, self.pool.tokens)
        if self.length < loaded.length:
            log.warning("prompt and answer are limited to %d tokens: no more fit into the cache", self.length)

    def forward(self, call: Any, rows: Sequence[Row], new: Sequence[int], every: bool = False) -> torch.Tensor:
        """Let the model see the next `new[i]` tokens of each row; their slots are reserved.

        Args:
            call: the model, or what runs it with an adapter.
            every: whether logits of all the new tokens are wanted, of a single row.

        Returns:
            Logits in float32, [rows, vocabulary], of each row's last new token; with `every` [new tokens, vocabulary].
        """
        most = max(new)
        device = self._loaded.device
        ids = torch.zeros(len(rows), most, dtype=torch.long)
        for at, (row, number) in enumerate(zip(rows, new, strict=True)):
            ids[at, most - number :] = torch.tensor(row.tokens[row.cached : row.cached + number])
        width = max(blocks_for(row.cached + number) for row, number in zip(rows, new, strict=True))
        tables = torch.stack([row.blocks.table[:width] for row in rows]).to(device)
        view = StepView.of(
            tables, torch.tensor([row.cached for row in rows], device=device), torch.tensor(new, device=device)
        )
        out = call(
            input_ids=ids.to(device),
            attention_mask=view.mask.long(),
            position_ids=view.positions,
            past_key_values=PooledCache(self.pool, view),
            use_cache=True,
            logits_to_keep=0 if every else 1,
        )
        return (out.logits[0] if every else out.logits[:, -1]).float()


class SerialRunner:
    """One row a forward, over the cache that the model makes itself: for states that cannot be padded (Mamba)."""

    batched = False
    pool = None

    def __init__(self, loaded: Loaded) -> None:
        self._loaded, self._model, self.length = loaded, loaded.model, loaded.length

    def forward(self, call: Any, rows: Sequence[Row], new: Sequence[int], every: bool = False) -> torch.Tensor:
        """As `PooledRunner.forward`, for a single row whose tokens are all new, or all but one cached."""
        (row,), (number,) = rows, new
        model, device = self._model, self._loaded.device
        seen = torch.tensor([row.tokens[: row.cached + number]], device=device)
        first = row.state is None
        kwargs = {"use_cache": True, "attention_mask": torch.ones_like(seen)} if row.state is None else row.state
        inputs = model.prepare_inputs_for_generation(
            seen, next_sequence_length=number, is_first_iteration=first, **kwargs
        )
        out = call(**inputs, return_dict=True)
        row.state = model._update_model_kwargs_for_generation(out, kwargs)
        return (out.logits[0] if every else out.logits[:, -1]).float()


def runner(loaded: Loaded, options: EngineOptions) -> PooledRunner | SerialRunner:
    """What steps this model: a batch where its cache is keys and values of tokens, else a row after the other."""
    reason = _why_serial(loaded.model)
    if reason is None:
        return PooledRunner(loaded, options)
    log.warning("sequences are computed one after another: %s", reason)
    return SerialRunner(loaded)


def _why_serial(model: Any) -> str | None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    wanted = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
    if missing := sorted(wanted - set(inspect.signature(model.forward).parameters)):
        return f"{type(model).__name__} takes no {', '.join(missing)}"
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} keeps a state instead of tokens"
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if other := layers - {DynamicLayer, DynamicSlidingWindowLayer}:
        return f"{type(model).__name__} caches in {', '.join(sorted(kind.__name__ for kind in other))}"
    try:
        worst = _difference(model)
    except Exception as error:
        return f"{type(model).__name__} does not run on a pooled cache ({type(error).__name__}: {error})"
    if worst > _TOLERANCE[model.dtype]:
        return f"{type(model).__name__} gives other logits on a pooled cache (by {worst:.2g} of their spread)"
    return None


_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@torch.inference_mode()
def _difference(model: Any) -> float:
    """How far a padded batch over a pool, in two chunks, is from plain forwards, in standard deviations of the logits.

    What no list of architectures can say of one that comes tomorrow, or from a folder's own code.
    """
    device = next(model.parameters()).device
    vocabulary = int(model.config.get_text_config().vocab_size)
    draws = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary, (length,), generator=draws).to(device) for length in (5, 9)]
    pool = KeyValuePool(_layer_shapes(model), 4 * BLOCK, device)
    rows = [Blocks(1) for _ in texts]
    for row, text in zip(rows, texts, strict=True):
        pool.reserve(row, len(text))
    tables = torch.stack([row.table for row in rows]).to(device)
    for cached, new in (((0, 0), (3, 7)), ((3, 7), (2, 2))):
        view = StepView.of(tables, torch.tensor(cached, device=device), torch.tensor(new, device=device))
        ids = torch.stack(
            [
                torch.nn.functional.pad(text[c : c + n], (max(new) - n, 0))
                for text, c, n in zip(texts, cached, new, strict=True)
            ]
        )
        got = model(
            input_ids=ids,
            attention_mask=view.mask.long(),
            position_ids=view.positions,
            past_key_values=PooledCache(pool, view),
            use_cache=True,
        ).logits[:, -1]
    worst = 0.0
    for text, logits in zip(texts, got.float(), strict=True):
        plain = model(input_ids=text[None], use_cache=False).logits[0, -1].float()
        worst = max(worst, float((plain - logits).abs().max() / plain.std().clamp(min=1e-6)))
    return worst if worst == worst else float("inf")


def _layer_shapes(model: Any) -> list[LayerShape]:
    """What each layer caches, seen in a forward of one token."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        device = next(model.parameters()).device
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
    shapes = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            raise RunError(f"{type(model).__name__}: a layer caches nothing", "")
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype))
    return shapes


def _cache_bytes(device: torch.device, options: EngineOptions) -> int:
    """Bytes for keys and values."""
    if device.type == "cpu":
        return int(options.cpu_cache_gib * 2**30)
    free, total = torch.cuda.mem_get_info(device)
    left = int(options.gpu_memory_utilization * total) - (total - free) - _SPARE_GPU
    if left <= 0:
        raise RunError("the model leaves no GPU memory for keys and values", "raise gpu_memory_utilization")
    return left


def _whole(tokens: int) -> int:
    return blocks_for(tokens) * BLOCK
