"""How evaluations are counted: the best one, and patience."""

from __future__ import annotations

import math

from swift_dist.runs.evaluations import Evaluations


def after(*losses: float) -> Evaluations:
    found = Evaluations()
    for number, loss in enumerate(losses, 1):
        found = found.after(10 * number, loss)
    return found


def test_the_best_is_the_lowest_and_patience_counts_what_came_since() -> None:
    found = after(3.0, 2.0, 2.0, 2.5)
    assert (found.best_loss, found.best_step, found.without_better) == (2.0, 20, 2)
    assert found.exhausted(2) and not found.exhausted(3) and not found.exhausted(None)
    assert found.why_exhausted() == "2 evaluations without an eval_loss below 2.0000, that of step 20"
    assert Evaluations.from_dict(found.to_dict()) == found and Evaluations.from_dict(None) == Evaluations()


def test_a_loss_that_is_no_number_is_no_better_than_any() -> None:
    """Taken for the best, it would stay it: nothing is below it."""
    assert after(math.nan) == Evaluations(None, None, 1)
    assert after(math.nan).why_exhausted() == "1 evaluation without an eval_loss that is a number"
    found = after(math.nan, 2.0, math.nan, 1.0)
    assert (found.best_loss, found.best_step, found.without_better) == (1.0, 40, 0)
