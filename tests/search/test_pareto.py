import numpy as np
import pytest

from whittle_nas.search.pareto import hypervolume, improvement, is_on_front, pareto_rank
from whittle_nas.search.searchers.growth import expected_growth


def dominates(a, b):
    return (a <= b).all() and (a < b).any()


@pytest.mark.parametrize("objectives", [2, 3])
def test_front_and_ranks_against_the_definition(objectives):
    points = np.random.default_rng(0).integers(0, 8, (60, objectives)).astype(float)
    ranks, layer, left = pareto_rank(points), 0, list(range(60))
    assert (is_on_front(points) == (ranks == 0)).all()
    while left:
        best = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        assert all(ranks[i] == layer for i in best)
        left = [i for i in left if i not in best]
        layer += 1


def test_rank_where_syne_tune_is_wrong():
    assert list(pareto_rank(np.array([[2.0, 2.0], [3.0, 3.0], [1.0, 1.0]]))) == [1, 2, 0]


@pytest.mark.parametrize("objectives", [2, 3])
def test_hypervolume_against_counting(objectives):
    points = np.random.default_rng(1).uniform(0, 1.1, (20, objectives))
    samples = np.random.default_rng(2).uniform(0, 1, (40_000, objectives))
    covered = (points[None] <= samples[:, None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(points, np.ones(objectives)) == pytest.approx(covered, abs=0.01)


def test_hypervolume_of_nothing():
    assert hypervolume(np.empty((0, 2)), np.ones(2)) == 0
    assert hypervolume(np.array([[2.0, 0.5]]), np.ones(2)) == 0


@pytest.mark.parametrize("objectives", [2, 3])
def test_improvement_is_the_difference(objectives):
    rng = np.random.default_rng(3)
    points, candidates = rng.uniform(0, 1, (12, objectives)), rng.uniform(0, 1.2, (30, objectives))
    front, reference = points[is_on_front(points)], np.full(objectives, 0.9)
    before = hypervolume(front, reference)
    expected = [hypervolume(np.vstack([front, c]), reference) - before for c in candidates]
    assert improvement(candidates, front, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_expected_growth_against_sampling():
    rng = np.random.default_rng(4)
    seen = rng.uniform(0, 1, (10, 2))
    mean, deviation = rng.uniform(0, 1, (5, 2)), np.array([[0.2, 0.0]] * 5)
    found = expected_growth(mean, deviation, seen, seed=0)
    front = seen[is_on_front(seen)]
    low, span = front.min(axis=0), np.ptp(front, axis=0)
    draws = mean + deviation * rng.standard_normal((20_000, 1, 1))
    scaled = (draws - low) / span
    gains = [improvement(s, (front - low) / span, np.full(2, 1.05)) for s in scaled]
    assert found == pytest.approx(np.mean(gains, axis=0), abs=0.01)
