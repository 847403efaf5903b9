"""A range of costs: everything that draws from a space stays in it."""

import random

import pytest

from tests.conftest import tiny_config
from whittle_nas.errors import ConfigError
from whittle_nas.space import load_space
from whittle_nas.space.limited import limited, read_range
from whittle_nas.space.pareto import ParetoSampler
from whittle_nas.space.samplers import RandomSampler, build_grid
from whittle_nas.weights.counting import parameter_counter

CONFIG = tiny_config("Llama-3.1-8B")
COST = parameter_counter(CONFIG)
SPACE = load_space(
    {"n_embd": {"min": 8}, "intermediate_size": {"min": 8}, "n_layer": {"min": 1}}, CONFIG
)


@pytest.mark.parametrize("given", ["40%..60%", "20%..", "..0.5x"])
def test_what_is_drawn_lies_in_the_range(given):
    space = limited(SPACE, COST, given)
    low, high = read_range(given, COST(SPACE.full))
    grid = build_grid(space, COST, seed=0, num_bins=6, trials_per_bin=500)
    pareto = ParetoSampler.start(space, COST, 6)
    rng = random.Random(0)
    scored = [(sub, COST(sub) % 7) for sub in grid.subs]
    samplers = (RandomSampler(space), pareto, pareto.updated(scored))
    drawn = [*grid.subs, *(sub for sampler in samplers for sub in sampler.sample(rng, 20))]
    drawn += pareto.updated(scored).candidates(rng, 30)
    costs = [COST(sub) for sub in (*drawn, space.smallest, space.largest)]
    assert low <= min(costs) <= max(costs) <= high
    assert all(SPACE.contains(sub) and space.contains(sub) for sub in drawn)
    # the ends are close to those of the range, where the space reaches so far
    ends = max(low, COST(SPACE.smallest)), min(high, COST(SPACE.largest))
    width = ends[1] - ends[0]
    assert grid.edges[0] < ends[0] + 0.1 * width
    assert grid.edges[-1] > ends[1] - 0.1 * width
    outside = [sub for sub in (SPACE.smallest, SPACE.largest) if not low <= COST(sub) <= high]
    assert outside
    assert not any(map(space.contains, outside))


def test_no_range_is_the_space_itself():
    assert limited(SPACE, COST, None) is SPACE


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("half", "range such as"),
        ("90%..40%", "empty"),
        ("..", "range such as"),
        ("1..2", "none of"),
    ],
)
def test_wrong_ranges_are_one_sentence(given, words):
    with pytest.raises(ConfigError, match=words):
        limited(SPACE, COST, given)
