"""An adapter and its base as one folder: merged, or the base with the adapter's chat template. Made once and kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from swift_dist.errors import JobError
from swift_dist.serving.options import EngineOptions
from swift_dist.serving.sources.made import made_once, series_of

CHAT_TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"


def not_plain_lora(name: str, folder: Path) -> str | None:
    """Why vLLM and LMDeploy cannot load an adapter, whatever its rank; None: they can.

    Raises:
        JobError: its adapter_config.json cannot be read.
    """
    from swift_dist.serving.engines._adapters import check_lora, read_adapter

    read_adapter(name, str(folder))
    try:
        check_lora("not every engine", name, str(folder), None)
    except JobError as error:
        return error.message
    return None


def merged(name: str, base: Path, adapter: Path, cache: Path | None, *, trust_remote_code: bool) -> Path:
    """The folder of the model that an adapter makes of its base.

    Raises:
        JobError: they do not belong together.
    """

    def merge_into(folder: Path) -> None:
        from swift_dist.tuners import merge

        merge(base, adapter, folder, trust_remote_code=trust_remote_code)

    what, series = f"merging {adapter} into {base}", f"merged {series_of(adapter)}"
    return made_once(f"{name}-merged", [adapter, base], {}, merge_into, cache, what, series)


def brings_template(adapter: Path, base: Path) -> bool:
    """Whether an adapter has a chat template of its own, such as one that its training wrote into it."""
    from swift_dist.serving.families import template_of

    own = adapter / CHAT_TEMPLATE
    return own.is_file() and own.read_text(encoding="utf-8") != template_of(str(base), EngineOptions())


def with_template(name: str, base: Path, adapter: Path, cache: Path | None) -> Path:
    """A folder with the adapter's chat template, and else with links to all of its base: an engine has one template."""

    base_may_go = series_of(base) != str(base.absolute())  # a conversion that a newer one deletes

    def link(file: str, target: str) -> None:
        file = os.path.realpath(file)
        try:
            os.link(file, target)
        except OSError:  # another file system, or another user's
            if base_may_go:
                shutil.copy2(file, target)
            else:
                Path(target).symlink_to(file)

    def make(folder: Path) -> None:
        from swift_dist.tuners._export import written_whole

        ignored = shutil.ignore_patterns(CHAT_TEMPLATE, _MORE_TEMPLATES, ".*")
        with written_whole(folder) as new:
            shutil.copytree(base, new, copy_function=link, ignore=ignored, dirs_exist_ok=True)
            shutil.copy2(adapter / CHAT_TEMPLATE, new)
            if (adapter / _MORE_TEMPLATES).is_dir():
                shutil.copytree(adapter / _MORE_TEMPLATES, new / _MORE_TEMPLATES)

    what, series = f"linking {base} with the chat template of {adapter}", f"template {series_of(adapter)}"
    return made_once(name, [adapter, base], {}, make, cache, what, series)
