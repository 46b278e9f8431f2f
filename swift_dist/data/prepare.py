"""`swift-dist data prepare`: text to tokenised datasets in Megatron's format. Options and entry; light to import."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from swift_dist.data.sources import ReadOptions
from swift_dist.errors import JobError

SPLIT_NAMES = ("train", "validation", "test")


class PrepareOptions(ReadOptions):
    tokenizer: str = Field(description="tokenizer folder, tokenizer.json or hub id")
    output: str = Field(description="prefix of the files to write: PREFIX.bin, PREFIX.idx, PREFIX.manifest.json")
    workers: int | None = Field(None, gt=0, description="processes (default: one for each CPU that may be used)")
    append_eod: bool = Field(False, description="end every document with the tokenizer's eos token")
    eod_token: str | None = Field(None, description="the token that append_eod adds, instead of the tokenizer's own")
    add_special_tokens: bool = Field(True, description="add what the tokenizer's own template adds, such as BOS")
    split: tuple[float, ...] | None = Field(
        None,
        description="shares of PREFIX_train, PREFIX_validation and PREFIX_test, e.g. 0.99,0.01 (documents at random)",
    )
    shuffle: bool = Field(False, description="put the documents in a random order")
    seed: int = Field(1234, ge=0, description="of shuffle and split")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="what a corrupt row does: stop, or be left out and counted"
    )
    overwrite: bool = Field(False, description="replace existing output, discard an interrupted run of another command")
    launcher: Literal["local", "ray"] = Field("local", description="processes of this machine, or a Ray cluster")
    ray_address: str | None = Field(
        None, description="running cluster of --launcher ray (default: RAY_ADDRESS, or this machine's)"
    )

    @field_validator("split", mode="before")
    @classmethod
    def _shares(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = value.split(",")
        if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
            value = value[0].split(",")
        return value

    @field_validator("split")
    @classmethod
    def _normalised(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        if not 2 <= len(value) <= len(SPLIT_NAMES) or min(value) <= 0:
            raise ValueError("give two or three positive shares: train,validation or train,validation,test")
        return tuple(share / sum(value) for share in value)


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Tokenise the input. Goes on where an interrupted run of the same command was; a finished one is not repeated.

    The documents keep the order of the input (files in the order given, those of a folder by path) unless shuffled.
    The .bin and .idx are byte for byte what megatron.core's IndexedDatasetBuilder writes for the same documents, one
    sequence each, whatever the number of workers. A document without tokens stays, with length 0.

    Returns:
        output (the prefix), manifest (its path), datasets (name -> prefix, documents, tokens), documents, tokens,
        text_bytes, skipped (rows left out), seconds, resumed_units, already_done.

    Raises:
        JobError: the input, the tokenizer or the output cannot be used; nothing was written.
        RunError: a row is corrupt (``file:line``), the disk is full, a worker died. The same command goes on.
    """
    if options.ray_address is not None and options.launcher != "ray":
        raise JobError(
            "ray_address", f"is not read with launcher {options.launcher}", "add --launcher ray, or leave it out"
        )
    from swift_dist.data.preparation import Preparation

    return Preparation(options).run()


def render(result: dict[str, Any]) -> str:
    lines = []
    for facts in result["datasets"].values():
        lines.append(f"{facts['prefix']}: {facts['documents']:,} documents, {facts['tokens']:,} tokens")
    if result["skipped"]:
        lines.append(f"{result['skipped']:,} corrupt rows were left out: see {result['manifest']}")
    if result["already_done"]:
        lines.append("nothing to do: this command had finished before")
    else:
        rate = result["text_bytes"] / max(result["seconds"], 1e-9) / 1e6
        lines.append(f"{result['text_bytes'] / 1e6:.1f} MB of text in {result['seconds']:.1f} s ({rate:.1f} MB/s)")
    return "\n".join(lines)
