"""Dockerfile and apptainer.def: linted, and the same image. (They are not built here.)"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCKERFILE, RECIPE = (ROOT / "Dockerfile").read_text(), (ROOT / "apptainer.def").read_text()


def lint(*words: str, text: str) -> None:
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def sections() -> dict[str, str]:
    """Of the recipe, by name; "" is its head."""
    head, *rest = re.split(r"^%(\w+)\n", RECIPE, flags=re.MULTILINE)
    return {"": head, **dict(zip(rest[::2], rest[1::2], strict=True))}


def arguments() -> dict[str, str]:
    return dict(line.strip().split("=", 1) for line in sections()["arguments"].splitlines() if line.strip())


def filled(text: str) -> str:
    """As apptainer fills in its arguments."""
    return re.sub(r"{{ (\w+) }}", lambda match: arguments()[match[1]], text)


def test_dockerfile_passes_hadolint() -> None:
    lint(str(BIN / "hadolint"), "-", text=DOCKERFILE)


def test_recipe_is_one() -> None:
    assert set(sections()) == {"", "arguments", "files", "post", "environment", "runscript", "test"}
    assert set(re.findall(r"{{ (\w+) }}", RECIPE)) == set(arguments())
    assert filled(sections()[""]).splitlines()[:2] == ["Bootstrap: docker", f"From: {arguments()['BASE']}"]
    for name in ("post", "environment", "runscript", "test"):
        # SC2050: what is filled in is constant
        lint(str(BIN / "shellcheck"), "--shell=sh", "--exclude=SC2050", "-", text=filled(sections()[name]))


def test_both_are_the_same_image() -> None:
    def packages(text: str) -> str:
        (found,) = re.findall(r"no-install-recommends \\\n +([a-z0-9 -]+)", text)
        return found.strip()

    bases = dict(re.findall(r"^FROM (\S+) AS base-(\w+)$", DOCKERFILE, re.MULTILINE))
    assert bases == {arguments()["BASE"]: "cuda", "ubuntu:24.04": "cpu"} and "BASE=ubuntu:24.04" in RECIPE
    assert packages(DOCKERFILE) == packages(RECIPE) and "build-essential" in packages(RECIPE)
    variables = re.search(r"^ENV (.*)$", DOCKERFILE, re.MULTILINE)
    assert variables and f"export {variables[1]}" in sections()["environment"]
    kept_out = {line for line in (ROOT / ".dockerignore").read_text().split() if not line.startswith("**")}
    (removed,) = re.findall(r"rm -rf (\.git .*)", RECIPE)
    assert {word.removeprefix("./") for word in removed.split()} == kept_out - {"*.egg-info"}
    for text in (DOCKERFILE, RECIPE):
        assert "extras=gpu,trackers" in text and "bash .ci/install" in text
