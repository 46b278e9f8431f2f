"""API keys: read from a file or a variable, known to HAProxy by their digests only."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from swift_dist.errors import JobError
from swift_dist.serving.front.options import FrontOptions

_KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")  # what a bearer token may be (RFC 6750)


def api_digests(options: FrontOptions) -> list[str]:
    """SHA-256 of each key that may call, as HAProxy writes them; none where none is asked for.

    Raises:
        JobError: the file or variable holds no key, or something that is none.
    """
    keys: list[str] = []
    if options.api_keys is not None:
        keys += keys_of_file("api_keys", options.api_keys)
    if options.api_keys_variable is not None:
        value = os.environ.get(options.api_keys_variable, "")
        keys += _checked("api_keys_variable", options.api_keys_variable, re.split(r"[\s,]+", value.strip()))
    return [digest(key) for key in keys]


def admin_digests(options: FrontOptions) -> list[str]:
    """Likewise of each admin key."""
    if options.admin_keys is None:
        return []
    return [digest(key) for key in keys_of_file("admin_keys", options.admin_keys)]


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest().upper()


def keys_of_file(option: str, path: str) -> list[str]:
    """A key a line; empty lines and those that begin with # are none.

    Raises:
        JobError: (with `option`) it cannot be read, or holds no key, or something that is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(option, f"{path} cannot be read: {error}", "name a text file with a key a line") from error
    return _checked(option, path, [line.strip() for line in lines])


def _checked(option: str, where: str, words: list[str]) -> list[str]:
    keys = [word for word in words if word and not word.startswith("#")]
    if not keys:
        raise JobError(option, f"{where} holds no key", "put a key on each line of a file, or leave the option out")
    for number, key in enumerate(keys, 1):
        if not _KEY.fullmatch(key):
            raise JobError(
                option,
                f"key {number} of {where} has characters that a key cannot have",
                "letters, digits and -._~+/= only",
            )
    return keys
