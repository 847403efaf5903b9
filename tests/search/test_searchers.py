"""The contract of all methods, and what each promises beyond it."""

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.search.conftest import FULL, PER_LAYER, toy_cost, values
from whittle_nas.search.options import Method
from whittle_nas.search.pareto import hypervolume
from whittle_nas.search.searchers import SEARCHERS, make_searcher
from whittle_nas.search.searchers.base import config_space
from whittle_nas.space import SearchSpace

SLOW = {True: [pytest.mark.slow], False: []}


def run(searcher, count, *, late=0, failing=()):
    """Proposals of a search whose results come `late` trials later."""
    subs = []
    for number in range(count + late):
        if number < count:
            config = searcher.suggest()
            if config is None:
                break
            subs.append(searcher.space.build(**config))
        if late <= number < len(subs) + late:
            tell(searcher, number - late, subs[number - late], failing)
    return subs


def tell(searcher, number, sub, failing=()):
    if number in failing:
        searcher.on_trial_error(number)
    else:
        searcher.on_trial_complete(number, searcher.space.genes(sub), list(values(sub)))


@pytest.fixture(params=SEARCHERS)
def method(request):
    return request.param


def test_first_ones_come_first_and_none_twice(method, problem, space):
    subs = run(make_searcher(method, problem, 0), 60)
    assert subs[:2] == [space.largest, space.smallest]
    assert len(set(subs)) == 60
    assert all(space.contains(sub) for sub in subs)


def test_same_seed_same_proposals_whatever_the_global_generators_do(method, problem):
    first = run(make_searcher(method, problem, 7), 40)
    np.random.seed(99)
    random.seed(99)
    assert run(make_searcher(method, problem, 7), 40) == first
    assert run(make_searcher(method, problem, 8), 40) != first


def test_resumed_by_telling_alone(method, problem):
    whole = run(make_searcher(method, problem, 3), 45, failing={5})
    resumed = make_searcher(method, problem, 3)
    for number, sub in enumerate(whole[:33]):
        resumed.accept(sub)
        tell(resumed, number, sub, {5})
    found = list(whole[:33])
    for number in range(33, 45):
        found.append(resumed.space.build(**resumed.suggest()))
        tell(resumed, number, found[-1])
    assert found == whole


def test_late_results_and_failures_are_survived(method, problem):
    subs = run(make_searcher(method, problem, 0), 50, late=6, failing={0, 3, 20, 21})
    assert len(set(subs)) == 50


def test_constraints_are_kept(method, problem, space):
    limit = 0.3 * toy_cost(space.largest)

    def excess(sub):
        return max(0.0, toy_cost(sub) - limit)

    limited = replace(problem, likely_excess=excess, excess=excess)
    subs = run(make_searcher(method, limited, 0), 40)
    assert len(set(subs)) == 40
    assert all(toy_cost(sub) <= limit for sub in subs)


def test_a_constraint_that_needs_a_measurement_is_asked_for_few(method, problem, space):
    measured = []

    def excess(sub):
        measured.append(sub)
        return max(0.0, toy_cost(sub) - 0.7 * toy_cost(space.largest))

    limited = replace(problem, excess=excess)
    subs = run(make_searcher(method, limited, 0), 30)
    assert all(toy_cost(sub) <= 0.7 * toy_cost(space.largest) for sub in subs)
    assert len(measured) < 300


def test_a_small_space_is_exhausted(method, problem):
    space = SearchSpace.from_dict({"n_embd": [32, 64], "n_layer": [1, 2, 6]}, FULL)
    small = replace(problem, space=space, first=[])
    subs = run(make_searcher(method, small, 0), 20)
    assert sorted(subs) == sorted(space.members())


def test_a_space_of_one_member(method, problem):
    single = SearchSpace.from_dict({}, FULL)
    subs = run(make_searcher(method, replace(problem, space=single, first=[]), 0), 3)
    assert subs == [FULL]


def test_ratios_and_log_uniform_dimensions(method, problem):
    spec = {"n_embd": {"min": 1, "log_uniform": True}, "mlp_ratio": [1, 2, 2.75], "n_layer": [2, 6]}
    space = SearchSpace.from_dict(spec, FULL)
    wide = replace(problem, space=space, first=[space.largest])
    subs = run(make_searcher(method, wide, 0), 35)
    assert len(set(subs)) == 35
    assert all(space.contains(sub) for sub in subs)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        pytest.param(m, 14 if m is Method.surrogate else 40, marks=SLOW[m is Method.surrogate])
        for m in SEARCHERS
    ],
)
def test_layers_of_different_sizes(method, count, problem):
    space = SearchSpace.from_dict(PER_LAYER, FULL)
    varied = replace(problem, space=space, first=[space.largest, space.smallest])
    subs = run(make_searcher(method, varied, 7), count)
    assert subs[:2] == [space.largest, space.smallest]
    assert len(set(subs)) == count
    assert all(space.contains(sub) for sub in subs)
    assert sum(len(sub.shapes) > 1 for sub in subs) > count / 2
    random.seed(99)
    assert run(make_searcher(method, varied, 7), count) == subs
    assert run(make_searcher(method, varied, 8), count) != subs
    resumed = make_searcher(method, varied, 7)
    for number, sub in enumerate(subs[:-2]):
        resumed.accept(sub)
        tell(resumed, number, sub)
    for number in (count - 2, count - 1):
        assert resumed.space.build(**resumed.suggest()) == subs[number]
        tell(resumed, number, subs[number])


@pytest.mark.parametrize("method", [Method.surrogate, Method.nsga2, Method.evolution])
def test_better_than_random(method, problem):
    def area(chosen):
        subs = run(make_searcher(chosen, problem, 0), 60)
        points = np.array([values(sub) for sub in subs])
        return hypervolume(points, np.array([6.0, toy_cost(FULL)]))

    assert area(method) > area(Method.random)


@pytest.mark.slow
def test_three_objectives(problem):
    three = replace(
        problem,
        objectives=("val_loss", "num_params", "layers"),
        costs={"num_params": toy_cost, "layers": lambda sub: sub.n_layer},
    )
    for method in SEARCHERS:
        searcher = make_searcher(method, three, 0)
        for number in range(25):
            sub = searcher.space.build(**searcher.suggest())
            result = [*values(sub), sub.n_layer]
            searcher.on_trial_complete(number, searcher.space.genes(sub), result)
        assert len(set(searcher.proposals)) == 25


@pytest.mark.slow
def test_surrogate_with_two_modelled_objectives(problem):
    modelled = replace(problem, costs={})
    searcher = make_searcher(Method.surrogate, modelled, 0)
    assert len(set(run(searcher, 25))) == 25


def test_stratified_covers_the_costs(problem, space):
    subs = run(make_searcher(Method.stratified, replace(problem, first=[]), 0), 40)
    low, high = toy_cost(space.smallest), toy_cost(space.largest)
    quarters = [int(4 * (toy_cost(sub) - low) / (high - low + 1)) for sub in subs]
    assert min(quarters.count(quarter) for quarter in range(4)) >= 5


def test_dimensions_are_ordered(space):
    domains = config_space(space)
    assert type(domains["n_embd"]).__name__ == "Ordinal"
    assert type(domains["n_layer"]).__name__ == "Integer"
    assert domains["head_size"] == 8
