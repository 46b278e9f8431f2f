"""Gathers the demo's text: the Python source of the standard library and of PyTorch, one JSON row a file.

Why this text: once PyTorch is installed every machine has it, so nothing is downloaded and its licences (PSF, BSD) are
plain. It is real: some 45 MB written by hand by thousands of people, half of it English in comments and docstrings.
Left out: tests, files that a program wrote, tables (very long lines), files above 256 kB, and second copies.

    python docs/demo/corpus.py .demo/corpus.jsonl
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "__pycache__"}
GENERATED = re.compile(r"@generated|auto-?(matically )?generated|generated (by|from)", re.IGNORECASE)
AT_LEAST = 20_000_000


def roots() -> dict[str, Path]:
    """Where the text lies on this machine. PyTorch is found, not imported."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None, "PyTorch is not installed"
    return {"python": Path(sysconfig.get_paths()["stdlib"]), "torch": Path(torch.origin).parent}


def documents() -> Iterator[dict[str, str]]:
    """Every file that is kept, in the order of its name, so that equal installations give equal corpora."""
    seen = set()
    for name, root in roots().items():
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if LEFT_OUT & set(relative.parts) or not 200 <= path.stat().st_size <= 256_000:
                continue
            data = path.read_bytes()
            digest = hashlib.sha256(data).digest()
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if digest in seen or GENERATED.search(text[:2000]) or max(map(len, text.splitlines())) > 400:
                continue
            seen.add(digest)
            yield {"path": f"{name}/{relative.as_posix()}", "text": text}


def main() -> None:
    target = Path(sys.argv[1])
    rows = list(documents())
    size = sum(len(row["text"].encode()) for row in rows)
    assert size >= AT_LEAST, f"only {size / 1e6:.0f} MB of text were found"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} files, {size / 1e6:.1f} MB of text in {target}")


if __name__ == "__main__":
    main()
