import math

import pytest

from tests.conftest import uniform
from whittle_nas.search import halving
from whittle_nas.search.results import best_per_budget, front_of, hypervolume_over_time
from whittle_nas.search.trials import Status, Trial
from whittle_nas.space.front import parse_constraints

OBJECTIVES = ("val_loss", "num_params")


def trial(number, loss, params, status=Status.complete, **metrics):
    sub = uniform(8, 1, 1, 8, 8, number + 1, of=12)
    values = {"val_loss": loss, "num_params": params, **metrics}
    return Trial(number, sub, status, values)


TRIALS = [
    trial(0, 1.0, 100),
    trial(1, 4.0, 10),
    trial(2, 2.0, 60),
    trial(3, 2.5, 70),
    trial(4, 2.0, 60),
    trial(5, 0.5, 50, Status.stopped),
    Trial(6, uniform(8, 1, 1, 8, 8, 7, of=7), Status.failed, {"num_params": 1.0}),
]


def test_front_leaves_out_dominated_repeated_stopped_and_failed_ones():
    assert [t.number for t in front_of(TRIALS, OBJECTIVES, ())] == [1, 2, 0]


def test_constraints_on_quality_count_afterwards():
    limits = parse_constraints("val_loss <= 3")
    assert [t.number for t in front_of(TRIALS, OBJECTIVES, limits)] == [2, 0]


def test_hypervolume_rises_to_the_dominated_share():
    found = hypervolume_over_time(TRIALS, OBJECTIVES, ())
    assert found == sorted(found)
    # Of the box 10..100 x 1..4 the only point inside, (60, 2), dominates 40/90 * 2/3.
    assert found[-1] == pytest.approx(40 / 90 * 2 / 3)


def test_best_under_each_share_of_the_parameters():
    best = best_per_budget(TRIALS, OBJECTIVES, ())
    assert [(share, t.number) for share, t in best] == [(0.25, 1), (0.5, 1), (0.75, 2), (1.0, 0)]


def seen(number, first, params, **metrics):
    return trial(number, first + 0.25, params, first_val_loss=first, **metrics)


def test_halving_lets_everything_new_pass():
    told = [seen(0, 1.0, 100), seen(1, 4.0, 10)]
    assert halving.bound({"num_params": 5.0}, told, ["num_params"], keep=0.3) == math.inf
    assert halving.bound({"num_params": 50.0}, [], ["num_params"], keep=0.3) == math.inf
    # Below all cheaper ones: goes on, whatever the slack is.
    assert halving.bound({"num_params": 50.0}, told, ["num_params"], keep=0.0) >= 4.0


def test_halving_stops_the_worst():
    told = [seen(0, 1.0, 10)] + [seen(n, 1.0 + 0.1 * n, 10 + n) for n in range(1, 11)]
    cost = {"num_params": 30.0}
    assert halving.bound(cost, told, ["num_params"], keep=0.0) == pytest.approx(1.1)
    assert halving.bound(cost, told, ["num_params"], keep=1.0) == pytest.approx(2.0)
    assert 1.1 < halving.bound(cost, told, ["num_params"], keep=0.5) < 2.0


def test_stopped_ones_are_told_as_they_would_have_become():
    told = [seen(0, 1.0, 100), seen(1, 4.0, 10)]
    stopped = trial(2, 0.0, 50, Status.stopped, first_val_loss=3.0)
    found = halving.completed(stopped, told, ("val_loss", "perplexity"))
    assert found["val_loss"] == pytest.approx(3.25)
    assert found["perplexity"] == pytest.approx(math.exp(3.25))
