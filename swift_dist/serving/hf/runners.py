"""A transformers model as the scheduler steps it: rows of tokens in, the logits of each row's newest token out."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from swift_dist.errors import RunError
from swift_dist.serving.hf.cache import BLOCK, Blocks, KeyValuePool, LayerShape, PooledCache, StepView, blocks_for
from swift_dist.serving.hf.model import Loaded
from swift_dist.serving.options import EngineOptions

log = logging.getLogger(__name__)

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


class PooledRunner:
    """Any number of rows in one forward, over a `KeyValuePool`.

    Attributes:
        shares: whether what one sequence computed for its first tokens is what another one would.
    """

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
        self.shares = not _depends_on_length(self._model.config)
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
        return _pooled_forward(call, self.pool, rows, new, self._loaded.device, every)


def _pooled_forward(
    call: Any, pool: KeyValuePool, rows: Sequence[Row], new: Sequence[int], device: torch.device, every: bool = False
) -> torch.Tensor:
    """`PooledRunner.forward` over any pool."""
    most = max(new)
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
        past_key_values=PooledCache(pool, view),
        use_cache=True,
        logits_to_keep=0 if every else 1,
    )
    return (out.logits[0] if every else out.logits[:, -1]).float()


class SerialRunner:
    """One row a forward, over the cache that the model makes itself: for states that cannot be padded (Mamba).

    Args:
        cache_bytes: of all rows' states.
    """

    batched = False

    def __init__(self, loaded: Loaded, cache_bytes: int) -> None:
        self._loaded, self._model, self.length = loaded, loaded.model, loaded.length
        self._bytes = cache_bytes

    def room(self, running: Sequence[Row]) -> bool:
        """Whether one more sequence may begin: by what the running ones take now, and at most take each.

        A state that grows (a hybrid model's attention) is counted as it is, so the limit may be passed by what the
        running sequences grow.
        """
        if not running:
            return True
        taken = [_state_bytes(row.state) for row in running]
        return sum(taken) + max(taken) <= self._bytes

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
    """What steps this model: a batch where its cache is keys and values of tokens, else a row after the other.

    Raises:
        RunError: neither gives the logits of a plain forward.
    """
    reason = _why_serial(loaded.model)
    if reason is None:
        return PooledRunner(loaded, options)
    log.warning("sequences are computed one after another: %s", reason)
    serial = SerialRunner(loaded, _cache_bytes(loaded.device, options))
    worst = _serial_difference(serial, loaded)
    if worst > _TOLERANCE[loaded.model.dtype]:
        # Seen with RecurrentGemma, which keeps the one sequence's state that it can have in its modules.
        raise RunError(
            f"{type(loaded.model).__name__}: sequences that take turns with a cache of their own get other logits than "
            f"without one (by {worst:.2g} of their spread)",
            "use another engine for this model",
        )
    return serial


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


@dataclass
class _Sample:
    tokens: list[int]
    blocks: Blocks
    cached: int = 0
    state: dict[str, Any] | None = None


def _samples(vocabulary: int) -> list[_Sample]:
    draws = torch.Generator().manual_seed(0)
    return [_Sample(torch.randint(vocabulary, (n,), generator=draws).tolist(), Blocks(1)) for n in (5, 9)]


def _distance(model: Any, tokens: list[int], logits: torch.Tensor) -> float:
    """How far logits [vocabulary] are from a plain forward's, in standard deviations of those; inf where not a number.

    What no list of architectures can say of one that comes tomorrow, or from a folder's own code.
    """
    ids = torch.tensor([tokens], device=logits.device)
    plain = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    worst = float((plain - logits.float()).abs().max() / plain.std().clamp(min=1e-6))
    return worst if math.isfinite(worst) else math.inf


class SoundCheck:
    """Whether a model still computes what it did when this was made: the logits of a few tokens, without a cache."""

    @torch.inference_mode()
    def __init__(self, loaded: Loaded) -> None:
        self._tokens = _samples(loaded.vocabulary)[0].tokens
        ids = torch.tensor([self._tokens], device=loaded.device)
        self._logits = loaded.model(input_ids=ids, use_cache=False).logits[0, -1].float()
        self._tolerance = _TOLERANCE[loaded.model.dtype]

    @torch.inference_mode()
    def check(self, call: Any) -> None:
        """Compare what `call` computes, the model without adapters.

        Raises:
            RuntimeError: it is something else. What a device raises that has failed for good is passed on.
        """
        worst = _distance(call, self._tokens, self._logits)
        if worst > self._tolerance:
            raise RuntimeError(f"after an error the model computes other logits than before (by {worst:.2g})")


@torch.inference_mode()
def _serial_difference(serial: SerialRunner, loaded: Loaded) -> float:
    """The distance after two sequences have taken turns."""
    rows = _samples(loaded.vocabulary)
    turns = [(row, len(row.tokens) - 2) for row in rows] + [(row, 1) for row in (*rows, *rows)]
    last: dict[int, torch.Tensor] = {}
    for row, new in turns:
        last[id(row)] = serial.forward(loaded.model, [row], [new])[0]
        row.cached += new
    return max(_distance(loaded.model, row.tokens, last[id(row)]) for row in rows)


@torch.inference_mode()
def _difference(model: Any) -> float:
    """The distance of a padded batch over a pool, in two chunks."""
    device = next(model.parameters()).device
    rows = _samples(int(model.config.get_text_config().vocab_size))
    pool = KeyValuePool(_layer_shapes(model), 4 * BLOCK, device)
    for row in rows:
        pool.reserve(row.blocks, len(row.tokens))
    got = torch.empty(0)
    for new in ((3, 7), (2, 2)):
        got = _pooled_forward(model, pool, rows, new, device)
        for row, number in zip(rows, new, strict=True):
            row.cached += number
    return max(_distance(model, row.tokens, logits) for row, logits in zip(rows, got, strict=True))


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


def _depends_on_length(config: Any) -> bool:
    """Whether keys depend on how long the text is that they are part of: by rotary embeddings that change with it."""
    text = json.dumps(config.to_dict(), default=str)
    return any(f'type": "{kind}"' in text for kind in ("dynamic", "longrope", "su"))


def _state_bytes(state: Any) -> int:
    """What a model's own cache holds, wherever it keeps its tensors."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(_state_bytes(part) for part in state.values())
    if isinstance(state, (list, tuple)):
        return sum(_state_bytes(part) for part in state)
    return _state_bytes(vars(state)) if hasattr(state, "layers") or hasattr(state, "is_initialized") else 0


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
