"""Megatron-LM's legacy checkpoints (``--ckpt-format torch``), read: one ``model_optim_rng.pt`` a rank. No torch.

Each file is an archive of torch.save with a dict: ``args`` (argparse.Namespace), ``checkpoint_version``, ``iteration``,
``model`` (``model0``, ``model1``, ... with virtual pipeline stages), optimizer and random state; see
``generate_state_dict`` in megatron/training/checkpointing.py. Pickles are loaded with inert placeholders
(`torch_files`), so nothing in them runs. Names and their sources upstream: tests/converters/legacy_upstream.md.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swift_dist.converters.legacy_side import Grid, Rank, RankSide
from swift_dist.converters.mapping import Duplicate, Row, expand
from swift_dist.converters.stored import FLOATS, StoredTensor
from swift_dist.converters.torch_files import Archive, fields_of, name_of, tensor_ref
from swift_dist.errors import JobError

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")  # the second beside optim.pt: distributed optimizer before 2023-05
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_STATE = "_extra_state"  # Transformer Engine's own: FP8 factors
_BOOKKEEPING = ("args", "checkpoint_version", "iteration", "model")


@dataclass
class _File:
    """What one rank's file holds."""

    args: dict[str, Any] = field(default_factory=dict)
    iteration: int | None = None
    models: list[dict[str, StoredTensor]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


class LegacyCheckpoint:
    """The files of a checkpoint.

    Attributes:
        folder: of the ranks' folders.
        args: plain values of the first rank's arguments; {} where the file has none.
        iteration: None: not stated.
        tensors: every rank's weights by stored name, ``<rank folder>/<model key>``; with virtual pipeline stages
            ``<rank folder>/model<k>/<model key>``.
        ignored: keys of what is no weight: optimizer, random state, FP8 factors.

    Args:
        folder: ``iter_...`` or ``release``, or the folder above with ``latest_checkpointed_iteration.txt``.
        key: of the option that errors name.

    Raises:
        JobError: a rank's file is missing, damaged, or no state dict of a GPTModel of megatron-core; files of different
            layouts or iterations.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str = "source") -> None:
        self.key = key
        self.folder = _with_ranks(Path(folder), key)
        found = self._find_ranks()
        first = min(found)
        files = {first: self._read(found[first])}
        self.args, self.iteration = files[first].args, files[first].iteration
        self.grid, ranks = self._layout(found, files[first])
        for rank, numbers in ranks.items():
            if numbers not in found:
                raise self._wrong(f"{self.grid.folder(rank)}/{MODEL_FILES[0]} is missing", "copy the checkpoint again")
        unexpected = sorted(found.keys() - set(ranks.values()))
        if unexpected:
            raise self._wrong(f"{found[unexpected[0]].parent.name} does not belong to {self._described()}")
        for rank, numbers in ranks.items():
            file = files[numbers] = files.get(numbers) or self._read(found[numbers])
            self._check_same(rank, file, files[first])
        self.tensors = {
            full: replace(stored, name=full)
            for rank, numbers in ranks.items()
            for virtual, model in enumerate(files[numbers].models)
            for name, stored in model.items()
            for full in (self.grid.stored_name(rank, virtual, name),)
        }
        self.ignored = sorted({name for file in files.values() for name in file.ignored})

    @property
    def tp(self) -> int:
        return self.grid.tp

    @property
    def pp(self) -> int:
        return self.grid.pp

    @property
    def ep(self) -> int:
        return self.grid.ep

    @property
    def vpp(self) -> int:
        return self.grid.vpp

    @property
    def etp(self) -> int:
        return self.grid.etp

    def layers(self) -> list[int]:
        """How many layers each model chunk has, in the order of `Grid.chunks`.

        Counted rather than computed from the arguments: whichever of Megatron-LM's ways to split uneven stages was
        used, layers follow one another from chunk to chunk.
        """
        first = {rank.pp: rank for rank in reversed(self.grid.ranks())}
        prefixes = [self.grid.stored_name(first[stage], virtual, "") for stage, virtual in self.grid.chunks()]
        seen: list[set[int]] = [set() for _ in prefixes]
        places = {prefix: index for index, prefix in enumerate(prefixes)}
        for name in self.tensors:
            prefix, _, local = name.rpartition("/")
            index = places.get(f"{prefix}/")
            if index is not None and (match := _LOCAL_LAYER.match(local)):
                seen[index].add(int(match[1]))
        for prefix, numbers in zip(prefixes, seen, strict=True):
            if numbers != set(range(len(numbers))):
                raise self._wrong(f"{prefix.rstrip('/')} lacks a layer: it has {sorted(numbers)}")
        return [len(numbers) for numbers in seen]

    def _wrong(self, problem: str, remedy: str = "use another checkpoint, or a whole copy of this one") -> JobError:
        return JobError(self.key, f"{self.folder}: {problem}", remedy)

    def _described(self) -> str:
        return f"a checkpoint with tensor {self.tp}, pipeline {self.pp}, expert {self.ep} (etp {self.etp}) ranks"

    def _find_ranks(self) -> dict[tuple[int, ...], Path]:
        """The file of each rank, by the numbers in the folder's name."""
        found: dict[tuple[int, ...], Path] = {}
        for path in sorted(self.folder.glob("mp_rank_*")):
            match = _RANK.fullmatch(path.name)
            if match is None or not path.is_dir():
                continue
            file = next((path / name for name in MODEL_FILES if (path / name).is_file()), None)
            if file is not None:
                found[tuple(int(number) for number in match.groups() if number is not None)] = file
            elif not (path / "optim.pt").is_file():  # such folders are data-parallel ranks' optimizer only
                raise self._wrong(f"{path.name}/{MODEL_FILES[0]} is missing", "copy the checkpoint again")
        if not found:
            raise self._wrong("holds no mp_rank_*/model_optim_rng.pt", "name a legacy Megatron-LM checkpoint")
        if len({len(numbers) for numbers in found}) > 1:
            names = ", ".join(found[numbers].parent.name for numbers in (min(found), max(found, key=len)))
            raise self._wrong(f"mixes files of different layouts ({names}, ...)", "keep the files of one save only")
        return found

    def _layout(self, found: Mapping[tuple[int, ...], Path], first: _File) -> tuple[Grid, dict[Rank, tuple[int, ...]]]:
        """The layout, and the numbers in each rank's folder name.

        A second number alone is a pipeline rank, or an expert rank where there is one pipeline stage.
        """
        most = [max(column) + 1 for column in zip(*found, strict=True)]
        tp, pp, ep = (*most, 1, 1)[:3]
        if len(most) == 2:
            pp, ep = (1, most[1]) if self._second_is_expert(found) else (most[1], 1)
        sizes = {"tensor": tp, "pipeline": pp, "expert": ep}
        for name, size in sizes.items():
            stated = self.args.get(f"{name}_model_parallel_size")
            if isinstance(stated, int) and stated < size:
                raise self._wrong(f"its args say {name}_model_parallel_size {stated}, its folders {size}")
            sizes[name] = stated if isinstance(stated, int) else size  # more than there are: some are missing
        tp, pp, ep = sizes.values()
        etp = self.args.get("expert_tensor_parallel_size") or tp
        if tp % etp and not self.args.get("num_experts"):
            etp = tp  # of a dense model it means nothing
        if self.args.get("moe_extended_tp") or tp % etp:
            # ranks that differ in their expert tensor rank only write to the same file
            raise self._wrong(f"its experts are split over other ranks (etp {etp}) than its files tell apart (tp {tp})")
        grid = Grid(tp, pp, ep, max(1, len(first.models)), etp)
        numbers = {
            rank: (rank.tp, *((rank.pp,) if pp > 1 else ()), *((rank.ep,) if ep > 1 else ())) for rank in grid.ranks()
        }
        if len(numbers[Rank(0, 0, 0)]) != len(most):
            name = next(iter(found.values())).parent.name
            raise self._wrong(f"{name} is no name for {pp} pipeline and {ep} expert ranks, which its args state")
        return grid, numbers

    def _second_is_expert(self, found: Mapping[tuple[int, ...], Path]) -> bool:
        pp, ep = (self.args.get(f"{name}_model_parallel_size") for name in ("pipeline", "expert"))
        if isinstance(pp, int) and isinstance(ep, int):
            return ep > 1
        if isinstance(pp, int):
            return pp == 1
        # Without arguments: every expert rank has the embedding, of the pipeline only the first.
        last = self._read(found[max(found, key=lambda numbers: numbers[1])])
        return any(name.startswith("embedding.") for model in last.models for name in model)

    def _check_same(self, rank: Rank, file: _File, first: _File) -> None:
        name = self.grid.folder(rank)
        if file.iteration != first.iteration:
            raise self._wrong(f"{name} is of iteration {file.iteration}, others of {first.iteration}")
        if len(file.models) != len(first.models):
            raise self._wrong(f"{name} holds {len(file.models)} model chunks, others {len(first.models)}")
        for stated in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"):
            if file.args.get(stated) != first.args.get(stated):
                raise self._wrong(f"{name} says {stated} {file.args.get(stated)}, others {first.args.get(stated)}")

    def _read(self, path: Path) -> _File:
        name = f"{path.parent.name}/{path.name}"
        try:
            with path.open("rb") as stream:
                # Closed when the last view of it is gone: an error's traceback holds views.
                archive = Archive(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            content = archive.content
            if not isinstance(content, Mapping):
                raise ValueError(f"holds no dict but {name_of(content) or type(content).__name__}")
            return _file_of(archive, content, str(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise self._wrong(f"{name} cannot be read: {error}") from None


def _with_ranks(folder: Path, key: str) -> Path:
    """The folder of the ranks' folders: itself, or the one that Megatron-LM's tracker names."""
    if not folder.is_dir():
        raise JobError(key, f"{folder} is not a folder", "name a legacy Megatron-LM checkpoint")
    tracker = folder / TRACKER
    if next(folder.glob("mp_rank_*"), None) is not None or not tracker.is_file():
        return folder
    stated = tracker.read_text(encoding="utf-8", errors="replace").strip()
    inner = folder / (f"iter_{int(stated):07d}" if stated.isdecimal() else "release")
    if not (stated.isdecimal() or stated == "release") or not inner.is_dir():
        raise JobError(key, f"{tracker} names {stated!r}, which is not there", "name the iter_... folder itself")
    return inner


def _file_of(archive: Archive, content: Mapping[Any, Any], path: str) -> _File:
    """Raises ValueError: what is not as it should be."""
    names = ["model"] if "model" in content else []
    while not names or (names[0] != "model" and f"model{len(names)}" in content):
        if f"model{len(names)}" not in content:
            raise ValueError(f"holds no model but {sorted(map(str, content))}: no checkpoint of Megatron-LM")
        names.append(f"model{len(names)}")
    version = content.get("checkpoint_version", 3.0)
    if not isinstance(version, (int, float)) or version < 3.0:
        raise ValueError(f"checkpoint_version is {version}; only 3.0 has today's order of query, key and value")
    iteration = content.get("iteration")
    file = _File(_plain_arguments(content.get("args")), iteration if isinstance(iteration, int) else None)
    file.ignored = [str(name) for name in content if name not in (*names, *_BOOKKEEPING)]
    for name in names:
        model = content[name]
        if not isinstance(model, Mapping):
            raise ValueError(f"{name} is no state dict but {name_of(model) or type(model).__name__}")
        file.models.append(_model(archive, model, path, file.ignored))
    return file


def _model(archive: Archive, model: Mapping[Any, Any], path: str, ignored: list[str]) -> dict[str, StoredTensor]:
    if "language_model" in model:
        raise ValueError(
            "its model is megatron-legacy's (language_model.encoder...), not megatron-core's GPTModel; convert it "
            "first with Megatron-LM's tools/checkpoint/convert.py --saver core"
        )
    found = {}
    for name, value in model.items():
        if not isinstance(name, str):
            raise ValueError(f"its model has the key {name!r}")
        ref = tensor_ref(value)
        if name.endswith(_STATE):
            ignored.append(name)
        elif name.endswith((".mlp.experts.weight1", ".mlp.experts.weight2")):
            raise ValueError(
                f"{name} is GroupedMLP's (--moe-use-legacy-grouped-gemm), all experts' transposed weights in one, "
                "which is not read; save it with SequentialMLP or TEGroupedMLP"
            )
        elif ref is not None:
            found[name] = archive.stored(name, ref, path)
        elif value is not None:
            raise ValueError(f"{name} is no plain tensor but {name_of(value) or type(value).__name__}")
    return found


def _plain_arguments(stated: Any) -> dict[str, Any]:
    """The attributes of a pickled Namespace that are plain values; others (dtypes, enumerations) are left out."""
    attributes = stated if isinstance(stated, dict) else fields_of(stated)
    return {str(name): value for name, value in attributes.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


class LegacySide(RankSide):
    """The weights of a checkpoint, for plans.

    Args:
        num_layers, num_experts: of the model; num_experts 0: a dense one.

    Raises:
        JobError: the checkpoint has another number of layers, or its ranks cannot share the experts.
    """

    def __init__(self, checkpoint: LegacyCheckpoint, num_layers: int, num_experts: int = 0) -> None:
        layers = checkpoint.layers()
        if sum(layers) != num_layers:
            raise JobError(
                checkpoint.key,
                f"the checkpoint has {sum(layers)} layers ({' + '.join(map(str, layers))}), its config {num_layers}",
                "give the config.json that the checkpoint was trained with: --hf_config PATH",
            )
        if num_experts % checkpoint.ep or (checkpoint.ep > 1 and not num_experts):
            raise JobError(
                checkpoint.key,
                f"the checkpoint has {checkpoint.ep} expert ranks, its config {num_experts} experts",
                "give the config.json that the checkpoint was trained with: --hf_config PATH",
            )
        super().__init__(checkpoint.tensors, checkpoint.grid, layers, num_experts)
        self.ignored = checkpoint.ignored


def check_legacy(side: LegacySide, rows: Iterable[Row | Duplicate], key: str = "source") -> list[str]:
    """Compare a checkpoint with a model's rows: every tensor on every rank in its shape, and no weight that no row
    describes.

    Returns:
        keys of what is not weights: optimizer state and the like.

    Raises:
        JobError: naming what is missing, unexpected, or of another shape.
    """
    problems: list[str] = []
    used: set[str] = set()
    for tensor in expand(rows):
        try:
            shards = side.shards(tensor)
        except ValueError as error:
            problems.append(str(error))
            used.update(name for _, name in side.places(tensor))
            continue
        for shard in shards:
            problems += [f"missing: {name} {list(shard.part.shape)}" for name in shard.missing]
            for name in shard.names:
                stored = side.tensors[name]
                if stored.shape != shard.part.shape:
                    problems.append(
                        f"{name}: shape {list(stored.shape)}, the model's config says {list(shard.part.shape)}"
                    )
                elif stored.dtype not in FLOATS:
                    problems.append(f"{name}: stored as {stored.dtype}, not as plain floats")
            used.update(shard.names)
    unused = side.tensors.keys() - used
    problems += [f"mapped by no row: {name} {list(side.tensors[name].shape)}" for name in sorted(unused)]
    if problems:
        unique = list(dict.fromkeys(problems))
        shown = "\n  ".join(unique[:8]) + (f"\n  and {len(unique) - 8} more" if len(unique) > 8 else "")
        raise JobError(
            key,
            f"the checkpoint does not hold the model of its config:\n  {shown}",
            "give the config.json that the checkpoint was trained with: --hf_config PATH",
        )
    return side.ignored
