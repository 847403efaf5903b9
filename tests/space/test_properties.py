"""Properties of sub-networks, spaces, grids, fronts and limits that hold for whatever is drawn."""

import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.conftest import uniform
from whittle_nas.errors import ConfigError
from whittle_nas.reading import read_json, read_yaml
from whittle_nas.search.pareto import hypervolume, improvement, is_on_front, pareto_rank
from whittle_nas.space import Block, SearchSpace, SubNetwork
from whittle_nas.space.front import (
    Constraint,
    Front,
    FrontEntry,
    parse_constraints,
    pick_entry,
    read_front,
)
from whittle_nas.space.samplers import Grid, bin_of, build_grid
from whittle_nas.space.subnetwork import SIZES

few = settings(max_examples=60)  # of the profile in conftest.py

FULL = uniform(16, 8, 4, 8, 24, 4, of=4)
METRICS = ("val_loss", "num_params", "latency_ms", "1 - arc_easy.acc_norm")


def domain(limit: int) -> st.SearchStrategy:
    """One dimension in any of its forms."""
    low = st.one_of(st.integers(1, limit), st.just("half"))
    return st.one_of(
        st.just("full"),
        st.lists(st.integers(1, limit), min_size=1, max_size=4),
        st.fixed_dictionaries({"min": low}, optional={"step": st.integers(1, 3)}),
        st.fixed_dictionaries({"min": st.integers(1, limit), "factor": st.integers(2, 4)}),
        st.fixed_dictionaries({"min": low, "log_uniform": st.booleans()}),
        st.just({"step": "auto"}),
    )


@st.composite
def spaces(draw) -> SearchSpace:
    limits = FULL.summary()
    spec = draw(st.fixed_dictionaries({}, optional={n: domain(v) for n, v in limits.items()}))
    if draw(st.booleans()):
        spec.pop("intermediate_size", None)
        spec["mlp_ratio"] = draw(st.lists(st.floats(0.05, 1.5), min_size=1, max_size=3))
    try:
        return SearchSpace.from_dict(spec, FULL)
    except ConfigError as error:
        assume("query groups" not in str(error))  # no heads and groups that go together
        raise


sizes = st.integers(0, 10**6)
forms = st.sampled_from(["", "linear", "2:4", "8bit"])
blocks = st.none() | st.builds(Block, sizes, sizes, sizes, sizes, forms, forms)
shapes = st.lists(blocks, min_size=4, max_size=4).map(tuple)
subnetworks = st.builds(
    uniform, *[st.integers(1, 10**6)] * 5, st.integers(1, 4), of=st.just(4)
) | st.builds(SubNetwork, st.integers(1, 10**6), shapes)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside),
    max_leaves=12,
)


def cost(sub: SubNetwork) -> float:
    kept = (b for b in sub.blocks if b)
    return float(sub.n_embd * sum(4 * b.n_head * b.head_size + b.intermediate_size for b in kept))


read_grid = partial(Grid.from_dict, cost=cost, layer_order=range(4))


def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
    """What is read, or the one kind of error that it may end in."""
    try:
        return read(*arguments)
    except ConfigError as error:
        return error


# Sub-networks


@few
@given(subnetworks)
def test_a_subnetwork_survives_its_plain_form(sub):
    assert SubNetwork.from_dict(json.loads(json.dumps(sub.to_dict())), range(4)) == sub
    for name, size in (sub.sizes() or {}).items():
        assert f"{name}={size}" in str(sub).split()


@pytest.mark.slow
@few
@given(plain | st.fixed_dictionaries(dict.fromkeys(SIZES, plain)))
def test_no_other_values_become_a_subnetwork(values):
    sub = attempt(SubNetwork.from_dict, values, range(4))
    assert isinstance(sub, ConfigError) or sub.sizes() == values


# Search spaces


@pytest.mark.slow
@few
@given(spaces())
def test_a_space_lists_what_it_counts_and_holds(space):
    members = list(space.members())
    assert len(set(members)) == len(members) == space.num_members()
    assert all(space.contains(member) for member in members)
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())), FULL) == space


@few
@given(spaces(), subnetworks)
def test_a_space_holds_nothing_else(space, sub):
    wanted = sub.summary().values()
    limits = FULL.summary().values()
    near = uniform(*[1 + int(v) % w for v, w in zip(wanted, limits, strict=True)], of=4)
    assert space.contains(near) == (near in set(space.members()))


@pytest.mark.slow
@few
@given(spaces())
def test_every_member_lies_between_the_ends(space):
    assert space.contains(space.smallest)
    assert space.contains(space.largest)
    low, high = space.smallest.summary(), space.largest.summary()
    for sizes in (member.summary() for member in space.members()):
        for name in SIZES:
            if name != "n_query_groups" or space.n_query_groups is None:
                assert low[name] <= sizes[name] <= high[name]
        if sizes["n_head"] == low["n_head"]:
            assert low["n_query_groups"] <= sizes["n_query_groups"]
        if sizes["n_head"] == high["n_head"]:
            assert sizes["n_query_groups"] <= high["n_query_groups"]


@few
@given(spaces(), st.integers(0, 2**16))
def test_genes_and_neighbours_stay_in_the_space(space, seed):
    sub = space.sample(random.Random(seed))
    assert space.contains(sub)
    assert space.sample(random.Random(seed)) == sub
    assert space.build(**space.genes(sub)) == sub
    near = space.neighbours(sub)
    assert len(set(near)) == len(near)
    for other in near:
        assert space.contains(other)
        assert other != sub


@few
@given(st.dictionaries(st.sampled_from([*SIZES, "mlp_ratio", "depth"]), plain) | plain)
def test_a_wrong_space_is_one_sentence(spec):
    space = attempt(SearchSpace.from_dict, spec, FULL)
    if not isinstance(space, ConfigError):
        assert space.contains(space.smallest)
        assert space.contains(space.largest)


@few
@given(st.floats(0, 1e-3))
def test_a_ratio_just_beyond_the_model_is_the_model(beyond):
    full = uniform(4096, 32, 8, 128, 14336, 32, of=32)
    space = SearchSpace.from_dict({"mlp_ratio": [3.5 + beyond]}, full)
    assert list(space.members()) == [full]


# Grids


@few
@given(spaces(), st.integers(1, 8), st.integers(0, 99), st.booleans())
def test_a_grid_has_a_member_per_bin(space, bins, seed, scored):
    options = {"seed": seed, "num_bins": bins, "trials_per_bin": 50, "candidates_per_bin": 3}
    score = (lambda sub: -float(sub.n_layer)) if scored else None
    grid = build_grid(space, cost, score=score, **options)
    numbers = [bin_of(member.cost, grid.edges) for member in grid.members]
    assert numbers == sorted(set(numbers))
    assert sorted([*numbers, *grid.empty_bins]) == list(range(bins))
    for member, number in zip(grid.members, numbers, strict=True):
        assert space.contains(member.sub)
        assert member.cost == cost(member.sub)
        assert grid.edges[number] <= member.cost <= grid.edges[-1]
    assert build_grid(space, cost, score=score, **options) == grid
    assert (
        Grid.from_dict(json.loads(json.dumps(grid.to_dict())), cost=cost, layer_order=range(4))
        == grid
    )


@few
@given(plain | st.lists(st.fixed_dictionaries(dict.fromkeys(SIZES, plain)), max_size=2))
def test_a_wrong_grid_is_one_sentence(spec):
    grid = attempt(read_grid, spec)
    if not isinstance(grid, ConfigError):
        assert [member.cost for member in grid.members] == sorted(map(cost, grid.subs))


# Dominance, against the definitions

points = st.integers(2, 3).flatmap(
    lambda size: st.lists(st.tuples(*[st.integers(0, 5)] * size), min_size=1, max_size=12)
).map(lambda rows: np.array(rows, dtype=float))  # fmt: skip


def beaten(point: np.ndarray, others: np.ndarray) -> bool:
    return any((o <= point).all() and (o < point).any() for o in others)


def cells(rows: np.ndarray, end: int) -> int:
    """Unit cubes below `end` that integer points dominate: their volume, by counting."""
    corners = np.stack(np.meshgrid(*[np.arange(end)] * rows.shape[1]), -1)
    corners = corners.reshape(-1, 1, rows.shape[1])
    return int((rows[None] <= corners).all(axis=2).any(axis=1).sum())


@few
@given(points)
def test_the_front_is_what_nothing_beats(rows):
    assert list(is_on_front(rows)) == [not beaten(row, rows) for row in rows]


@few
@given(points)
def test_ranks_peel_off_fronts(rows):
    ranks, left = pareto_rank(rows), np.arange(len(rows))
    for rank in range(int(ranks.max()) + 1):
        front = [i for i in left if not beaten(rows[i], rows[left])]
        assert sorted(front) == sorted(np.flatnonzero(ranks == rank))
        left = np.array([i for i in left if i not in front], dtype=int)
    assert not len(left)


@few
@given(points, st.integers(1, 6))
def test_volume_is_the_number_of_cells(rows, end):
    assert hypervolume(rows, np.full(rows.shape[1], end)) == pytest.approx(cells(rows, end))


@few
@given(points, st.integers(1, 6))
def test_improvement_is_what_a_point_adds(rows, end):
    candidates, rest = rows[:3], rows[3:]
    front = rest[is_on_front(rest)]
    added = [cells(np.vstack([rest, c]), end) - cells(rest, end) for c in candidates]
    found = improvement(candidates, front, np.full(rows.shape[1], float(end)))
    assert found == pytest.approx(np.array(added, dtype=float))


# Limits

limits = st.builds(
    Constraint,
    st.sampled_from(METRICS),
    st.sampled_from(["<=", "<", ">=", ">"]),
    st.floats(-1e12, 1e12).map(lambda value: float(f"{value:.12g}")),
)


@few
@given(st.lists(limits, max_size=4))
def test_limits_survive_their_text(found):
    assert parse_constraints(", ".join(map(str, found))) == tuple(found)
    assert parse_constraints([str(limit) for limit in found]) == tuple(found)


@few
@given(st.text(max_size=40) | st.text(alphabet="ab<>=,. 0123e-+nif_", max_size=20))
def test_other_text_is_one_sentence(text):
    found = attempt(parse_constraints, text)
    if isinstance(found, ConfigError):
        assert "--constraints" in str(found)
        return
    for limit in found:
        assert math.isfinite(limit.limit)
        assert limit.metric.strip()


@few
@given(limits, st.floats(-1e13, 1e13))
def test_a_limit_holds_where_nothing_exceeds_it(limit, value):
    outcomes = {
        "<=": value <= limit.limit, "<": value < limit.limit,
        ">=": value >= limit.limit, ">": value > limit.limit,
    }  # fmt: skip
    assert limit.holds({limit.metric: value}) == outcomes[limit.relation]
    assert (limit.excess(value) > 0) == (not outcomes[limit.relation])


# front.json


@st.composite
def fronts(draw) -> Front:
    numbers = draw(st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True))
    values = st.fixed_dictionaries(
        {name: st.floats(-1e9, 1e9) | st.integers(0, 10**12) for name in METRICS}
    )
    entries = tuple(FrontEntry(n, draw(subnetworks), draw(values)) for n in numbers)
    return Front(tuple(draw(st.permutations(METRICS))[:2]), entries, draw(st.text(max_size=9)))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files") / "front.json"


@few
@given(fronts())
def test_a_front_survives_its_file(path, front):
    path.write_text(front.dump(), encoding="utf-8")
    found = read_front(path, range(4))
    assert found.dump() == front.dump()
    assert found.entries == front.entries


@few
@given(fronts(), st.lists(limits, min_size=1, max_size=3))
def test_the_best_entry_under_limits(front, asked):
    fitting = [e for e in front.entries if all(limit.holds(e.metrics) for limit in asked)]
    text = ", ".join(map(str, asked))
    if not fitting:
        with pytest.raises(ConfigError, match="satisfies"):
            pick_entry(front, pick=text)
        return
    named = {limit.metric for limit in asked}
    best = next((name for name in front.objectives if name not in named), front.objectives[0])
    chosen = pick_entry(front, pick=text)
    assert chosen in fitting
    assert chosen.metrics[best] == min(entry.metrics[best] for entry in fitting)


@few
@given(fronts(), st.data())
def test_a_front_with_something_else_in_it_is_one_sentence(path, front, data):
    spec = json.loads(front.dump())
    entry = spec["front"][0]
    holder = data.draw(st.sampled_from([spec, entry, entry["metrics"], entry["subnetwork"]]))
    holder[data.draw(st.sampled_from(sorted(holder)))] = data.draw(plain)
    path.write_text(json.dumps(spec), encoding="utf-8")
    found = attempt(read_front, path, range(4))
    if isinstance(found, ConfigError):
        assert str(path) in str(found)
        return
    assert read_front(path, range(4)).dump() == found.dump()
    assert pick_entry(found, index=found.entries[0].index) == found.entries[0]


@few
@given(
    st.binary(max_size=60) | st.text(alphabet="[]{}:,-&*!|>'\"0a \n", max_size=30).map(str.encode)
)
def test_any_bytes_are_values_or_one_sentence(path, content):
    path.write_bytes(content)
    for read in (read_yaml, read_json, lambda path: read_front(path, range(4))):
        found = attempt(read, path)
        assert not isinstance(found, ConfigError) or str(path) in str(found)
