"""A node of `namespaces.NamespaceTeam`: an Examiner that is asked over a pipe, instead of by Ray."""

from __future__ import annotations

import os
import pickle
import sys
import threading

from swift_dist.doctor.team import Examiner


def main() -> None:
    exam, node = pickle.load(sys.stdin.buffer)
    examiner = Examiner(exam, node)
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def answer(number: int, call: tuple) -> None:
        found = examiner.call(*call)
        with lock:
            pickle.dump((number, found), reply)
            reply.flush()

    while True:
        try:
            number, call = pickle.load(sys.stdin.buffer)
        except EOFError:
            os._exit(0)
        threading.Thread(target=answer, args=(number, call), daemon=True).start()


main()
