"""From files and command-line words to a validated section: YAML + overrides + aliases, one clear message on error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from swift_dist.config.aliases import JOB_ALIASES, JOB_ELSEWHERE
from swift_dist.config.applies import require_chosen_words
from swift_dist.config.job import JobConfig
from swift_dist.config.keys import Key, did_you_mean, walk
from swift_dist.config.section import Section
from swift_dist.errors import JobError

S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``1e-4`` is a number (YAML 1.2), and a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML text.

    Raises:
        JobError: if it is not YAML; names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise JobError(name, f"is not valid YAML: {problem}{where}", "correct the file at that line") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a job file.

    Raises:
        JobError: if it is missing, unreadable, or not a YAML mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise JobError(str(path), f"cannot be read: {reason}", "check the path of the job file") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise JobError(
            str(path),
            f"must hold a mapping of keys, not a {type(values).__name__}",
            "write it as `key: value` lines; swift-dist recipes show NAME prints an example",
        )
    return values


def _flatten(values: Mapping[str, Any], keys: Mapping[str, Key], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted leaves, stopping at known keys (whose value may itself be a mapping)."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and dotted not in keys:
            inner = _flatten(value, keys, dotted + ".")
            flat.update(inner or {dotted: value})
        else:
            flat[dotted] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        *parents, leaf = dotted.split(".")
        target = nested
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return nested


def build(section: type[S], layers: Iterable[Mapping[str, Any]], aliases: Mapping[str, str] | None = None) -> S:
    """Validate the union of `layers` (dotted or nested, later ones win) as `section`.

    Raises:
        JobError: for unknown keys (with a did-you-mean) and values that are not allowed; all in one message.
    """
    aliases = aliases or {}
    keys = {key.name: key for key in walk(section)}
    sections = {name.rsplit(".", i)[0] for name in keys for i in range(1, name.count(".") + 1)}
    merged: dict[str, Any] = {}
    for layer in layers:
        given: dict[str, str] = {}
        for spelled, value in _flatten(layer, keys).items():
            name = aliases.get(spelled, spelled)
            if name in given:
                raise JobError(name, f"is set twice, as {given[name]} and as {spelled}", "keep one of them")
            given[name] = spelled
            if name in sections and value in (None, {}):
                continue  # an empty section, as in "train:" with nothing below it
            if name in sections:
                raise JobError(
                    name, f"is a section, not a value (got {value!r})", f"set its keys: {_keys_of(name, keys)}"
                )
            if name not in keys:
                hint = did_you_mean(name, keys, aliases)
                raise JobError(name, f"unknown key. {hint}".strip(), "see --help for every key")
            merged[name] = value
    try:
        return section.model_validate(_nest(merged))
    except ValidationError as error:
        raise _as_job_error(error, keys) from None


def _keys_of(section: str, keys: Iterable[str]) -> str:
    return ", ".join(k for k in keys if k.startswith(section + "."))


def _as_job_error(error: ValidationError, keys: Mapping[str, Key]) -> JobError:
    problems = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        # A bad entry of a list is reported at "data.train.0.weight": find the key that holds it.
        key = next(
            (keys[name.rsplit(".", i)[0]] for i in range(name.count(".") + 1) if name.rsplit(".", i)[0] in keys), None
        )
        if item["type"] == "missing" and name in keys:
            remedy = f"--{name} <{keys[name].type_text}>: {keys[name].description}"
            problems.append((name, "is not given", remedy))
            continue
        message = re.sub(r"^Value error, ", "", item["msg"])
        value = "" if item["type"] in ("missing", "value_error") else f", got {item['input']!r}"
        problems.append(
            (name or "job", f"{message}{value}", f"allowed: {key.type_text}" if key else "see --help for its keys")
        )
    if len(problems) == 1:
        return JobError(*problems[0])
    rest = "".join(f"\n{name}: {message}" for name, message, _ in problems[1:])
    return JobError(problems[0][0], problems[0][1] + rest, problems[0][2])


def parse_words(
    words: Sequence[str],
    section: type[Section],
    *,
    aliases: Mapping[str, str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
    positional: Sequence[str] = (),
) -> dict[str, Any]:
    """Command-line words to dotted values: ``--a.b value``, ``--a.b=value``, ``--flag``, ``--list x y z``.

    `positional` names the keys that bare words fill in order; a name ending in ``...`` takes all that are left.
    `elsewhere` says of options that are none what takes their place. Dashes inside names count as underscores
    (``--micro-batch-size``).

    Raises:
        JobError: for an unknown option (with a did-you-mean), a missing value, or a bare word too many.
    """
    aliases = aliases or {}
    keys = {key.name: key for key in walk(section)}
    values: dict[str, Any] = {}
    bare: list[str] = []
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("--") or word == "--":
            bare.append(word)
            continue
        text, has_value, inline = word[2:].partition("=")
        name = aliases.get(text.replace("-", "_"), text.replace("-", "_"))
        # model.config.hidden_size 128 is a key inside a free-form mapping
        if name not in keys and not any(name.startswith(k + ".") for k, held in keys.items() if held.is_mapping):
            instead = (elsewhere or {}).get(name)
            hint = f"instead: {instead}" if instead else did_you_mean(name, keys, aliases, words)
            raise JobError(f"--{text}", f"unknown option. {hint}".strip(), "see --help for every key")
        found: list[str] = [inline] if has_value else []
        key = keys.get(name)
        while not has_value and i < len(words) and not _is_option(words[i]):
            if found and not (key and key.is_list):
                break
            if key and key.is_bool and words[i].lower() not in ("true", "false", "none", "null"):
                break
            found.append(words[i])
            i += 1
        values[name] = _value(name, key, found)
    _place_bare(bare, positional, keys, values)
    return _merge_free_form(values, keys)


def _is_option(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _value(name: str, key: Key | None, found: list[str]) -> Any:
    if not found:
        if key is not None and key.is_bool:
            return True
        raise JobError(f"--{name}", "needs a value", f"--{name} <{key.type_text if key else 'value'}>")
    parsed = [_scalar(word, key, name) for word in found]
    if key is not None and key.is_list:
        if len(parsed) == 1 and (isinstance(parsed[0], list) or parsed[0] is None):
            return parsed[0] or ()
        return parsed
    return parsed[0]


def _scalar(word: str, key: Key | None, name: str) -> Any:
    if key is not None and word in key.choices:
        return word
    if key is not None and key.is_text and not word.startswith(("[", "{")):
        return None if word.lower() in ("none", "null") else word
    if word.lower() == "none":
        return None
    return parse_yaml(word, f"--{name}")


def _place_bare(bare: list[str], positional: Sequence[str], keys: Mapping[str, Key], values: dict[str, Any]) -> None:
    for slot in positional:
        if slot.endswith("..."):
            if bare:
                values[slot[:-3]] = list(bare)
                bare = []
        elif bare:
            values[slot] = bare.pop(0)
    if bare:
        raise JobError(bare[0], "unexpected argument", "options start with --; see --help")


def _merge_free_form(values: dict[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name, value in values.items():
        parent = None if name in keys else next((k for k in keys if name.startswith(k + ".")), None)
        if parent is None:
            merged[name] = value
        else:
            target = merged.setdefault(parent, {})
            *parents, leaf = name[len(parent) + 1 :].split(".")
            for part in parents:
                target = target.setdefault(part, {})
            target[leaf] = value
    return merged


def load_job(path: str | Path | None, words: Sequence[str] = (), task: str | None = "pretrain") -> JobConfig:
    """A job from a YAML file (or none) and command-line overrides.

    Args:
        path: of the file.
        words: overrides.
        task: what the verb says; None: what the file says.

    Raises:
        JobError: for anything that is wrong in either.
    """
    layers: list[dict[str, Any]] = [read_yaml(path)] if path else []
    overrides = parse_words(words, JobConfig, aliases=JOB_ALIASES, elsewhere=JOB_ELSEWHERE)
    free_form = overrides.get("model.config")
    if free_form and layers and isinstance(layers[0].get("model"), dict):
        # --model.config.x overrides one entry of the file's geometry, not all of it
        overrides["model.config"] = {**(layers[0]["model"].get("config") or {}), **free_form}
    if task not in (None, "pretrain"):
        layers.insert(0, {"task": task})  # what the verb says; a file may say it, too
    job = build(JobConfig, [*layers, overrides], JOB_ALIASES)
    require_chosen_words(job, overrides)
    if task is not None and job.task != task:
        raise JobError("task", f"the job says {job.task!r} but the verb is {task!r}", f"swift-dist {job.task} ...")
    return job


def dump_job(job: JobConfig) -> str:
    """The resolved job as YAML, runnable again as it is."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
