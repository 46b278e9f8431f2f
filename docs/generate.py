"""Rewrites the generated parts of the pages from the code's own descriptions. `--check` only compares.

.venv/bin/python docs/generate.py
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

from swift_dist.cli import VERBS
from swift_dist.cluster import environment
from swift_dist.cluster.environment import DROPPED, PASSED, RESERVED, NodeFacts
from swift_dist.config import JobConfig, Section
from swift_dist.config.aliases import JOB_ALIASES
from swift_dist.config.job import ClusterSection
from swift_dist.config.keys import walk
from swift_dist.data.rows._formats import formats
from swift_dist.data.rows.catalogue import CATALOGUE
from swift_dist.doctor.wanted import port_bands
from swift_dist.plugins import find, names

HERE = Path(__file__).parent


def table(section: type[Section], aliases: dict[str, str] | None = None) -> str:
    """A Markdown table of a section's keys."""
    spellings: dict[str, list[str]] = {}
    for alias, name in (aliases or {}).items():
        spellings.setdefault(name, []).append(f"`--{alias}`")
    head = ["key", "type", "default", *(["also"] if aliases else []), "meaning"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key in walk(section):
        cells = [f"`{key.name}`", key.type_text, f"`{key.default_text}`"]
        if aliases:
            cells.append(" ".join(spellings.get(key.name, ())))
        cells.append(key.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def cli_parts() -> dict[str, str]:
    """Of cli.md: verbs, and the keys of each."""
    verbs = ["| verb | does |", "|---|---|"]
    verbs += [f"| `{verb.name}` | {verb.help} |" for verb in VERBS]
    options = []
    for verb in VERBS:
        if verb.name == "pretrain":
            continue
        module = importlib.import_module(verb.module)
        section = getattr(module, verb.options)
        if not section.model_fields:
            continue
        bare = " ".join(name.upper() for name in verb.positional)
        options += [
            f"### swift-dist {verb.name} {bare}".rstrip(),
            "",
            table(section, getattr(module, "ALIASES", None)),
            "",
        ]
    return {"verbs": "\n".join(verbs), "job": table(JobConfig, JOB_ALIASES), "options": "\n".join(options).rstrip()}


def environment_parts() -> dict[str, str]:
    """Of environment.md: who wins, and what is passed, set and dropped."""
    assert environment.__doc__
    order = "\n".join(line for line in environment.__doc__.splitlines() if re.match(r"\d\. ", line))

    def rules(has_gpu: bool) -> dict[str, str]:
        return environment.environment({}, ClusterSection(), NodeFacts(8, 64, "eth0", has_gpu))

    on_cpu, on_gpu = rules(False), rules(True)
    rows = ["| variable | of a rank on the CPU | of a rank on a GPU |", "|---|---|---|"]
    for name in sorted({*on_cpu, *on_gpu}):
        shown = ["" if v is None else f"`{v}`" if v else "empty" for v in (on_cpu.get(name), on_gpu.get(name))]
        rows.append(f"| `{name}` | {shown[0]} | {shown[1]} |")

    def listed(patterns: tuple[str, ...]) -> str:
        return " ".join(f"`{pattern}`" for pattern in patterns)

    lists = ["| what happens to them | variables |", "|---|---|"]
    own = tuple(name for name in RESERVED if name not in DROPPED)
    lists.append(f"| passed: copied from where the job is started | {listed(PASSED)} |")
    lists.append(f"| dropped: never reach a rank | {listed(DROPPED)} |")
    lists.append(f"| the gang's own: `cluster.env` may set neither them nor the dropped ones | {listed(own)} |")
    return {"order": order, "rules": "\n".join(rows), "lists": "\n".join(lists), "ports": ports()}


def ports() -> str:
    """A table of what each launcher's file says about its ports."""
    bands = port_bands(JobConfig())
    rows = ["| launcher | band | which |", "|---|---|---|"]
    for name in names("swift_dist.launchers"):
        text = importlib.import_module(f"swift_dist.launchers.{name}").__doc__ or ""
        (said,) = (part for part in text.split("\n\n") if part.startswith("Ports: "))
        band = "-".join(map(str, bands[name])) if name in bands else ""
        rows.append(f"| `{name}` | {band} | {' '.join(said.removeprefix('Ports: ').split())} |")
    return "\n".join(rows)


def doctor_parts() -> dict[str, str]:
    """Of doctor.md: its checks, by the first paragraph of each file."""
    room = "swift_dist.doctor.checks"
    rows = ["| check | before every job | looks at |", "|---|---|---|"]
    for name in names(room):
        text = importlib.import_module(f"{room}.{name}").__doc__ or ""
        first = " ".join(text.split("\n\n")[0].split()).rstrip(".")
        rows.append(f"| `{name}` | {'yes' if find(room, name, 'CHECK').short else ''} | {first} |")
    return {"checks": "\n".join(rows)}


def rows_parts() -> dict[str, str]:
    """Of rows.md: the formats with their examples, and the catalogue."""
    shapes = ["| `data.format` | rows | example |", "|---|---|---|"]
    for known in formats():
        example = json.dumps(known.example, ensure_ascii=False)
        shapes.append(f"| `{known.name}` | {known.summary} | `{example}` |")
    sets = [
        "| name | format | Hugging Face | ModelScope | subset | splits | columns |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in CATALOGUE:
        splits = ", ".join(filter(None, (entry.split, entry.validation)))
        renamed = ", ".join(f"{ours}: {theirs}" for ours, theirs in entry.columns.items() if ours != theirs)
        cells = (f"`{entry.name}`", entry.format, entry.hf, entry.ms, entry.subset, splits, renamed)
        sets.append("| " + " | ".join(cell or "" for cell in cells) + " |")
    return {"formats": "\n".join(shapes), "catalogue": "\n".join(sets)}


PAGES = {"rows.md": rows_parts, "cli.md": cli_parts, "environment.md": environment_parts, "doctor.md": doctor_parts}


def rewritten(page: str, name: str, parts: dict[str, str]) -> str:
    """The page with every generated part replaced."""
    for part, text in parts.items():
        pattern = re.compile(rf"(<!-- generated: {part} -->)\n.*?(<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page)
        assert count == 1, f"docs/{name} has {count} parts called {part}"
    return page


def main() -> int:
    stale = []
    for name, parts in PAGES.items():
        path = HERE / name
        old = path.read_text(encoding="utf-8")
        new = rewritten(old, name, parts())
        if new != old:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"stale: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
