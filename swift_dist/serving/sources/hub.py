"""Models of the Hugging Face hub: found in its cache at once, fetched where the hub answers, else a clear error."""

from __future__ import annotations

import logging
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from swift_dist.errors import JobError

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 3.0
_PATTERNS = [
    *("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"),
]


def snapshot(name: str, key: str) -> Path:
    """The folder of a hub model (``owner/name``), downloaded where it is not cached; an adapter as well.

    Where the hub does not answer within seconds the cached copy is taken: of the branch, tag or commit of
    ``owner/name@revision``, else of ``main``, however old that is.

    Raises:
        JobError: (with `key`) the hub has no such model or cannot be reached, and none is cached.
    """
    from huggingface_hub import constants, snapshot_download

    model, _, revision = name.partition("@")
    offline = constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)
    try:
        folder = Path(
            snapshot_download(model, revision=revision or None, allow_patterns=_PATTERNS, local_files_only=offline)
        )
    except Exception as error:  # the hub's errors have no common base: network, permission, name, cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if offline:
            asked = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
            reason = f"it is not in the local cache, and {asked}"
        raise JobError(
            key,
            f"{name} is no folder here and could not be had from the Hugging Face hub: {reason}",
            "correct the path or name, log in for a gated model, or download it elsewhere and give the folder",
        ) from None
    if offline:
        log.info("%s: the cached copy, since the hub was not asked", name)
    return folder


def _answers(endpoint: str) -> bool:
    """Whether something listens at the hub's address; taken for granted behind a proxy, which is not ours to ask."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    parts = urlsplit(endpoint)
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    found = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
            found.set()
        asked.set()

    asked = threading.Event()
    threading.Thread(target=connect, daemon=True).start()  # a name server that is silent has time-outs of its own
    asked.wait(_CONNECT_SECONDS)
    return found.is_set()
