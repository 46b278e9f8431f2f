"""From a micro-batch of tokens to the model's arguments and to what an objective reads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from swift_dist.data.samples.collate import MISMATCHED
from swift_dist.engines.base import MicroBatch
from swift_dist.engines.hf.attention import boundaries
from swift_dist.engines.hf.logps import token_logps
from swift_dist.engines.hf.output_layer import install
from swift_dist.errors import JobError
from swift_dist.objectives.base import Batch, Needs
from swift_dist.sequence_parallel.group import SharedRow, SharingRanks, gather_tokens
from swift_dist.sequence_parallel.row import row_for_all

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True)
class Prepared:
    """A micro-batch on its device.

    Args:
        arguments: of the model's forward.
        batch: the objective's view, without log-probabilities and scores.
        labels: int64 [N], the tokens to predict where the weight is not 0.
        columns: int64 [K], the positions whose logits are wanted, of every row of the micro-batch.
        chosen: bool [b, K], which of those are among the N.
        num_tokens: tokens that are no padding.
        numbers: int64 [num_sequences] on the CPU, which of all the job's sequences each is, -1: it fills up; None: of
            text.
    """

    arguments: dict[str, Any]
    batch: Batch
    labels: torch.Tensor
    columns: torch.Tensor
    chosen: torch.Tensor
    num_tokens: int
    numbers: torch.Tensor | None = None
    gathering: Gathering | None = None


@dataclass(frozen=True)
class Gathering:
    """How the log-probabilities of ranks that share a row come together. `Prepared.batch` is of the whole row then, and
    `labels`, `columns` and `chosen` are of this rank's tokens.

    Args:
        counts: of each rank's tokens, how many count in the loss.
        order: int64 [sum of counts], the place in the row's order of what the ranks hold, rank after rank.
        group: the ranks.
    """

    counts: list[int]
    order: torch.Tensor
    group: dist.ProcessGroup


def parted(micro_batch: MicroBatch) -> tuple[MicroBatch, MicroBatch | None]:
    """What a loss is of, and KTO's mismatched answers, where there are some."""
    mismatched = {n.removeprefix(MISMATCHED): t for n, t in micro_batch.items() if n.startswith(MISMATCHED)}
    return {n: t for n, t in micro_batch.items() if not n.startswith(MISMATCHED)}, mismatched or None


def prepare(
    micro_batch: MicroBatch,
    device: torch.device,
    needs: Needs,
    sharing: SharingRanks | None = None,
    *,
    packs_text: bool = False,
) -> Prepared:
    """Move a micro-batch to `device` and take it apart.

    Args:
        micro_batch: as `data.samples.loader.SampleData` lays it out (one part of it: see `parted`), or as
            `data.loader.TrainingData` does (whole samples of packed text).
        sharing: the ranks that share the row; this one's tokens are moved.
        packs_text: lay text out in one row, a sequence beginning wherever a position is 0 (ranks that share rows always
            do); else its samples are the rows, one sequence each.
    """
    if "loss_mask" in micro_batch:
        micro_batch = _row_of_text(micro_batch) if packs_text or sharing is not None else _rows_of_text(micro_batch)
    if sharing is not None:
        return _prepare_shared(micro_batch, device, sharing)
    held = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
    weights, segments = held["weights"], held["segments"]
    arguments: dict[str, Any] = {"input_ids": held["tokens"], "use_cache": False}
    if "attention_mask" in held:
        arguments["attention_mask"] = held["attention_mask"]
    elif len(held["tokens"]) == 1:
        arguments |= {"position_ids": held["position_ids"], **boundaries(_lengths(micro_batch), device)}
    mask = weights != 0
    columns = mask.any(dim=0).nonzero().squeeze(1)
    batch = Batch(
        weights=weights[mask],
        segments=segments[mask],
        lengths=held["lengths"],
        sample_weights=held["sample_weights"],
        labels=held.get("sequence_labels"),
    )
    if needs == "token_scores":
        batch = replace(batch, labels=held["labels"][mask])
    num_tokens = int((micro_batch["segments"] >= 0).sum())
    numbers = micro_batch.get("numbers")
    return Prepared(arguments, batch, held["labels"][mask], columns, mask[:, columns], num_tokens, numbers)


def _lengths(micro_batch: MicroBatch) -> list[int]:
    """Of the sequences of a packed row; what fills the row up is a sequence of its own."""
    lengths = [int(length) for length in micro_batch["lengths"]]
    rest = micro_batch["tokens"].numel() - sum(lengths)
    return [*lengths, rest] if rest else lengths


def _prepare_shared(micro_batch: MicroBatch, device: torch.device, sharing: SharingRanks) -> Prepared:
    """Every rank of a group reads the same micro-batch; only its own tokens go to the device and through the model."""
    row = row_for_all(tuple(_lengths(micro_batch)), sharing.degrees)
    filling = sum(row.lengths) - micro_batch["tokens"].numel()
    tokens, labels, weights, segments, positions = (
        torch.nn.functional.pad(micro_batch[name].flatten(), (0, filling), value=value)
        for name, value in (("tokens", 0), ("labels", -100), ("weights", 0), ("segments", -1), ("position_ids", 0))
    )
    mine, mask = row.of(sharing.rank), weights != 0
    # among the tokens that count, which each is; then the same, rank after rank
    order = (mask.cumsum(0) - 1)[row.order[mask[row.order]]]
    counts = [int(part.sum()) for part in mask[row.order].split(row.sizes)]
    chosen = mask[mine]
    batch = Batch(
        weights=weights[mask].to(device),
        segments=segments[mask].to(device),
        lengths=micro_batch["lengths"].to(device),
        sample_weights=micro_batch["sample_weights"].to(device),
        labels=micro_batch["sequence_labels"].to(device) if "sequence_labels" in micro_batch else None,
    )
    arguments = {
        "input_ids": tokens[mine][None].to(device, non_blocking=True),
        "position_ids": positions[mine][None].to(device, non_blocking=True),
        "use_cache": False,
        "shared_row": SharedRow(sharing, row),
    }
    columns = chosen.nonzero().squeeze(1).to(device)
    return Prepared(
        arguments,
        batch,
        labels[mine][chosen].to(device),
        columns,
        torch.ones(1, len(columns), dtype=torch.bool, device=device),
        int((segments >= 0).sum()),
        micro_batch.get("numbers"),
        Gathering(counts, order.to(device), sharing.group),
    )


def _row_of_text(micro_batch: MicroBatch) -> MicroBatch:
    names = {"tokens": "tokens", "labels": "labels", "weights": "loss_mask", "position_ids": "position_ids"}
    row = {name: micro_batch[source].reshape(1, -1) for name, source in names.items()}
    segments = (row["position_ids"] == 0).cumsum(1) - 1
    lengths = segments[0].bincount()
    return {**row, "segments": segments, "lengths": lengths, "sample_weights": torch.ones(len(lengths))}


def _rows_of_text(micro_batch: MicroBatch) -> MicroBatch:
    tokens = micro_batch["tokens"]
    rows, length = tokens.shape
    return {
        "tokens": tokens,
        "labels": micro_batch["labels"],
        "weights": micro_batch["loss_mask"],
        "segments": torch.arange(rows)[:, None].expand(rows, length),
        "attention_mask": torch.ones_like(tokens),
        "lengths": torch.full((rows,), length),
        "sample_weights": torch.ones(rows),
    }


class Forward:
    """Calls the model and gives the objective what it needs.

    Only the logits of positions that count are made where the model allows it (``logits_to_keep``): prompts and
    padding cost no product with the vocabulary.

    Args:
        model: the model as transformers made it, before tuners and strategies wrapped it.
        needs: what the objective needs.
        tiled: of tokens, make log-probabilities without logits (`output_layer.py`); None: where the output layer can.

    Raises:
        JobError: `tiled`, and the model's output layer cannot be.
    """

    def __init__(self, model: torch.nn.Module, needs: Needs, *, tiled: bool | None = False) -> None:
        self._needs = needs
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        tiles = tiled is not False and needs == "tokens" and self._keeps_logits
        self._output = install(model) if tiles else None
        if tiled and needs == "tokens" and self._output is None:
            raise JobError(
                "train.tiled_loss",
                f"{type(model).__name__} has no plain output layer whose logits are the model's",
                "--train.tiled_loss false",
            )

    def __call__(self, module: torch.nn.Module, prepared: Prepared) -> Batch:
        """`prepared.batch` with log-probabilities or scores, with gradient."""
        if self._needs == "sequence_scores":
            return replace(prepared.batch, scores=module(**prepared.arguments).logits.float())
        if self._needs == "token_scores":
            logits = module(**prepared.arguments).logits[:, prepared.columns]
            return replace(prepared.batch, scores=logits[prepared.chosen].float())
        logps = self._logps(module, prepared)
        if prepared.gathering is not None:
            shared = prepared.gathering
            logps = gather_tokens(logps, shared.counts, shared.order, shared.group)
        return replace(prepared.batch, logps=logps)

    def likeliest(self, module: torch.nn.Module, prepared: Prepared) -> torch.Tensor:
        """int64 [N], the token of the largest logit at each position that counts (of all ranks that share the row)."""
        logits, chosen = self._logits(module, prepared)
        tokens = logits[chosen].argmax(-1)
        shared = prepared.gathering
        return tokens if shared is None else gather_tokens(tokens, shared.counts, shared.order, shared.group)

    def _logps(self, module: torch.nn.Module, prepared: Prepared) -> torch.Tensor:
        """[N]."""
        if self._output is not None:
            columns, chosen = _some_position(prepared)
            with self._output.of(chosen, prepared.labels):
                return self._output.checked(module(**prepared.arguments, logits_to_keep=columns).logits)
        logits, chosen = self._logits(module, prepared)
        if logits.shape[0] > 1:
            logits = logits[chosen]
        else:  # a packed row: every column is chosen, and a view costs no copy in either direction (a slice costs one)
            logits = logits.view(-1, logits.shape[-1])
            logits = logits if len(logits) == len(prepared.labels) else logits[: len(prepared.labels)]
        return token_logps(logits, prepared.labels, reuse_logits=True)

    def _logits(self, module: torch.nn.Module, prepared: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [b, K, V] of the wanted positions, and which of them count [b, K]."""
        if not self._keeps_logits:
            return module(**prepared.arguments).logits[:, prepared.columns], prepared.chosen
        columns, chosen = _some_position(prepared)
        return module(**prepared.arguments, logits_to_keep=columns).logits, chosen


def _some_position(prepared: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns, chosen) of a micro-batch; where nothing counts one position that is not chosen, so that every rank's
    forward and backward take part."""
    columns, chosen = prepared.columns, prepared.chosen
    if len(columns):
        return columns, chosen
    return columns.new_zeros(1), torch.zeros(len(chosen), 1, dtype=torch.bool, device=columns.device)
