"""Ports for what a test starts and has to name beforehand."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """One of 127.0.0.1 that nobody listens on, and that the kernel gives to no connection in the meantime.

    Below Linux' range for those (from 32768), and above Ray's for workers (to 19999).
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
