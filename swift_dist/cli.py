"""`swift-dist <verb> ...`: parsing and calling only. What each verb does lives in the module that its row names."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from swift_dist import __version__
from swift_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_JOB_WRONG, JobError, RunError
from swift_dist.verbs import JOB_VERBS, VERB_ALIASES, VERBS, Verb


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code (0 done, 1 failed, 2 job wrong, 130 interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    debug = "--debug" in words
    words = [w for w in words if w not in ("--json", "--debug")]
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        result = _dispatch(words, as_json)
    except JobError as error:
        return _fail(error, "job", {"key": error.key, "remedy": error.remedy}, EXIT_JOB_WRONG, as_json)
    except RunError as error:
        return _fail(error, "run", {"remedy": error.remedy}, EXIT_FAILED, as_json)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted", "interrupted", {}, EXIT_INTERRUPTED, as_json)
    except BrokenPipeError:  # `swift-dist ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    if result is None:
        return EXIT_DONE
    if as_json:
        try:
            print(json.dumps(result, indent=2, default=_as_json), flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return result.get("exit_code", EXIT_INTERRUPTED if result.get("state") == "interrupted" else EXIT_DONE)


def _fail(error: object, kind: str, fields: dict[str, Any], code: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": {"kind": kind, "message": str(error), **fields}, "exit_code": code}, indent=2))
    print(f"swift-dist: {error}", file=sys.stderr)
    return code


def _dispatch(words: list[str], as_json: bool) -> dict[str, Any] | None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return None
    if words[0] == "--version":
        print(f"swift-dist {__version__}")
        return None
    if words[0] == "schema":
        return _schema(as_json)
    verb, rest = _find_verb(words)
    if any(w in ("-h", "--help") for w in rest):
        print(_help(verb))
        return None
    if verb.name in JOB_VERBS:
        return _train(verb.name, rest, as_json)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's end is an interruption, too
    from swift_dist.config.load import build, parse_words

    module = importlib.import_module(verb.module)
    section = getattr(module, verb.options)
    words_given = parse_words(rest, section, aliases=_aliases(verb), positional=verb.positional)
    options = build(section, [words_given])
    result = getattr(module, verb.function)(options)
    if verb.render and not as_json:
        _print(getattr(module, verb.render)(result))
    return result


def _as_json(value: Any) -> Any:
    """What JSON lacks: an iterator (`runs logs --follow`) becomes the list of all that it gives, the rest its text."""
    return list(value) if isinstance(value, Iterator) else str(value)


def _print(text: str | Iterator[str]) -> None:
    for line in [text] if isinstance(text, str) else text:
        if line:
            print(line, flush=True)


def _find_verb(words: list[str]) -> tuple[Verb, list[str]]:
    from swift_dist.config.keys import did_you_mean

    names = {verb.name: verb for verb in VERBS}
    for length in (2, 1):
        name = " ".join(words[:length])
        name = VERB_ALIASES.get(name, name)
        if name in names:
            return names[name], words[length:]
    family = [name for name in names if name.startswith(words[0] + " ")]
    if family:
        if len(words) == 1 or words[1] in ("-h", "--help"):
            print(_overview(words[0]))
            raise SystemExit(EXIT_DONE if len(words) > 1 else EXIT_JOB_WRONG)
        raise JobError(f"{words[0]} {words[1]}", "unknown verb", "one of: " + ", ".join(family))
    hint = did_you_mean(words[0], [*names, *VERB_ALIASES, "schema"])
    raise JobError(words[0], f"unknown verb. {hint}".strip(), "swift-dist --help lists them")


def _train(task: str, words: list[str], as_json: bool) -> dict[str, Any] | None:
    """`pretrain [job.yaml | recipe] [overrides] [--launcher local] [--dry-run | --render]`."""
    from swift_dist.config.load import load_job

    dry_run, render, launcher, rest = False, False, "local", []
    it = iter(words)
    for word in it:
        if word in ("--dry-run", "--dry_run"):
            dry_run = True
        elif word == "--render":
            render = True
        elif word == "--launcher" or word.startswith("--launcher="):
            launcher = word.partition("=")[2] or next(it, "")
        else:
            rest.append(word)
    path = rest.pop(0) if rest and not rest[0].startswith("--") else None
    job = load_job(_job_file(path), rest, task)
    from swift_dist.plugins import UnknownPlugin, find

    try:
        backend = find("swift_dist.launchers", launcher, "LAUNCHER")
    except UnknownPlugin as error:
        raise JobError("--launcher", str(error), f"--launcher {(error.suggestions or error.known)[0]}") from None
    if backend.where == "elsewhere":
        from swift_dist.job import prepare

        job = prepare(job)
    if dry_run or render:
        from swift_dist.job import describe, render_plan

        plan = describe(job, backend.where)
        plan["artefact"] = backend.render(job)
        if not as_json:
            _print(plan["artefact"].rstrip("\n") if render else render_plan(plan))
        return plan
    result = backend.submit(job).wait()
    if not as_json:
        from swift_dist.job import render_result

        _print(render_result(result))
    return result


def _job_file(path: str | None) -> str | None:
    """A path as it is; else the file of the shipped recipe of that name."""
    if path is None or os.path.exists(path):  # noqa: PTH110 - pathlib is not needed for anything else here
        return path
    from swift_dist.config.keys import did_you_mean
    from swift_dist.recipes import list_recipes, recipe_path

    recipe = recipe_path(path)
    if recipe is None and "/" not in path:
        hint = did_you_mean(path, list_recipes())
        raise JobError(
            path, f"there is no such job file, and no recipe of that name. {hint}".strip(), "swift-dist recipes list"
        )
    return str(recipe or path)


def _schema(as_json: bool) -> dict[str, Any] | None:
    from swift_dist.config import JobConfig

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobConfig.model_json_schema()}
    if not as_json:
        print(json.dumps(schema, indent=2))
        return None
    return schema


def _overview(family: str | None = None) -> str:
    rows = [(v.name, v.help) for v in VERBS if family is None or v.name.startswith(family + " ")]
    if family is None:
        rows.append(("schema", "JSON Schema of a job file (editors complete YAML from it)"))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name.ljust(width)}  {text}" for name, text in rows]
    return "\n".join(
        [
            "usage: swift-dist <verb> [arguments] [--key value ...] [--json] [--debug]",
            "",
            "verbs:",
            *lines,
            "",
            "swift-dist <verb> --help lists every key of a verb with its type and default.",
        ]
    )


def _aliases(verb: Verb) -> dict[str, str]:
    from swift_dist.config.aliases import JOB_ALIASES

    return JOB_ALIASES if verb.name in JOB_VERBS else getattr(importlib.import_module(verb.module), "ALIASES", {})


def _help(verb: Verb) -> str:
    from swift_dist.config.keys import walk

    section = getattr(importlib.import_module(verb.module), verb.options)
    is_job = verb.name in JOB_VERBS
    bare = "[job.yaml | recipe]" if is_job else " ".join(p.upper() for p in verb.positional)
    aliases: dict[str, list[str]] = {}
    for alias, name in _aliases(verb).items():
        aliases.setdefault(name, []).append(alias)
    lines = [f"usage: swift-dist {verb.name} {bare} [--key value ...]".replace("  ", " "), "", verb.help, ""]
    if is_job:
        lines += [
            "  --launcher text (default local)  where the job runs",
            "  --dry-run  print the resolved job, its layout and what would be started; start nothing",
            "  --render  print only what would be started (a batch script, a manifest, a command line); start nothing",
        ]
    lines += ["  --json  make stdout one JSON object", ""]
    for key in walk(section):
        names = ", ".join(["--" + key.name, *("--" + a for a in aliases.get(key.name, ()))])
        lines.append(f"  {names}  {key.type_text} (default {key.default_text})")
        lines.append(f"      {key.description}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
