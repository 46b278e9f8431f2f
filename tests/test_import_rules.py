"""Who may import whom: data flows one way through the rooms. Read from the source, so linked rooms are seen too."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED_ROOMS = ("converters", "kernels", "launchers")  # at the top of the repository, linked from swift_dist/

EVERYWHERE = {"errors", "lifetime", "plugins"}  # standard library only, themselves
EVERYTHING = {"*"}
# room -> rooms (or modules of rooms) that it may import, besides itself and EVERYWHERE
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "lifetime": set(),
    "plugins": set(),
    "workers": set(),
    "config": set(),
    "parallel": {"config"},
    "kernels": set(),
    "converters": {"config", "parallel", "kernels"},
    "models": {"config", "parallel", "converters.mapping"},
    "recipes": {"config", "parallel", "models"},
    "data": {"config", "workers"},
    "tuners": {"config", "models", "converters"},
    "mixing": {"config", "tuners"},  # the Python API of several adapters on one model
    "objectives": {"config", "models"},
    "optim": {"config", "models"},
    "checkpoint": {"config", "parallel", "converters"},
    "runs": {"config"},
    "convert": {"config", "parallel", "models", "converters", "checkpoint", "workers"},
    "sequence_parallel": {"config", "parallel", "kernels"},
    "engines": {
        *("config", "parallel", "kernels", "converters", "models", "data", "tuners", "objectives", "optim"),
        *("checkpoint", "runs", "sequence_parallel"),
    },
    "train": {
        *("config", "parallel", "kernels", "converters", "models", "data", "tuners", "objectives", "optim"),
        *("checkpoint", "runs", "sequence_parallel", "engines"),
    },
    "cluster": {"config", "parallel", "runs"},
    "resolve": {
        *("config", "parallel", "models", "data", "optim", "checkpoint", "finetune"),
        "engines.megatron.requirements",
        "sequence_parallel.degrees",
    },
    "finetune": {
        *("config", "parallel", "models", "data", "tuners", "objectives"),
        "engines.hf.strategies._deepspeed_config",  # what a DeepSpeed configuration may say
    },
    "advice": {"config", "checkpoint", "data", "optim", "resolve", "runs"},
    "torchrun": {
        *("config", "advice", "cluster", "runs", "resolve", "train", "doctor.preflight", "launchers.torchrun")
    },
    "job": {"config", "parallel", "cluster", "runs", "resolve", "advice", "doctor.preflight"},
    # What a user names may be a run, a checkpoint of either engine or an adapter: `serving/sources/` has it converted.
    "serving": {
        *("config", "models", "converters", "checkpoint", "convert", "tuners", "runs", "data", "workers"),
        "engines.hf.saved_step",
        # a deployment's own Ray cluster, what it computes on, and what is sent to another machine
        *("cluster.runtime", "cluster.devices", "cluster.versions", "launchers._base"),
    },
    # A launcher asks in the gang's own words whether a job can be placed, and what a node must have installed; what it
    # submitted it notes beside the run, and reads there how that ended.
    "launchers": {
        *("config", "runs.submission", "runs.outcome"),
        *("cluster.placement", "cluster.devices", "cluster.environment", "cluster.versions"),
    },
    # models: how large a checkpoint is; an engine says why it cannot serve on a node
    "doctor": {"config", "parallel", "cluster", "models", "runs.manifest", "serving.engines"},
    # it makes jobs as the driver does, and steps them with the engine
    "bench": {
        *("config", "parallel", "cluster", "models", "recipes", "resolve", "engines", "launchers._base"),
        *("data.samples", "data.templates", "runs.files", "runs.manifest", "runs.throughput"),
    },
    "verbs": set(),
    "api": EVERYTHING,
    "cli": EVERYTHING,
    "": EVERYTHING,  # swift_dist/__init__.py offers the verbs as functions
}

HEAVY = {"torch", "ray", "transformers", "megatron", "deepspeed", "vllm", "datasets", "accelerate", "peft", "trl"}
# Imported by the driver or the command line, whose start must not pay for what it does not use.
LIGHT_ROOMS = (
    *("errors", "lifetime", "plugins", "workers", "config", "parallel", "models", "recipes", "launchers", "cli", "api"),
    *("resolve", "verbs", ""),
)
LIGHT_MODULES = ("runs.worker", "converters.mapping", "doctor.verb", "bench.length", "bench.plan", "bench.search")
# A backend is imported by the room that is that backend.
BACKENDS = {
    "ray": {"cluster", "workers", "serving", "cli", "doctor", "launchers"},
    "megatron": {"engines", "checkpoint", "optim"},
    "vllm": {"serving"},
    "deepspeed": {"engines"},
}


def source_files() -> list[Path]:
    """Every Python file of the package; linked rooms at their real place."""
    inside = [f for f in (ROOT / "swift_dist").rglob("*.py") if not _is_linked(f)]
    return sorted(inside + [f for room in LINKED_ROOMS for f in (ROOT / room).rglob("*.py")])


def _is_linked(file: Path) -> bool:
    return file.relative_to(ROOT / "swift_dist").parts[0] in LINKED_ROOMS


def dotted(file: Path) -> str:
    """The module's name below swift_dist: "config.job", "converters.mapping", "" for the package itself."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "swift_dist" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports(file: Path, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import that runs; those for type checkers only do not."""
    package = ["swift_dist", *dotted(file).split(".")] if dotted(file) else ["swift_dist"]
    if file.name != "__init__.py":
        package = package[:-1]
    for node in _statements(ast.parse(file.read_text(encoding="utf-8")), top_level_only):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from swift_dist import parallel` names a room as much as `import swift_dist.parallel`
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def _statements(node: ast.AST, top_level_only: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from _statements(other, top_level_only)
            continue
        if top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from _statements(child, top_level_only)


def wrong_rooms(file: Path) -> list[str]:
    module = dotted(file)
    room = room_of(module)
    assert room in ALLOWED, (
        f"{file}: the room {room!r} is not in the table of this test; add it with what it may import"
    )
    allowed = ALLOWED[room] | EVERYWHERE | {room}
    found = []
    for line, target in imports(file):
        if not target.startswith("swift_dist.") or ALLOWED[room] == EVERYTHING:
            continue
        inner = target.removeprefix("swift_dist.")
        if inner.startswith("__"):
            continue  # from swift_dist import __version__
        if not any(inner == name or inner.startswith(name + ".") for name in allowed):
            found.append(f"{file.relative_to(ROOT)}:{line} imports {target}")
    return found


def test_rooms_import_only_what_the_table_allows():
    assert [problem for file in source_files() for problem in wrong_rooms(file)] == []


def test_rooms_are_imported_through_the_package():
    """`kernels` is another project's package: the bare names are never imported."""
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {target}"
        for file in [*source_files(), *(ROOT / "tests").rglob("*.py")]
        for line, target in imports_anywhere(file)
        if target.split(".")[0] in LINKED_ROOMS
    ]
    assert wrong == []


def imports_anywhere(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""


def test_light_files_import_heavy_libraries_inside_functions_only():
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {target}"
        for file in source_files()
        if room_of(dotted(file)) in LIGHT_ROOMS or dotted(file) in LIGHT_MODULES
        for line, target in imports(file, top_level_only=True)
        if target.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_backends_are_imported_by_their_rooms_only():
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {target}"
        for file in source_files()
        for line, target in imports(file)
        if room_of(dotted(file)) not in BACKENDS.get(target.split(".")[0], {room_of(dotted(file))})
    ]
    assert wrong == []


LIGHT_TO_START = [
    "cli",
    "config",
    "config.load",
    "parallel",
    "models",
    "recipes",
    "resolve",
    "runs.worker",
    "doctor.verb",
    "bench.length",
    "workers.pool",
]


@pytest.mark.parametrize("module", LIGHT_TO_START)
def test_importing_a_light_module_loads_nothing_heavy(module):
    """Through everything that it imports in turn."""
    code = f"import sys, swift_dist.{module}; print(sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_rooms_at_the_top_are_no_packages():
    """An __init__.py directly in kernels/ would hide the Hugging Face package of that name from transformers."""
    assert not any((ROOT / room / "__init__.py").exists() for room in LINKED_ROOMS)
    for room in LINKED_ROOMS:
        assert (ROOT / "swift_dist" / room).is_symlink()


def test_a_folder_of_its_name_does_not_hide_the_package(tmp_path):
    """Working beside the clone: Python looks in the current folder first, and so do the ranks."""
    (tmp_path / "swift_dist").mkdir()
    code = "import swift_dist; print(swift_dist.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == str(ROOT / "swift_dist" / "__init__.py"), done.stderr


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("swift_dist/config/x.py", "from swift_dist.parallel import ModelShape", True),
        ("swift_dist/config/x.py", "from ..parallel import ModelShape", True),
        ("swift_dist/config/x.py", "def f():\n    import swift_dist.models", True),
        ("swift_dist/config/x.py", "from swift_dist import train", True),
        ("swift_dist/models/x.py", "from swift_dist.converters.mapping import Row", False),
        ("swift_dist/models/x.py", "from swift_dist.converters.hf_to_megatron import load", True),
        ("converters/x.py", "from swift_dist.models import find_family", True),
        (
            "converters/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from swift_dist.models import Family",
            False,
        ),
        ("swift_dist/workers/x.py", "from swift_dist.config import JobConfig", True),
        ("swift_dist/workers/x.py", "from swift_dist.lifetime import end_with_parent", False),
        ("swift_dist/train.py", "from swift_dist.cluster import gang", True),
        ("swift_dist/job.py", "from swift_dist.cluster import gang", False),
    ],
)
def test_the_rule_itself(tmp_path, monkeypatch, name, source, wrong):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    assert bool(wrong_rooms(file)) == wrong
