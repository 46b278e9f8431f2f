"""Rewrites the generated parts of docs/cli.md from the configuration's own descriptions. `--check` only compares.

.venv/bin/python docs/generate.py
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

from swift_dist.cli import VERBS
from swift_dist.config import JobConfig, Section
from swift_dist.config.aliases import JOB_ALIASES
from swift_dist.config.keys import walk

PAGE = Path(__file__).with_name("cli.md")


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


def parts() -> dict[str, str]:
    """The generated parts of the page by name."""
    verbs = ["| verb | does |", "|---|---|"]
    verbs += [f"| `{verb.name}` | {verb.help} |" for verb in VERBS]
    options = []
    for verb in VERBS:
        if verb.name == "pretrain":
            continue
        section = getattr(importlib.import_module(verb.module), verb.options)
        if not section.model_fields:
            continue
        bare = " ".join(name.upper() for name in verb.positional)
        options += [f"### swift-dist {verb.name} {bare}".rstrip(), "", table(section), ""]
    return {"verbs": "\n".join(verbs), "job": table(JobConfig, JOB_ALIASES), "options": "\n".join(options).rstrip()}


def rewritten(page: str) -> str:
    """The page with every generated part replaced."""
    for name, text in parts().items():
        pattern = re.compile(rf"(<!-- generated: {name} -->)\n.*?(<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page)
        assert count == 1, f"docs/cli.md has {count} parts called {name}"
    return page


def main() -> int:
    old = PAGE.read_text(encoding="utf-8")
    new = rewritten(old)
    if "--check" in sys.argv:
        return int(old != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
