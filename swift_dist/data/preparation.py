"""What `data prepare` does, from the plan to the published files: the page to read first. Each step has its file."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from swift_dist import __version__
from swift_dist.data.bad_rows import describe
from swift_dist.data.encoder import Recipe
from swift_dist.data.input_hashes import InputHashes
from swift_dist.data.manifest import manifest_path
from swift_dist.data.merge import merge
from swift_dist.data.parts import PartFacts
from swift_dist.data.prepare import SPLIT_NAMES, PrepareOptions
from swift_dist.data.sources import discover
from swift_dist.data.store import bin_path, idx_path, token_dtype
from swift_dist.data.tokenizer_files import load_tokenizer
from swift_dist.data.units import boundary_kind, plan, unit_size
from swift_dist.data.work import Work
from swift_dist.data.work_folder import WorkFolder, write_json
from swift_dist.errors import JobError, RunError
from swift_dist.workers.pool import run_all, start_local
from swift_dist.workers.progress import Progress

logger = logging.getLogger(__name__)

_LISTED_BAD_ROWS = 1000
_NOT_IDENTITY = {"input", "tokenizer", "output", "workers", "on_error", "overwrite", "launcher", "ray_address"}


class Preparation:
    """One run of the verb.

    Raises:
        JobError: from the constructor or `run`, before anything was written.
    """

    def __init__(self, options: PrepareOptions) -> None:
        self.options, self.prefix = options, _prefix(options.output)
        self.files = discover(options)
        self.tokenizer = load_tokenizer(options.tokenizer, options.eod_token, options.add_special_tokens)
        if options.append_eod and self.tokenizer.eos_id is None:
            raise JobError(
                "append_eod", f"{options.tokenizer} does not say which token ends a text", "--eod_token '<|endoftext|>'"
            )
        self.eod_id = self.tokenizer.eos_id if options.append_eod else None
        self.dtype = np.dtype(token_dtype(self.tokenizer.vocab_size))
        self.unit_bytes = unit_size(self.files)
        self.units, self.streams = plan(self.files, options, self.unit_bytes)
        self.split_names = SPLIT_NAMES[: len(options.split)] if options.split else ("all",)
        self.identity = self._identity()

    def _identity(self) -> dict[str, Any]:
        """Everything that the output depends on. Two runs with the same one continue each other."""
        chosen = self.options.model_dump(mode="json", exclude=_NOT_IDENTITY)
        return {
            "format": 1,
            "inputs": [[file.path, file.size, file.mtime_ns] for file in self.files],
            "tokenizer": self.tokenizer.sha256,
            "options": {**chosen, "eod_id": self.eod_id, "dtype": self.dtype.name, "unit_bytes": self.unit_bytes},
        }

    def run(self) -> dict[str, Any]:
        begin = time.monotonic()
        with WorkFolder(self.prefix) as work:
            try:
                work.publish_leftover()
                found = self._finished_result()
                if found is not None and not self.options.overwrite:
                    return found
                replaced = self._replaced()
                work.begin(self.identity, self.options.overwrite)
                resumed, hashes = self._encode(work)
                result = self._finish(work, hashes, replaced)
            except OSError as error:
                raise _as_run_error(error) from error
        return {**result, "seconds": time.monotonic() - begin, "resumed_units": resumed, "already_done": False}

    def _encode(self, work: WorkFolder) -> tuple[int, list[str]]:
        """Make every part that is not there yet. Returns how many were there, and the hashes of the input files."""
        finished = [part.facts for part in work.finished_parts()]
        done = {facts.id for facts in finished}
        whole = _whole_files(finished)
        streams = [(file, boundary_kind(file, self.options)) for file in self.streams if file.index not in whole]
        if done:
            logger.info("going on where an interrupted run was: %d units are done", len(done))
        total = sum(unit.input_bytes for unit in self.units) + sum(file.size for file in self.streams)
        progress = Progress("data prepare", total, sum(facts.input_bytes for facts in finished))
        for facts in finished:
            self._refuse_bad_rows(facts)

        def seen(facts: PartFacts | None) -> None:
            if facts is None:
                progress.add()
                return
            self._refuse_bad_rows(facts)
            progress.add(facts.input_bytes, facts.text_bytes, sum(facts.tokens))

        hashes = InputHashes(self.files)
        try:
            with progress:
                if streams or any(unit.id not in done for unit in self.units):
                    with closing(Work(self.units, streams, self.unit_bytes, done)) as todo:
                        self._run_workers(work, todo, seen)
            return len(done), hashes.wait()
        finally:
            hashes.close()

    def _run_workers(self, work: WorkFolder, todo: Work, seen: Any) -> None:
        recipe = self._recipe(work)
        if self.options.launcher == "ray":
            from swift_dist.workers.ray_pool import RayPool

            pool = RayPool(recipe, self.options.ray_address, self.options.workers, Path(recipe.parts))
            try:
                run_all(todo.take, pool.workers, seen)
            finally:
                pool.close()
            return
        count = self.options.workers or len(os.sched_getaffinity(0))
        if not self.streams:
            count = min(count, len(self.units))
        run_all(todo.take, start_local(recipe, count), seen)

    def _recipe(self, work: WorkFolder) -> Recipe:
        shares = self.options.split or (1.0,)
        return Recipe(
            read=self.options,
            tokenizer=self.tokenizer.text,
            eod_id=None if self.tokenizer.appends_eos else self.eod_id,
            add_special_tokens=self.options.add_special_tokens,
            dtype=self.dtype.name,
            split=tuple(sum(shares[: k + 1]) for k in range(len(shares))),
            shuffle=self.options.shuffle,
            seed=self.options.seed,
            parts=str(work.parts.absolute()),
        )

    def _refuse_bad_rows(self, facts: PartFacts) -> None:
        if facts.bad_rows and self.options.on_error == "fail":
            raise RunError(describe(facts.bad_rows[:1])[0], "correct it, or --on_error skip leaves such rows out")

    def _finish(self, work: WorkFolder, hashes: Sequence[str], replaced: Sequence[Path]) -> dict[str, Any]:
        """Merge the parts, write the manifests and publish."""
        parts = sorted(work.finished_parts(), key=lambda part: part.facts.id)
        self._require_complete([part.facts for part in parts])
        facts = [part.facts for part in parts]
        for k, name in enumerate(self.split_names):
            if not any(part.documents[k] for part in facts):
                work.remove()
                raise self._no_document(name, sum(len(part.bad_rows) for part in facts))
        logger.info("merging %d parts", len(parts))
        rename: list[tuple[Path, Path]] = []
        indices: list[tuple[Path, Path]] = []
        manifests: dict[str, dict[str, Any]] = {}
        run = self._run_manifest(facts, hashes)
        for k, name in enumerate(self.split_names):
            prefix = self._dataset_prefix(name)
            merged_bin, merged_idx = bin_path(work.merged / name), idx_path(work.merged / name)
            outputs = merge(parts, k, self.dtype, self.options.shuffle, merged_bin, merged_idx)
            rename.append((merged_bin, bin_path(prefix)))
            indices.append((merged_idx, idx_path(prefix)))
            manifests[name] = self._dataset_manifest(k, name, facts, outputs)
        if not self.options.split:
            run.update(manifests["all"])
        else:
            run["datasets"] = {name: manifest["output"] for name, manifest in manifests.items()}
            for name, manifest in manifests.items():
                write_json(manifest_path(work.merged / name), manifest)
                rename.append((manifest_path(work.merged / name), manifest_path(self._dataset_prefix(name))))
        write_json(manifest_path(work.merged / "run"), run)
        rename.append((manifest_path(work.merged / "run"), manifest_path(self.prefix)))
        work.publish(replaced, [*rename, *indices])
        result = self._result(run, manifests)
        work.remove()
        return result

    def _no_document(self, name: str, num_bad: int) -> RunError:
        if self.options.split and num_bad == 0:
            remedy = "give it a larger share, or more and smaller documents (--text_unit)"
            return RunError(f"split {name} got no document", remedy)
        left_out = f": {num_bad} corrupt rows were left out" if num_bad else ""
        return RunError(f"there is no document in the input{left_out}", "check --text_key, --format and the files")

    def _require_complete(self, facts: Sequence[PartFacts]) -> None:
        done, whole = {part.id for part in facts}, _whole_files(facts)
        missing = [unit.id for unit in self.units if unit.id not in done]
        missing += [(file.index, -1) for file in self.streams if file.index not in whole]
        assert not missing, f"units never encoded: {missing[:5]}"

    def _run_manifest(self, facts: Sequence[PartFacts], hashes: Sequence[str]) -> dict[str, Any]:
        bad = [row for part in facts for row in part.bad_rows]
        listed = describe(bad[:_LISTED_BAD_ROWS])
        for text in listed[:10]:
            logger.warning("left out %s", text)
        if len(bad) > 10:
            logger.warning("... %d rows left out in all", len(bad))
        names = [(file.path, file.size) for file in self.files]
        return {
            "format": 1,
            "swift_dist": __version__,
            "identity": _digest(self.identity),
            "inputs": [
                {"path": path, "bytes": size, "sha256": sha} for (path, size), sha in zip(names, hashes, strict=True)
            ],
            "options": self.options.model_dump(
                mode="json", exclude={"workers", "launcher", "ray_address", "overwrite"}
            ),
            "text_bytes": sum(part.text_bytes for part in facts),
            "empty_documents": sum(part.empty for part in facts),
            "skipped": {"count": len(bad), "rows": listed},
            "tokenizer": {"path": self.options.tokenizer, "sha256": self.tokenizer.sha256},
        }

    def _dataset_manifest(self, k: int, name: str, facts: Sequence[PartFacts], outputs: dict) -> dict[str, Any]:
        prefix = self._dataset_prefix(name)
        for suffix in ("bin", "idx"):
            outputs[suffix] = {"path": f"{prefix.name}.{suffix}", **outputs[suffix]}
        return {
            "format": 1,
            "output": prefix.name,
            "split": name,
            "documents": sum(part.documents[k] for part in facts),
            "tokens": sum(part.tokens[k] for part in facts),
            "max_token_id": max(part.max_token for part in facts),
            "vocab_size": self.tokenizer.vocab_size,
            "dtype": self.dtype.name,
            "eod_id": self.eod_id,
            "outputs": outputs,
            "tokenizer": {"path": self.options.tokenizer, "sha256": self.tokenizer.sha256},
        }

    def _dataset_prefix(self, name: str) -> Path:
        return self.prefix if name == "all" else self.prefix.with_name(f"{self.prefix.name}_{name}")

    def _result(self, run: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
        datasets = {
            name: {
                "prefix": str(self._dataset_prefix(name)),
                "documents": manifest["documents"],
                "tokens": manifest["tokens"],
            }
            for name, manifest in manifests.items()
        }
        return {
            "output": str(self.prefix),
            "manifest": str(manifest_path(self.prefix)),
            "datasets": datasets,
            "documents": sum(facts["documents"] for facts in datasets.values()),
            "tokens": sum(facts["tokens"] for facts in datasets.values()),
            "text_bytes": run["text_bytes"],
            "skipped": run["skipped"]["count"],
        }

    def _finished_result(self) -> dict[str, Any] | None:
        """The result of this very command if it has finished before and its files are still there."""
        try:
            run = json.loads(manifest_path(self.prefix).read_text())
            if run["identity"] != _digest(self.identity):
                return None
            manifests = {}
            for name in self.split_names:
                manifests[name] = json.loads(manifest_path(self._dataset_prefix(name)).read_text())
                for suffix, facts in manifests[name]["outputs"].items():
                    if Path(f"{self._dataset_prefix(name)}.{suffix}").stat().st_size != facts["bytes"]:
                        return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if run["skipped"]["count"] and self.options.on_error == "fail":
            return None
        return {**self._result(run, manifests), "seconds": 0.0, "resumed_units": 0, "already_done": True}

    def _replaced(self) -> list[Path]:
        """Existing files of this prefix, the .idx first: to be removed before the new ones get their names.

        Raises:
            JobError: there are some and --overwrite was not given.
        """
        prefixes = [self._dataset_prefix(name) for name in ("all", *SPLIT_NAMES)]
        candidates = [path(prefix) for path in (idx_path, manifest_path, bin_path) for prefix in prefixes]
        existing = [path for path in candidates if path.exists()]
        if existing and not self.options.overwrite:
            raise JobError(
                "output", f"{existing[0]} exists and is not of this command", "give another prefix, or --overwrite true"
            )
        return existing


def _whole_files(facts: Sequence[PartFacts]) -> set[int]:
    """Files whose units are all there: numbers 0 to n without a gap, n marked as the last."""
    found: dict[int, dict[int, bool]] = {}
    for part in facts:
        found.setdefault(part.id[0], {})[part.id[1]] = part.last
    return {file for file, last in found.items() if max(last) == len(last) - 1 and last[len(last) - 1]}


def _prefix(output: str) -> Path:
    path = Path(output).expanduser().absolute()
    if path.is_dir() or output.endswith("/"):
        raise JobError("output", f"{output} is a folder", f"give a prefix in it, such as {output.rstrip('/')}/corpus")
    if path.suffix in (".bin", ".idx"):
        raise JobError("output", f"{output} is the name of one file", f"give the prefix: {output[:-4]}")
    return path


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _as_run_error(error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"the disk is full: {error}", "free space and repeat the command: it goes on where it was")
    return RunError(str(error), "repeat the command: it goes on where it was")
