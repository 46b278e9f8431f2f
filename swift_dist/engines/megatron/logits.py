"""Logits of a transformers model against those of a Megatron checkpoint, as megatron-core loads it at several layouts.

    python -m swift_dist.engines.megatron.logits REQUEST.json

The request: ``hf``, a folder with config.json and safetensors; ``checkpoint``, a torch_dist folder with weights under
per-layer keys, or null: then the weights come from ``hf`` as in a training run. Optional: ``prompts``, lists of token
ids; ``layouts``, each any of ``tp pp ep etp vpp`` (vpp: chunks of a pipeline stage); ``timeout``, seconds for the
reference and for each layout; ``cast``, a torch dtype to which both sides' weights are rounded first.

One JSON object on stdout: ``scale``, the largest reference logit in magnitude; ``prompts``, their lengths;
``layouts``, for each its degrees, ``max_difference``, ``relative`` (to the scale), ``same_argmax`` and ``error``: null,
or why there are no numbers. Everything else goes to stderr. The exit code is 0 if at least one layout was compared, 2
for a wrong request, 1 otherwise. Both sides compute in fp32, on the CPU, every position and every vocabulary entry.

This process computes nothing: it imports, forks, and waits (see forked.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import signal
import socket
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from swift_dist.config import JobConfig, ModelSection
from swift_dist.engines.megatron.forked import Processes
from swift_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_JOB_WRONG, JobError, RunError
from swift_dist.models import find_family, read_hf_config
from swift_dist.parallel import ModelShape, ParallelLayout, check_layout

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DEFAULT_LENGTHS = (1, 7, 16, 33)
DEFAULT_TIMEOUT = 1800.0
_SEED = 20
_KEYS = ("hf", "checkpoint", "prompts", "layouts", "timeout", "cast")
_CASTS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Degrees:
    """A layout as a request states it. `etp` None: as `tp`; of a dense model 1 means the same."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int | None = None

    def job(self, request: Request) -> JobConfig:
        """The job of this layout; raises ValueError where a degree is no possible number."""
        longest = max(len(prompt) for prompt in request.prompts)
        count = len(request.prompts)
        etp = self.etp if request.shape.is_moe or self.etp not in (1, self.tp) else None
        return JobConfig.model_validate(
            {
                "model": {"path": str(request.hf)},
                # Padded for sequence parallelism, and to as many micro-batches as the interleaved schedule wants.
                "data": {"sequence_length": math.ceil(longest / self.tp) * self.tp},
                "train": {
                    "steps": 1,
                    "precision": "fp32",
                    "micro_batch_size": 1,
                    "global_batch_size": math.ceil(count / self.pp) * self.pp if self.vpp else count,
                },
                "parallel": {
                    "tensor_model_parallel_size": self.tp,
                    "pipeline_model_parallel_size": self.pp,
                    "virtual_pipeline_model_parallel_size": self.vpp,
                    "expert_model_parallel_size": self.ep,
                    "expert_tensor_parallel_size": etp,
                },
            }
        )

    def layout(self, request: Request) -> tuple[ParallelLayout, JobConfig]:
        """On the fewest ranks. Data-parallel ranks, which expert parallelism brings, all see every prompt.

        Raises:
            JobError: the model cannot be split so.
        """
        if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in self._stated()):
            raise JobError("layouts", f"degrees are whole numbers of at least 1, got {self._stated()}", "correct it")
        experts = self.ep * (self.etp or self.tp) if request.shape.is_moe else self.tp * self.ep
        world_size = self.pp * math.lcm(self.tp, experts)
        try:
            job = self.job(request)
        except ValueError as error:
            raise JobError("layouts", str(error), "give another layout") from None
        layout = ParallelLayout.resolve(job.parallel, world_size, request.shape.is_moe)
        broken = check_layout(
            layout,
            request.shape,
            sequence_length=job.data.sequence_length,
            micro_batch_size=1,
            global_batch_size=job.train.global_batch_size * layout.dp,
        )
        if broken:
            raise JobError("layouts", "; ".join(violation.message for violation in broken), "give another layout")
        return layout, job

    def _stated(self) -> list[Any]:
        return [value for value in asdict(self).values() if value is not None]

    def __str__(self) -> str:
        return " ".join(f"{name} {value}" for name, value in asdict(self).items() if value not in (None, 1)) or "tp 1"


@dataclass(frozen=True)
class Request:
    """What is to be compared; see the module."""

    hf: Path
    hf_config: dict[str, Any]
    shape: ModelShape
    checkpoint: Path | None
    prompts: list[list[int]]
    layouts: list[Degrees]
    timeout: float
    cast: str | None = None

    @classmethod
    def of(cls, stated: dict[str, Any]) -> Request:
        """From the JSON object. Raises JobError, naming the key at fault."""
        unknown = sorted(stated.keys() - set(_KEYS))
        if unknown:
            raise JobError(unknown[0], "is not understood", f"known: {', '.join(_KEYS)}")
        if not isinstance(stated.get("hf"), str):
            raise JobError("hf", "is no folder", "give the folder of a transformers model")
        hf = Path(stated["hf"]).resolve()
        if not (hf / "config.json").is_file():
            raise JobError("hf", f"{hf} holds no config.json", "give the folder of a transformers model")
        hf_config = read_hf_config(ModelSection(path=str(hf)))  # type: ignore[call-arg]
        shape = find_family(hf_config).shape(hf_config)
        for key, kind in (("checkpoint", str), ("prompts", list), ("layouts", list), ("timeout", (int, float))):
            if stated.get(key) is not None and not isinstance(stated[key], kind):
                raise JobError(key, f"cannot be {stated[key]!r}", "see the module's description")
        checkpoint = Path(stated["checkpoint"]).resolve() if stated.get("checkpoint") else None
        if checkpoint is not None and not (checkpoint / ".metadata").is_file():
            problem = f"{checkpoint} is no torch_dist checkpoint: it holds no .metadata"
            raise JobError("checkpoint", problem, "give one, or null")
        prompts = stated.get("prompts") or default_prompts(shape)
        _check_prompts(prompts, shape)
        timeout = DEFAULT_TIMEOUT if stated.get("timeout") is None else stated["timeout"]
        if timeout <= 0:
            raise JobError("timeout", f"must be a positive number of seconds, got {timeout!r}", "correct it")
        if stated.get("cast") not in (None, *_CASTS):
            raise JobError("cast", f"cannot be {stated['cast']!r}", f"one of {', '.join(_CASTS)}")
        request = cls(hf, hf_config, shape, checkpoint, prompts, [], float(timeout), stated.get("cast"))
        if stated.get("layouts"):
            request.layouts.extend(_degrees(layout) for layout in stated["layouts"])
        else:
            request.layouts.extend(default_layouts(request))
        return request


def _degrees(stated: Any) -> Degrees:
    known = [field.name for field in fields(Degrees)]
    if not isinstance(stated, dict) or stated.keys() - set(known):
        raise JobError("layouts", f"{stated!r} is not understood", f"known degrees: {', '.join(known)}")
    return Degrees(**stated)


def _check_prompts(prompts: Any, shape: ModelShape) -> None:
    limit = shape.max_position_embeddings or math.inf
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, list):
            raise JobError(f"prompts[{number}]", f"{prompt!r} is no list of token ids", "correct it")
        if not prompt or len(prompt) > limit:
            problem = f"has {len(prompt)} tokens; the model takes 1 to {limit}"
            raise JobError(f"prompts[{number}]", problem, "give a shorter one")
        wrong = [token for token in prompt if not isinstance(token, int) or not 0 <= token < shape.vocab_size]
        if wrong:
            raise JobError(f"prompts[{number}]", f"{wrong[0]!r} is no token id of {shape.vocab_size}", "correct it")


def default_prompts(shape: ModelShape) -> list[list[int]]:
    """Random tokens, the same at every call; no longer than the model allows."""
    draw = random.Random(_SEED)
    limit = shape.max_position_embeddings or max(DEFAULT_LENGTHS)
    return [[draw.randrange(shape.vocab_size) for _ in range(min(length, limit))] for length in DEFAULT_LENGTHS]


def default_layouts(request: Request) -> list[Degrees]:
    """One rank, and the first split that the model permits: of experts, else of matrices, else of layers."""
    found = [Degrees()]
    for split in (*([Degrees(ep=2)] if request.shape.is_moe else []), Degrees(tp=2), Degrees(pp=2)):
        with contextlib.suppress(JobError):
            split.layout(request)
            return [*found, split]
    return found


def compare(request: Request) -> dict[str, Any]:
    """The answer; see the module. For a process that has computed nothing with torch (see forked.py).

    Raises:
        RunError: there is no reference to compare with.
    """
    import torch  # noqa: F401  # for all processes that are forked from here

    # The ranks meet on this machine only; and a GPU, if there is one, would be used by some parts and not by others.
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="swift-dist-logits-") as base:
        reference = Path(base) / "reference.pt"
        arguments = {"hf": request.hf, "prompts": request.prompts, "target": reference, "cast": request.cast}
        with Processes([(_reference, arguments)], Path(base) / "reference", request.timeout) as transformers:
            _import_megatron()  # in the meantime
            scale = transformers.answers("transformers' model")[0]
        layouts = []
        for number, degrees in enumerate(request.layouts):
            begun = time.monotonic()
            result = _layout(request, degrees, reference, Path(base) / str(number))
            if result["max_difference"] is not None:
                result["relative"] = result["max_difference"] / scale
            layouts.append({**asdict(degrees), "etp": degrees.etp or degrees.tp, **result})
            log.info("%s: %s (%.1f s)", degrees, result["error"] or result["relative"], time.monotonic() - begun)
    return {"scale": scale, "prompts": [len(prompt) for prompt in request.prompts], "layouts": layouts}


def _import_megatron() -> None:
    from swift_dist.engines.megatron import cpu_shim

    cpu_shim.apply()
    from swift_dist.engines.megatron import logits_rank  # noqa: F401


def _layout(request: Request, degrees: Degrees, reference: Path, folder: Path) -> dict[str, Any]:
    from swift_dist.engines.megatron import logits_rank

    result: dict[str, Any] = {"max_difference": None, "relative": None, "same_argmax": None, "error": None}
    try:
        layout, job = degrees.layout(request)
        common = {
            "job": job,
            "layout": layout,
            "hf_config": request.hf_config,
            "checkpoint": request.checkpoint,
            "prompts": request.prompts,
            "reference": reference,
            "rounded": request.cast,
            "timeout": request.timeout,
        }
        places = [logits_rank.Place(rank, layout.world_size, folder) for rank in range(layout.world_size)]
        calls = [(logits_rank.compare, {"place": place, **common}) for place in places]
        with Processes(calls, folder, request.timeout) as ranks:
            found = [answer for answer in ranks.answers(f"layout {degrees}") if answer is not None]
    except (JobError, RunError) as error:
        return {**result, "error": str(error)}
    worst = max(answer["max_difference"] for answer in found)
    return {**result, "max_difference": worst, "same_argmax": all(answer["same_argmax"] for answer in found)}


def _reference(hf: Path, prompts: list[list[int]], target: Path, cast: str | None) -> float:
    """Save transformers' logits of each prompt, [length, vocabulary] in fp32; returns the largest magnitude."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        hf,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    found, info = loaded
    absent = sorted(str(name) for name in (*info["missing_keys"], *info["mismatched_keys"]))
    if absent:  # transformers only warns, and draws them at random
        raise RunError(f"{hf} lacks weights of its model, or has them in another shape: {', '.join(absent[:5])}")
    found.eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(parameter.to(getattr(torch, cast or "float32")))  # and back: the numbers are rounded
        logits: list[torch.Tensor] = [found(torch.tensor([prompt])).logits[0].float() for prompt in prompts]
    for number, each in enumerate(logits):  # one by one: max() of floats passes over a NaN
        if not bool(torch.isfinite(each).all()):
            raise RunError(f"transformers' logits of {hf} are no reference: those of prompts[{number}] are not finite")
    scale = max(float(each.abs().max()) for each in logits)
    if not scale > 0:
        raise RunError(f"transformers' logits of {hf} are no reference: all are zero")
    torch.save(logits, target)
    return scale


@contextlib.contextmanager
def _stdout_for_the_answer() -> Any:
    """The real stdout; meanwhile whatever prints, here or in a child, prints to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    stream: IO[str]
    with os.fdopen(kept, "w") as stream:
        yield stream


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # through the `with` blocks: no process, no folder is left


def _read(arguments: list[str]) -> dict[str, Any]:
    if len(arguments) != 1:
        raise JobError("REQUEST.json", "is not given", "python -m swift_dist.engines.megatron.logits REQUEST.json")
    try:
        stated = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(arguments[0], f"cannot be read: {error}", "give a JSON file") from None
    if not isinstance(stated, dict):
        raise JobError(arguments[0], "does not hold a JSON object", "see the module's description")
    return stated


def main(arguments: list[str]) -> int:
    """The command; see the module. Returns the exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.simplefilter("ignore")  # megatron-core's and torch's, in every rank, of what only they can change
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with _stdout_for_the_answer() as stream:
        try:
            answer = compare(Request.of(_read(arguments)))
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except (JobError, RunError) as wrong:
            print(wrong, file=sys.stderr)
            return EXIT_JOB_WRONG if isinstance(wrong, JobError) else EXIT_FAILED
        print(json.dumps(answer), file=stream)
    errors = [layout["error"] for layout in answer["layouts"] if layout["error"]]
    for text in errors:
        print(text, file=sys.stderr)
    return EXIT_FAILED if len(errors) == len(answer["layouts"]) else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
