"""Ray's job server, over HTTP: every answer within a deadline, every failure in our words. Never becomes a driver."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from swift_dist.errors import JobError, RunError

_TIMEOUT = (10.0, 60.0)
"""Seconds to connect and to answer. Ray's own client waits for ever."""
_PAUSE = 5.0
"""Seconds without a line after which the follower asks whether the server is still there."""
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class Unreachable(RunError):
    """Nothing answered, or not in time. It may later."""


class UnknownJob(RunError):
    """The cluster has no such job: it was deleted, or the cluster is another one than it was."""


def resolve_address(asked: str | None) -> str:
    """The dashboard's URL.

    Raises:
        JobError: none is given, or it is not the dashboard's.
    """
    remedy = "--launch.ray.address http://HEAD:8265, the dashboard of the cluster's head node"
    given = asked or next((os.environ[name] for name in ADDRESSES if os.environ.get(name)), None)
    if given is None:
        raise JobError("launch.ray.address", f"which cluster? ({' and '.join(ADDRESSES)} are unset)", remedy)
    if not given.startswith(("http://", "https://")):
        raise JobError("launch.ray.address", f"{given} is no address that takes jobs", remedy)
    return given.rstrip("/")


class RayJobs:
    """The job server at an address.

    Every method raises `Unreachable`, `UnknownJob`, or JobError where the server does not know our token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with self._explained():
            self._client = _client(address)

    def ray_version(self) -> str:
        with self._explained():
            return str(self._client._do_request("GET", "/api/version").json()["ray_version"])

    def nodes(self) -> list[dict[str, float]]:
        """The total resources of every node that lives."""
        with self._explained():
            answer = self._client._do_request("GET", "/api/v0/nodes?detail=1&limit=10000")
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {answer.text[:200]}")
            rows = answer.json()["data"]["result"]["result"]
        return [row["resources_total"] for row in rows if row["state"] == "ALIVE"]

    def submit(self, **request: Any) -> str:
        """Upload what is to be uploaded, and hand the job over."""
        with self._explained():
            return str(self._client.submit_job(**request))

    def info(self, job: str) -> Any:
        """Ray's JobDetails."""
        with self._explained():
            return self._client.get_job_info(job)

    def stop(self, job: str) -> None:
        with self._explained():
            self._client.stop_job(job)

    def text(self, job: str) -> str:
        """All that it has printed so far."""
        with self._explained():
            return str(self._client.get_job_logs(job))

    def tail(self, job: str) -> Iterator[str | None]:
        """What it printed from the beginning, in pieces, until it ends; None where nothing came for some seconds."""
        loop = asyncio.new_event_loop()
        pieces = self._client.tail_job_logs(job)

        async def next_piece() -> str:
            return await anext(pieces)

        task: asyncio.Task[str] | None = None
        try:
            while True:
                task = task or loop.create_task(next_piece())
                done, _ = loop.run_until_complete(asyncio.wait({task}, timeout=_PAUSE))
                if not done:
                    yield None
                    continue
                ready, task = task, None
                try:
                    with self._explained():
                        piece = ready.result()
                except StopAsyncIteration:
                    return
                yield piece
        finally:
            if task is not None:
                task.cancel()
                with contextlib.suppress(BaseException):
                    loop.run_until_complete(task)
            loop.run_until_complete(pieces.aclose())
            loop.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise _refused(self.address, str(error)) from None
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403):
                raise _refused(self.address, str(error)) from None
            raise Unreachable(f"{self.address}: {error}") from None
        except (requests.exceptions.RequestException, aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"no Ray dashboard answers at {self.address}: {_short(error)}") from None
        except RuntimeError as error:
            if "does not exist" in str(error):
                raise UnknownJob(f"the cluster at {self.address} does not know this job (any more)") from None
            raise Unreachable(f"the Ray dashboard at {self.address} cannot answer: {_short(error)}") from None


def _client(address: str) -> Any:
    import ray._raylet as raylet
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # they announce every upload and every closed socket
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    # A process that imported Ray earlier still has the settings and the token of then.
    raylet.Config.initialize("")  # type: ignore[attr-defined]
    raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=_TIMEOUT, **options)

    # Ray lets these variables win over the address that it is given.
    hidden = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        return Client(address)
    finally:
        os.environ.update(hidden)


def _refused(address: str, answer: str) -> JobError:
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    answer = answer.splitlines()[0].partition(". ")[0]
    return JobError(
        "RAY_AUTH_TOKEN",
        f"the cluster at {address} does not take this token: {answer} (RAY_AUTH_MODE is {mode})",
        "RAY_AUTH_MODE=token and the cluster's own token in RAY_AUTH_TOKEN, or in the file RAY_AUTH_TOKEN_PATH names",
    )


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
