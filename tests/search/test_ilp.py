"""The integer program against every possible solution of small libraries."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from whittle_nas.errors import ConfigError
from whittle_nas.search.ilp import Program, apart, overlap, solve, solve_many


def _program(seed: int, *, parts: int = 5, share: float = 0.6) -> Program:
    """Random candidates whose first one is the original: score 0 and the largest cost."""
    rng = random.Random(seed)
    counts = [rng.randint(2, 4) for _ in range(parts)]
    scores = [[0.0] + [rng.random() for _ in range(n - 1)] for n in counts]
    sizes = [[100.0] + [float(rng.randint(0, 99)) for _ in range(n - 1)] for n in counts]
    times = [[1.0] + [rng.random() for _ in range(n - 1)] for n in counts]
    budgets = {"num_params": 50 + share * 100 * parts, "latency_ms": 1.1 * share * parts}
    return Program(
        scores, {"num_params": sizes, "latency_ms": times}, budgets, {"num_params": 50.0}
    )


def _allowed(program: Program) -> list[tuple[int, ...]]:
    """All solutions within the budgets, best first."""
    every = itertools.product(*(range(len(part)) for part in program.scores))
    fitting = [
        s for s in every if all(program.cost(n, s) <= limit for n, limit in program.budgets.items())
    ]
    return sorted(fitting, key=program.score)


@pytest.mark.parametrize("seed", range(12))
def test_the_best_solution_is_that_of_brute_force(seed: int) -> None:
    program = _program(seed)
    allowed = _allowed(program)
    assert solve(program) == (allowed[0] if allowed else None)


@pytest.mark.parametrize("seed", range(6))
def test_every_further_solution_is_the_best_that_differs_enough(seed: int) -> None:
    program = _program(seed)
    found = solve_many(program, 6, max_overlap=0.6)
    expected: list[tuple[int, ...]] = []
    for solution in _allowed(program):
        if len(expected) < 6 and all(overlap(solution, e) <= 3 for e in expected):
            expected.append(solution)
    assert [program.score(s) for s in found] == pytest.approx([program.score(s) for s in expected])
    assert solve_many(program, 6, max_overlap=0.6) == found


def test_any_overlap_still_gives_different_solutions() -> None:
    program = _program(3)
    found = solve_many(program, 6, max_overlap=1.0)
    assert [program.score(s) for s in found] == pytest.approx(
        [program.score(s) for s in _allowed(program)[:6]]
    )
    assert len(set(found)) == 6


def test_what_is_no_network_is_never_a_solution() -> None:
    program = _program(3)
    first, second = _allowed(program)[:2]
    assert solve(replace(program, never=[first])) == second
    costs = {"num_params": [[1.0, 0.0]] * 2}
    nothing = Program([[0.0, 0.0]] * 2, costs, {"num_params": 0.5}, {}, never=[(1, 1)])
    with pytest.raises(ConfigError, match=r"num_params <= 0.5; the smallest has 1"):
        solve_many(nothing, 1)


def test_the_best_of_several_lists_differ_enough() -> None:
    listed = [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)]
    assert apart(listed, 3, max_overlap=0.5) == [(0, 0, 0), (0, 1, 1)]
    assert apart(listed, 3, max_overlap=1.0) == listed[:3]


@pytest.mark.parametrize("changes", [0, 1, 2])
def test_changes_from_a_solution_are_bounded(changes: int) -> None:
    program = _program(3)
    near = _allowed(program)[-1]
    found = solve(program, near=near, max_changes=changes)
    close = [s for s in _allowed(program) if overlap(s, near) >= 5 - changes]
    assert found == close[0]


def test_a_candidate_without_a_finite_score_is_never_chosen() -> None:
    program = _program(1)
    best = solve(program)
    assert best is not None
    scores = [list(part) for part in program.scores]
    scores[0][best[0]] = np.inf
    other = solve(Program(scores, program.costs, program.budgets, program.offsets))
    assert other is not None
    assert other[0] != best[0]


def test_a_budget_that_nothing_meets_names_the_smallest_value() -> None:
    program = _program(0)
    smallest = 50 + sum(min(part) for part in program.costs["num_params"])
    asked = Program(program.scores, program.costs, {"num_params": 40.0}, program.offsets)
    with pytest.raises(ConfigError, match=rf"num_params <= 40; the smallest has {smallest:.6g}"):
        solve_many(asked, 1)


def test_budgets_that_exclude_each_other_name_what_one_can_reach() -> None:
    costs = {"num_params": [[0.0, 1.0]], "latency_ms": [[1.0, 0.0]]}
    program = Program([[0.0, 0.0]], costs, {"num_params": 0.5, "latency_ms": 0.5}, {})
    with pytest.raises(ConfigError, match="num_params can be 1 at the lowest"):
        solve_many(program, 1)
