"""The process between a replica and its engine: nothing of the engine outlives either of them.

    python -P -m swift_dist.serving.engines._guard OWNER_PID COMMAND...

It starts the command and waits. When the command ends, however it ends, everything that it started is killed, and the
guard ends with its exit code (128 + the signal's number where one ended it). When the owner is gone, everything is
killed. SIGTERM is handed on to the command; SIGQUIT kills everything at once. As the subreaper the guard is the parent
that orphans fall back to, so a vLLM EngineCore whose server was killed with SIGKILL is found, whatever session it is
in. If the guard itself is killed, the kernel kills the command.

A process of its own, because a kernel's parent-death signal goes by the thread that started a child, and replicas start
engines from threads that end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from swift_dist.lifetime import adopt_orphans, end_family, end_with_parent

_POLL_SECONDS = 0.1


def main() -> int:
    owner, command = int(sys.argv[1]), sys.argv[2:]
    guard = os.getpid()
    adopt_orphans()
    try:
        # One thread until here, so code may run between fork and exec.
        child = subprocess.Popen(command, preexec_fn=lambda: end_with_parent(signal.SIGKILL, guard)).pid
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127

    def hand_on(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)  # not waited for yet, so the id is still its own

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGQUIT, lambda number, frame: os.kill(child, signal.SIGKILL))
    while os.getppid() == owner:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGQUIT, signal.SIG_IGN)
            end_family()
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(_POLL_SECONDS)
    end_family()
    return 1


if __name__ == "__main__":
    sys.exit(main())
