"""Plug-ins are files: a name is a path, found when it is asked for.

``find("swift_dist.models", "llama", "FAMILY")`` imports ``swift_dist/models/llama.py`` and returns its ``FAMILY``.
Outsiders need no registration: ``"their.module:ATTRIBUTE"`` is a name too. There is no central list; the listing is the
folder. Files whose name starts with an underscore, ``base``, ``choose`` and ``process`` hold what the plug-ins of a
room share and are not plug-ins. This module imports the standard library only, and nothing else that it has not been
asked for.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from typing import Any

_SHARED = frozenset({"base", "choose", "process"})


class UnknownPlugin(LookupError):
    """No plug-in of that name. ``str()`` is one line that says what exists and what was probably meant.

    Attributes:
        name: what was asked for.
        known: the names that exist in that room.
        suggestions: the known names nearest in spelling, nearest first; may be empty.
    """

    def __init__(self, room: str, name: str, known: tuple[str, ...], detail: str = "") -> None:
        self.room, self.name, self.known, self.detail = room, name, known, detail
        self.suggestions = tuple(difflib.get_close_matches(name, known, n=3, cutoff=0.6))
        text = f"{name!r} is not in {room}"
        if detail:
            text += f" ({detail})"
        text += f"; did you mean {' or '.join(self.suggestions)}?" if self.suggestions else "."
        text += f" There are: {', '.join(known) or 'none'}; or give your own as 'package.module:ATTRIBUTE'"
        super().__init__(text)

    def __reduce__(self):
        return (type(self), (self.room, self.name, self.known, self.detail))


def names(room: str) -> tuple[str, ...]:
    """Names of the plug-ins in package ``room`` (``"swift_dist.models"``), sorted; none of them is imported."""
    package = importlib.import_module(room)
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in found if not name.startswith("_") and name not in _SHARED))


def find(room: str, name: str, attribute: str) -> Any:
    """The plug-in ``name`` of package ``room``.

    Args:
        room: dotted package, for example ``"swift_dist.models"``.
        name: the file's name in that package, or ``"package.module:ATTRIBUTE"`` for one that lives elsewhere.
        attribute: what a file of that room holds, for example ``"FAMILY"``.

    Raises:
        UnknownPlugin: there is no such file, module or attribute. An error raised while a plug-in that exists is
            imported passes through as it is: hiding it would send its author looking in the wrong place.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        if not module_name or not attribute or not _module_exists(module_name):
            raise UnknownPlugin(room, name, names(room), "no module of that name can be found")
    else:
        known = names(room)
        if name not in known:
            raise UnknownPlugin(room, name, known)
        module_name = f"{room}.{name}"
    module = importlib.import_module(module_name)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UnknownPlugin(room, name, names(room), f"{module_name} has no {attribute}") from None


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False
