"""What a user names -> what an engine serves: a Hugging Face folder, and adapters beside it.

Named may be: a Hugging Face folder or hub id, a PEFT adapter, a run folder or its checkpoints, a Megatron checkpoint of
any kind. What is neither a Hugging Face folder nor an adapter is converted once and kept (`made.py`).
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError
from swift_dist.serving.sources.adapters import CHAT_TEMPLATE, brings_template, merged, not_plain_lora, with_template

log = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}")
_STEP = re.compile(r"(?:step|iter)_\d+")
_KNOWN = "a model folder or hub id, an adapter, a run folder, or a checkpoint"

Task = Literal["generate", "embed"]
AskedTask = Literal["auto", "generate", "embed"]


class SourceOptions(Section):
    """Keys that say which model; the verbs that serve have them in common."""

    model: str | None = Field(
        None, description="folder of a model, adapter, run or Megatron checkpoint, or hub id (owner/name@revision)"
    )
    adapters: tuple[str, ...] = Field((), description="PEFT folders or runs of adapters: DIR or name=DIR, several")
    merge_lora: bool = Field(False, description="merge the one adapter into the model's weights (kept in --cache)")
    hf_config: str | None = Field(None, description="config.json of a Megatron checkpoint that does not say it")
    tokenizer: str | None = Field(None, description="tokenizer of a Megatron checkpoint (default: the run's)")
    cache: str | None = Field(
        None, description="folder for converted and merged models (default: .cache/serving beside the source)"
    )


@dataclass(frozen=True)
class Source:
    """What is to be served.

    Attributes:
        name: what requests call what the user named: the model, or the adapter that it was.
        base_name: what they call the model itself; `name` unless an adapter was named.
        path: the model's Hugging Face folder.
        adapters: name -> PEFT folder; `name` is among them where an adapter was named and not merged.
        description: one line for people.
        task: what it is for: as asked, or as its folder says.
    """

    name: str
    base_name: str
    path: str
    adapters: dict[str, str] = field(default_factory=dict)
    description: str = ""
    task: Task = "generate"

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.path, *self.adapters.values())


@dataclass(frozen=True)
class _Found:
    """A Hugging Face folder, or a PEFT adapter's; `said` is what it was made of, in words."""

    folder: Path
    said: str
    base: str | None = None

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).is_file() and not (self.folder / "config.json").is_file()


@dataclass(frozen=True)
class _Rules:
    """What every step of the resolution is told."""

    cache: Path | None
    hf_config: str | None
    tokenizer: str | None
    trust_remote_code: bool


def resolve_options(options: SourceOptions, *, trust_remote_code: bool, task: AskedTask = "auto") -> Source:
    """`resolve_model` of a verb's keys.

    Raises:
        JobError: as it does; no model is given.
    """
    if not options.model:
        raise JobError("model", "is not given", f"--model <{_KNOWN}>")
    return resolve_model(
        options.model,
        adapters=named_adapters(options.adapters),
        merge_lora=options.merge_lora,
        hf_config=options.hf_config,
        tokenizer=options.tokenizer,
        cache=Path(options.cache) if options.cache else None,
        trust_remote_code=trust_remote_code,
        task=task,
    )


def named_adapters(words: Sequence[str]) -> dict[str, str]:
    """``["a=DIR", "runs/b"]`` -> ``{"a": "DIR", "b": "runs/b"}``.

    Raises:
        JobError: a name stands twice or is none.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            name, path = name_of(word), word
        if not ADAPTER_NAME.fullmatch(name):
            raise JobError("adapters", f"{name!r} is no name", "letters, digits and . _ : @ + -: --adapters name=DIR")
        if name in found:
            raise JobError("adapters", f"{name} stands twice", "give each a name: --adapters a=DIR b=DIR")
        found[name] = path
    return found


def name_of(model: str) -> str:
    """What a model is called where nobody says: the last word of its path or hub id; of a part of a run, the run's."""
    path = Path(model).expanduser()
    if path.is_dir():
        path = path.absolute()
        run = next((folder for folder in [path, *path.parents][:3] if (folder / "job.yaml").is_file()), None)
        path = run or (path.parent if _STEP.fullmatch(path.name) else path)
    elif "/" in model:
        path = Path(model.partition("@")[0])  # of a hub id, without its revision
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.name).lstrip("._-") or "model"


def resolve_model(
    model: str,
    *,
    adapters: Mapping[str, str] | None = None,
    merge_lora: bool = False,
    hf_config: str | None = None,
    tokenizer: str | None = None,
    cache: Path | None = None,
    trust_remote_code: bool = False,
    task: AskedTask = "auto",
) -> Source:
    """Find, and where necessary convert, what the user names.

    Args:
        model: see the module.
        adapters: name -> PEFT folder, hub id or run of one.
        merge_lora: give the model that the one adapter makes of its base, instead of both.
        hf_config, tokenizer: of a Megatron checkpoint, where it does not say them itself.
        cache: where conversions are kept; see `made.made_once`.
        trust_remote_code: the model's folder may bring Python files and pickled weights.
        task: what the model must be able to do (auto: embeddings where its folder says so, else text).

    Raises:
        JobError: there is no such thing, it is damaged or not complete, or it cannot do `task`.
        RunError: a checkpoint could not be read, or its conversion could not be written.
    """
    rules = _Rules(cache, hf_config, tokenizer, trust_remote_code)
    named = _find(model, "model", rules)
    name, said = name_of(model), named.said
    found = {key: _find_adapter(path, rules) for key, path in (adapters or {}).items()}
    if named.is_adapter:
        base, base_name = _base(named, rules), name_of(str(named.base))
        base_name = base_name if base_name not in (name, *found) else f"{base_name}-base"
        if name in found:
            raise JobError("adapters", f"{name} is what --model itself is called", "give it another name")
        found = {name: named, **found}
        said = f"{said} on {base.said}"
    else:
        base, base_name = named, name
        if name in found:
            raise JobError("adapters", f"{name} is what the model itself is called", "--adapters OTHER_NAME=DIR")
    task = _check_model(base.folder, rules, task)
    source = Source(name, base_name, str(base.folder.absolute()), {}, said, task)
    return _with_adapters(source, found, merge_lora, named.is_adapter, rules)


def _with_adapters(
    source: Source, found: Mapping[str, _Found], merge_lora: bool, model_is_adapter: bool, rules: _Rules
) -> Source:
    """The source with its adapters beside it, or the one there is merged into it."""
    if merge_lora and len(found) != 1:
        problem = "there is no adapter to merge" if not found else f"{', '.join(found)}: only one can be merged"
        raise JobError("merge_lora", problem, "leave it out" if not found else "name one adapter")
    only_name, only = next(iter(found.items())) if len(found) == 1 else ("", None)
    base = Path(source.path)
    reason = not_plain_lora(only_name, only.folder) if only else None
    if only is not None and (merge_lora or (model_is_adapter and reason)):
        if reason and not merge_lora:
            log.info("%s: it is merged into its model", reason)
        folder = merged(source.name, base, only.folder, rules.cache, trust_remote_code=rules.trust_remote_code)
        return replace(source, base_name=source.name, path=str(folder), description=f"{source.description}, merged")
    for name, adapter in found.items():
        if not brings_template(adapter.folder, base):
            continue
        if model_is_adapter and name == source.name:
            folder = with_template(f"{source.base_name}-for-{name}", base, adapter.folder, rules.cache)
            source = replace(source, path=str(folder))
        else:
            log.warning(
                "%s was trained with a chat template of its own, and is asked with the model's beside which it is "
                "served: name it as --model, or --merge_lora true, or --chat_template %s",
                *(name, adapter.folder / CHAT_TEMPLATE),
            )
    return replace(source, adapters={name: str(adapter.folder.absolute()) for name, adapter in found.items()})


def _find_adapter(path: str, rules: _Rules) -> _Found:
    found = _find(path, "adapters", rules)
    if not found.is_adapter:
        raise JobError("adapters", f"{path} is a model, not an adapter", "name a folder that holds adapter_config.json")
    return found


def _base(adapter: _Found, rules: _Rules) -> _Found:
    """The model that an adapter was trained on."""
    if not adapter.base:
        raise JobError(
            "model", f"{adapter.folder} does not say which model it is for", "--model BASE --adapters name=ADAPTER"
        )
    try:
        base = _find(adapter.base, "model", rules)
    except JobError as error:
        raise JobError(
            "model",
            f"the base of the adapter {adapter.folder} is not here: {error.message}",
            "name both: --model BASE --adapters name=ADAPTER",
        ) from None
    if base.is_adapter:
        raise JobError("model", f"the base of {adapter.folder} is an adapter itself", "merge that one first")
    return base


def _find(named: str, key: str, rules: _Rules) -> _Found:
    """A Hugging Face folder or an adapter's, converted where it was something else."""
    from swift_dist.serving.sources import runs

    path = Path(named).expanduser()
    if path.is_dir():
        if is_hf_folder(path):
            return _as_found(path, str(path), key)
        made: Callable[..., tuple[Path, str]] = runs.of_run if runs.is_run(path) else runs.of_checkpoint
        folder, said = made(path, key, cache=rules.cache, hf_config=rules.hf_config, tokenizer=rules.tokenizer)
        return _as_found(folder, said, key)
    if path.exists():
        raise JobError(key, f"{named} is a file", f"give {_KNOWN}")
    if named.startswith((".", "/", "~")) or named.partition("@")[0].count("/") > 1 or not named:
        raise JobError(key, f"there is no {named or 'such folder'}", _did_you_mean(path))
    from swift_dist.serving.sources.hub import snapshot

    try:
        return _as_found(snapshot(named, key), named, key)
    except JobError as error:
        raise JobError(key, error.message, _did_you_mean(path) if _alike(path) else error.remedy) from None


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is a model or an adapter as it stands."""
    if (path / ADAPTER_CONFIG).is_file():
        return next(path.glob("adapter_model.*"), None) is not None or not (path / ".metadata").is_file()
    has_megatron = (path / ".metadata").is_file() or next(path.glob("mp_rank_*"), None) is not None
    return (path / "config.json").is_file() and not has_megatron


def _as_found(folder: Path, said: str, key: str) -> _Found:
    """Raises JobError for an adapter that is not whole."""
    found = _Found(folder, said)
    if not found.is_adapter:
        return found
    config = _read_object(folder / ADAPTER_CONFIG, key)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        other = (folder / "adapter_model.bin").is_file()
        problem = "only holds adapter_model.bin, a pickle" if other else "holds no adapter_model.safetensors"
        raise JobError(key, f"{folder} {problem}", "save it with safetensors" if other else "copy the whole folder")
    from swift_dist.converters.safetensors_io import read_safetensors

    try:
        read_safetensors(weights)
    except (OSError, ValueError) as error:
        raise JobError(key, f"{weights} is not a whole weight file: {error}", "copy it again") from None
    base = config.get("base_model_name_or_path")
    return replace(found, base=str(base) if base else None)


def _check_model(folder: Path, rules: _Rules, asked: AskedTask) -> Task:
    """Its task. Raises JobError where an engine would fail late, or answer from weights that are not there."""
    config = _read_object(folder / "config.json", "model")
    if config.get("auto_map") and not rules.trust_remote_code:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if config.get("model_type") not in CONFIG_MAPPING_NAMES:
            raise JobError(
                "trust_remote_code",
                f"{folder} brings Python code of its own (auto_map), which is not run unless allowed",
                "--trust_remote_code true, if you trust its author",
            )
    task = _task(folder, config) if asked == "auto" else asked
    architectures = [str(name) for name in config.get("architectures") or ()]
    scoring = [name for name in architectures if re.search(r"For\w*(Classification|Reward\w*|MaskedLM)$", name)]
    if task == "generate" and scoring:
        does = "fills gaps in text" if scoring[0].endswith("MaskedLM") else "scores text"
        remedy = "name a model that generates; --task embed serves its vectors"
        raise JobError("model", f"{folder} is a {scoring[0]}: it {does} and generates none", remedy)
    if not config.get("quantization_config"):
        from swift_dist.converters.safetensors_io import HFFolder

        weights = HFFolder(folder, "model")
        if not rules.trust_remote_code and any(file.endswith(".bin") for file in weights.files):
            raise JobError(
                "model",
                f"{folder} holds pickled weights ({weights.files[0]}), which can run code",
                "convert them to safetensors, or --trust_remote_code true",
            )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES) and not next(folder.glob("*.tiktoken"), None):
        raise JobError(
            "tokenizer", f"{folder} holds no tokenizer", "copy tokenizer.json and tokenizer_config.json there"
        )
    return task


def _task(folder: Path, config: Mapping[str, Any]) -> Task:
    """What a model is for, by its folder: embeddings only where that is certain.

    So it is where sentence-transformers wrote how a text's vector is made of hidden states (a Pooling in modules.json),
    and where the weights are of a model of transformers without a head (``Qwen3Model`` of type ``qwen3``).
    """
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        if any(str(module.get("type", "")).rsplit(".", 1)[-1] == "Pooling" for module in modules):
            return "embed"
    except (OSError, ValueError, AttributeError, TypeError):  # none, or none of sentence-transformers'
        pass
    bare = re.sub(r"[^a-z0-9]", "", str(config.get("model_type", "")).lower()) + "model"
    names = [str(name).lower() for name in config.get("architectures") or ()]
    return "embed" if names == [bare] and not config.get("auto_map") else "generate"


def _read_object(file: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(key, f"{file} cannot be read: {error}", "restore the file") from None
    if not isinstance(content, dict):
        raise JobError(key, f"{file} does not hold a JSON object", "restore the file")
    return content


def _did_you_mean(path: Path) -> str:
    near = _alike(path)
    return f"did you mean {' or '.join(near)}?" if near else f"give {_KNOWN}"


def _alike(path: Path) -> list[str]:
    """Folders beside the path, and runs in ./runs, whose names are like its own."""
    places = [path.parent, Path("runs")]
    folders = {child.name: child for place in places if place.is_dir() for child in place.iterdir() if child.is_dir()}
    return [str(folders[name]) for name in difflib.get_close_matches(path.name, folders, n=2, cutoff=0.7)]
