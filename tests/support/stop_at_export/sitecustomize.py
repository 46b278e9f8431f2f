"""Stops the first process that writes into an export, before its first file is opened: with SIGSTOP, and once.

A folder for PYTHONPATH: every interpreter imports a module of this name when it starts. The moment is some milliseconds
long, too short to be found from outside on a busy machine.
"""

from __future__ import annotations

import os
import signal
import sys

PLACE = "SWIFT_DIST_TEST_STOPPED"
"""Variable with the path of a file that must not be there yet; gets the process id of the one that stopped."""


def _stop(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open" or not isinstance(arguments[0], str):
        return
    if "/.model.partial/" not in arguments[0] and "/.adapter.partial/" not in arguments[0]:
        return
    try:
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return
    os.write(descriptor, str(os.getpid()).encode())
    os.close(descriptor)
    os.kill(os.getpid(), signal.SIGSTOP)


if place := os.environ.get(PLACE, ""):
    sys.addaudithook(_stop)
