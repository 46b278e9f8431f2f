"""What ``GET /metrics`` of the hf engine says, in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The engine's counters; names are vLLM's with ``swift_dist:``.

    Args:
        running, waiting: the generator's.
    """

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        for name, text, value in (
            ("num_requests_running", "Sequences in the batch.", running),
            ("num_requests_waiting", "Requests that wait for a place in the batch.", waiting),
        ):
            Gauge(f"swift_dist:{name}", text, registry=registry).set_function(value)
        self.prompt_tokens = Counter("swift_dist:prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generation_tokens = Counter("swift_dist:generation_tokens", "Tokens of answers.", registry=registry)
        self.prefix_cache_queries = Counter(
            "swift_dist:prefix_cache_queries", "Tokens of prompts, once for each answer.", registry=registry
        )
        self.prefix_cache_hits = Counter(
            "swift_dist:prefix_cache_hits", "Of these, tokens that earlier requests had computed.", registry=registry
        )
        self.finished = Counter(
            "swift_dist:request_success", "Answers that ended, by why.", ["finished_reason"], registry=registry
        )
        self._first = Histogram(
            "swift_dist:time_to_first_token_seconds", "From the request to its first token.", (), buckets=_FIRST,
            registry=registry,
        )  # fmt: skip
        self._between = Histogram(
            "swift_dist:inter_token_latency_seconds", "Between two tokens of an answer.", (), buckets=_BETWEEN,
            registry=registry,
        )  # fmt: skip
        self._whole = Histogram(
            "swift_dist:e2e_request_latency_seconds", "From the request to the end of its answer.", (), buckets=_WHOLE,
            registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def clock(self) -> Clock:
        """For one answer."""
        return Clock(self)

    def observe(self, first: float | None, between: float | None, whole: float | None) -> None:
        for histogram, seconds in ((self._first, first), (self._between, between), (self._whole, whole)):
            if seconds is not None:
                histogram.observe(seconds)


class Clock:
    """The times of one answer."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begun, self._last = time.perf_counter(), 0.0

    def token(self) -> None:
        now = time.perf_counter()
        if self._last:
            self._metrics.observe(None, now - self._last, None)
        else:
            self._metrics.observe(now - self._begun, None, None)
        self._last = now
        self._metrics.generation_tokens.inc()

    def end(self, reason: str, prompt_tokens: int) -> None:
        self._metrics.observe(None, None, time.perf_counter() - self._begun)
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.finished.labels(reason).inc()
