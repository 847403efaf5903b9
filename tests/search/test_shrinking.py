"""Networks inside networks: which are tried for a budget."""

import pytest

from tests.search.conftest import FULL, PER_LAYER, toy_cost
from whittle_nas.errors import ConfigError
from whittle_nas.search.shrinking import Shrinking, parts_of
from whittle_nas.space import SearchSpace

BUDGETS = {"small": "num_params <= 40%", "large": "num_params <= 80%", "flat": "flops <= 3"}


def cost(sub, name):
    """As if FLOPs were layers: of another order than parameters."""
    return toy_cost(sub) if name == "num_params" else float(sub.n_layer)


def shrinking(space, budgets=BUDGETS, candidates=12):
    return Shrinking.of(space, budgets, cost, candidates=candidates, seed=1)


def test_the_largest_budget_comes_first(space):
    assert shrinking(space).names == ("large", "flat", "small")  # .8, 3 of 6 layers, .4


@pytest.mark.parametrize("larger", [FULL, None])
def test_members_are_parts_of_the_larger_network_that_make_use_of_the_budget(space, larger):
    found = shrinking(space)
    around = larger or max(found.members("large", FULL), key=toy_cost)
    name = "large" if larger else "small"
    limit = (0.8 if larger else 0.4) * toy_cost(FULL)
    members = found.members(name, around)
    assert len(set(members)) == len(members) == 12
    assert all(space.contains(sub) and sub.within(around) is not None for sub in members)
    assert all(toy_cost(sub) <= limit for sub in members)
    assert found.members(name, around) == members  # whoever asks, in whatever process
    other = Shrinking.of(space, BUDGETS, cost, candidates=12, seed=2)
    assert other.members(name, around) != members
    # By listing the space: what is smaller in one dimension alone is there, as large as it can be.
    sizes = around.sizes()
    inside = [s for s in space.members() if s.within(around) is not None and toy_cost(s) <= limit]
    alone = []
    for dimension in sizes:
        kept = [n for n in sizes if n != dimension]
        only = [s for s in inside if all(s.sizes()[n] == sizes[n] for n in kept)]
        alone += [max(only, key=toy_cost)] if only else []
    assert len(alone) >= 2
    assert set(alone) <= set(members)
    # The others are near the limit, or among the nearest: not every member is drawn.
    others = [toy_cost(sub) for sub in members if sub not in alone]
    ranked = sorted((toy_cost(sub) for sub in inside if sub not in alone), reverse=True)
    assert min(others) >= min(0.95 * limit, ranked[2 * len(others)])
    assert min(ranked) < 0.5 * min(others)


def test_what_is_under_the_budget_is_kept_as_it_is(space):
    found = shrinking(space, {"all": "num_params <= 100%", "small": "num_params <= 50%"})
    assert found.members("all", FULL) == [FULL]
    (small, *_) = found.members("small", FULL)
    assert found.members("small", small) == [small]
    assert found.keeps("small", small)
    assert not found.keeps("small", FULL)


def test_parts_of_a_network_are_all_members_that_are_inside_of_it(space):
    larger = next(s for s in space.members() if s.n_layer == 4 and s.n_embd == 40)
    inside = {s for s in space.members() if s.within(larger) is not None}
    listed = {s for s in parts_of(space, larger).members() if s.within(larger) is not None}
    assert listed == inside


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ({"a": "num_params >= 40%"}, "num_params >= 40% must be an upper limit on one of num_pa"),
        ({"a": "val_loss <= 3"}, "val_loss <= 3 must be an upper limit"),
        ({"a": "num_params <= 1"}, "--budgets num_params <= 1: no sub-network of the search space"),
        ({"a": "num_params <= 50%, flops <= 0"}, "--budgets flops <= 0: no sub-network"),
    ],
)
def test_wrong_budgets(space, budgets, words):
    with pytest.raises(ConfigError, match=words):
        shrinking(space, budgets)


@pytest.mark.parametrize(
    "spec",
    [
        {"n_embd": [32, 48, 64], "mlp_ratio": [1, 2], "n_layer": {"min": 2}},
        {"n_layer": [2, 3, 4, 5], "intermediate_size": [96, 128, 160]},
        {"n_query_groups": [1, 2], "intermediate_size": [96, 176], "n_layer": [3, 6]},
    ],
)
def test_only_members_are_tried_where_the_whole_model_is_none(spec):
    space = SearchSpace.from_dict(spec, FULL)
    assert not space.contains(FULL)
    found = shrinking(space, {"all": "num_params <= 100%", "small": "num_params <= 60%"})
    members = found.members("all", FULL)
    assert members
    assert all(map(space.contains, members))
    assert all(map(space.contains, found.members("small", members[0])))


def test_what_the_smallest_member_keeps_is_within_reach(space):
    """However rarely it is drawn."""
    limit = toy_cost(space.smallest)
    found = shrinking(space, {"least": f"num_params <= {limit}"})
    assert found.members("least", FULL) == [space.smallest]


def test_few_candidates_are_not_always_of_the_same_dimensions(space):
    kinds = {
        sub
        for seed in range(20)
        for sub in Shrinking.of(space, BUDGETS, cost, candidates=1, seed=seed).members(
            "large", FULL
        )
    }
    assert len(kinds) >= 3


def test_sizes_per_layer_are_for_programs():
    with pytest.raises(ConfigError, match="the search space has sizes per layer"):
        shrinking(SearchSpace.from_dict(PER_LAYER, FULL))
