"""One conformance suite for all samplers, and the grid against brute force."""

import pickle
import random

import pytest

from tests.conftest import uniform
from whittle_nas.errors import ConfigError
from whittle_nas.space import SearchSpace, SubNetwork
from whittle_nas.space.samplers import (
    Grid,
    GridSampler,
    RandomSampler,
    bin_edges,
    bin_of,
    build_grid,
)

FULL = uniform(64, 8, 4, 8, 172, 5, of=5)
SPACE = SearchSpace.from_dict(
    {
        "n_embd": {"min": 32, "max": 64, "step": 8},
        "n_head": [4, 8],
        "intermediate_size": {"min": 86, "max": 172, "step": 43},
        "n_layer": {"min": 3, "max": 5},
    },
    FULL,
)


def cost(sub: SubNetwork) -> float:
    rows = sum(b.n_head * b.head_size + b.intermediate_size for b in sub.blocks if b)
    return sub.n_embd * (rows + 1)


def _samplers():
    grid = build_grid(SPACE, cost, seed=0, num_bins=6)
    scored = build_grid(SPACE, cost, seed=0, num_bins=6, score=lambda sub: sub.n_layer)
    return {
        "random": RandomSampler(SPACE),
        "grid_params": GridSampler(grid.subs),
        "calibrate": GridSampler(scored.subs),
        "fixed": GridSampler((FULL, SPACE.smallest, SPACE.sample(random.Random(5)))),
    }


SAMPLERS = _samplers()


@pytest.mark.parametrize("name", SAMPLERS)
class TestConformance:
    """The contract of `Sampler`, for every implementation."""

    def test_draws_members_of_the_space(self, name):
        draws = SAMPLERS[name].sample(random.Random(1), 50)
        assert len(draws) == 50
        assert all(SPACE.contains(sub) for sub in draws)

    def test_draws_depend_on_the_generator_alone(self, name):
        sampler = SAMPLERS[name]
        first = [sampler.sample(random.Random(s), 2) for s in range(20)]
        again = [sampler.sample(random.Random(s), 2) for s in reversed(range(20))]
        assert first == again[::-1]
        assert len({tuple(draws) for draws in first}) > 1

    def test_draws_of_a_step_differ(self, name):
        for seed in range(20):
            draws = SAMPLERS[name].sample(random.Random(seed), 3)
            assert len(set(draws)) == 3

    def test_more_draws_than_members(self, name):
        assert len(SAMPLERS[name].sample(random.Random(0), 500)) == 500

    def test_travels_between_processes(self, name):
        sampler = SAMPLERS[name]
        copy = pickle.loads(pickle.dumps(sampler))
        assert copy.sample(random.Random(3), 4) == sampler.sample(random.Random(3), 4)


def test_grid_has_one_member_per_bin():
    grid = build_grid(SPACE, cost, seed=3, num_bins=6)
    occupied = {bin_of(cost(sub), grid.edges) for sub in SPACE.members()}
    assert [bin_of(member.cost, grid.edges) for member in grid.members] == sorted(occupied)
    assert set(grid.empty_bins) == set(range(6)) - occupied
    assert all(member.cost == cost(member.sub) for member in grid.members)
    assert grid.members == tuple(sorted(grid.members, key=lambda member: member.cost))


def test_grid_keeps_the_highest_score_of_each_bin():
    def score(sub):
        return hash(sub) % 1000

    grid = build_grid(SPACE, cost, seed=3, num_bins=6, score=score, candidates_per_bin=10**6)
    for member in grid.members:
        rivals = [
            score(sub)
            for sub in SPACE.members()
            if bin_of(cost(sub), grid.edges) == bin_of(member.cost, grid.edges)
        ]
        assert member.score == max(rivals)


def test_every_member_of_a_bin_is_equally_likely():
    edges = bin_edges(cost(SPACE.smallest), cost(SPACE.largest), 6)
    rivals = [sub for sub in SPACE.members() if bin_of(cost(sub), edges) == 2]
    drawn = [build_grid(SPACE, cost, seed=s, num_bins=6).subs[2] for s in range(60 * len(rivals))]
    counts = [drawn.count(sub) for sub in rivals]
    assert sum(counts) == len(drawn)
    # Binomial with mean 60: five standard deviations are 39.
    assert all(21 <= count <= 99 for count in counts)


def test_unreachable_bins_are_reported_and_end_the_search():
    two_sizes = SearchSpace.from_dict({"n_layer": [1, 5]}, FULL)
    grid = build_grid(two_sizes, cost, seed=0, num_bins=10, trials_per_bin=500)
    assert grid.subs == (two_sizes.smallest, two_sizes.largest)
    assert grid.empty_bins == tuple(range(1, 9))


def test_space_of_one_member():
    single = SearchSpace.from_dict({}, FULL)
    grid = build_grid(single, cost, seed=0, num_bins=4, trials_per_bin=10)
    assert grid.subs == (FULL,)
    assert RandomSampler(single).sample(random.Random(0), 3) == [FULL] * 3


def test_the_seed_is_the_grid():
    assert build_grid(SPACE, cost, seed=1) == build_grid(SPACE, cost, seed=1)
    assert build_grid(SPACE, cost, seed=1) != build_grid(SPACE, cost, seed=2)


def test_grid_survives_its_file_and_edits():
    grid = build_grid(SPACE, cost, seed=1, num_bins=5, score=lambda sub: float(sub.n_layer))
    spec = grid.to_dict()
    assert Grid.from_dict(spec, cost=cost, layer_order=range(5)) == grid
    by_hand = [FULL.to_dict(), SPACE.smallest.to_dict()]
    assert Grid.from_dict(by_hand, cost=cost, layer_order=range(5)).subs == (SPACE.smallest, FULL)
    named = [{"name": f"n{number}", **sizes} for number, sizes in enumerate(by_hand)]
    assert Grid.from_dict(named, cost=cost, layer_order=range(5)).subs == (SPACE.smallest, FULL)
    front = {"front": [{"index": 0, "subnetwork": sizes, "metrics": {}} for sizes in by_hand]}
    assert Grid.from_dict(front, cost=cost, layer_order=range(5)).subs == (SPACE.smallest, FULL)


@pytest.mark.parametrize("spec", [{}, [], {"members": []}, 3, {"members": [{"n_embd": 3}]}, [4]])
def test_malformed_grid_file(spec):
    with pytest.raises(ConfigError):
        Grid.from_dict(spec, cost=cost, layer_order=range(5))


@pytest.mark.parametrize("wrong", [{"num_bins": 0}, {"trials_per_bin": 0}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build_grid(SPACE, cost, seed=0, **wrong)
