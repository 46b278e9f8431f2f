"""How many replicas the load asks for. A decision is a value: nothing here knows Ray.

Ray Serve's own autoscaling counts requests that went through Serve's handles or proxies. Ours go from the front to the
engines, so the engines' own numbers decide: sequences in the batch and those that wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field

from swift_dist.config.section import Section


class ScaleOptions(Section):
    """When replicas are added and taken away."""

    autoscale: str | None = Field(None, description="min:max replicas, by load (default: --replicas, always)")
    target_ongoing_requests: float = Field(
        32, gt=0, description="requests that run or wait on a replica, which --autoscale aims at"
    )
    upscale_delay: float = Field(5.0, ge=0, description="seconds that the load asks for more before they are added")
    downscale_delay: float = Field(
        120.0, ge=0, description="seconds that the load asks for fewer before they are taken away"
    )


@dataclass(frozen=True)
class Bounds:
    least: int
    most: int


def parse_bounds(text: str) -> Bounds:
    """``1:3`` -> Bounds(1, 3).

    Raises:
        ValueError: it is something else.
    """
    least, colon, most = text.partition(":")
    if not (colon and least.isdigit() and most.isdigit() and 1 <= int(least) <= int(most)):
        raise ValueError(f"{text!r} is not min:max with 1 <= min <= max")
    return Bounds(int(least), int(most))


@dataclass(frozen=True)
class Wish:
    """What the load has asked for without interruption: that many replicas or more (fewer), since when."""

    up_since: float | None = None
    up: int = 0
    down_since: float | None = None
    down: int = 0


def decide(
    current: int, load: float, now: float, wish: Wish, bounds: Bounds, options: ScaleOptions
) -> tuple[int, Wish]:
    """The number of replicas from now on, and what is to be remembered until the next decision.

    More are added when every look of the last `upscale_delay` seconds asked for more than there are: as many as the
    least of those asked for. Fewer correspondingly, so a pause of a bursty load takes nothing away.

    Args:
        current: replicas that are wanted now.
        load: requests that run or wait, over all of the version's replicas.
        now: seconds of a monotonic clock.
        wish: what the last decision returned.
    """
    asked = min(max(math.ceil(load / options.target_ongoing_requests), bounds.least), bounds.most)
    if asked > current:
        since = now if wish.up_since is None else wish.up_since
        least = asked if wish.up_since is None else min(wish.up, asked)
        if now - since >= options.upscale_delay:
            return least, Wish()
        return current, Wish(up_since=since, up=least)
    if asked < current:
        since = now if wish.down_since is None else wish.down_since
        most = asked if wish.down_since is None else max(wish.down, asked)
        if now - since >= options.downscale_delay:
            return most, Wish()
        return current, Wish(down_since=since, down=most)
    return current, Wish()
