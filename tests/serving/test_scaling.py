"""How many replicas a load asks for, and when."""

from __future__ import annotations

import pytest

from swift_dist.serving.deployment.scaling import Bounds, ScaleOptions, Wish, decide, parse_bounds

OPTIONS = ScaleOptions(autoscale="1:3", target_ongoing_requests=10, upscale_delay=5, downscale_delay=30)


def replay(loads: list[float], current: int = 1, step: float = 1.0) -> list[int]:
    """Replicas after each look, one a second."""
    wish, numbers = Wish(), []
    for second, load in enumerate(loads):
        current, wish = decide(current, load, second * step, wish, Bounds(1, 3), OPTIONS)
        numbers.append(current)
    return numbers


def test_up_after_the_delay_and_down_after_a_longer_one():
    numbers = replay([25.0] * 10 + [0.0] * 40)
    assert numbers[:7] == [1, 1, 1, 1, 1, 3, 3]
    assert numbers[10:40] == [3] * 30
    assert numbers[40] == 1


def test_a_short_burst_adds_nothing_and_a_short_pause_takes_nothing():
    assert set(replay([25, 25, 25, 25, 0] * 10)) == {1}
    assert set(replay(([0] * 29 + [30]) * 3, current=3)) == {3}


def test_no_more_than_the_least_that_was_asked_for():
    assert replay([15, 30, 30, 30, 30, 30])[-1] == 2
    assert replay([0] * 15 + [15] + [0] * 15, current=3)[-1] == 2


@pytest.mark.parametrize(("load", "replicas"), [(0, 1), (10, 1), (10.5, 2), (1000, 3)])
def test_bounds(load, replicas):
    assert replay([load] * 7)[-1] == replicas


@pytest.mark.parametrize("text", ["3", "0:3", "3:1", "a:b", "1:", "-1:3", ""])
def test_wrong_bounds(text):
    with pytest.raises(ValueError, match="min:max"):
        parse_bounds(text)


def test_bounds_from_text():
    assert parse_bounds("1:3") == Bounds(1, 3)
