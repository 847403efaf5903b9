"""One candidate for every part of a model, under budgets: UNAST's integer program (Section 3.3).

R parts (the attention and the MLP of every layer), J candidates of a part, C costs. A solution is
one candidate number per part. HiGHS solves the program, through `scipy.optimize.milp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from whittle_nas.errors import ConfigError

Solution = tuple[int, ...]  # the chosen candidate of every part
# A limit on a sum of many floats must not be missed by the last bit of the sum.
_SLACK = 1e-9
# Variables times earlier solutions up to which the optimum is proven. Beyond, the best solution
# of the root node is taken, within one per cent: proofs take minutes each from the thirtieth
# solution on, and what follows is measured and ranked again anyway.
_PROVEN, _NEAR = 8_000, 0.01


@dataclass(frozen=True)
class Program:
    """Scores and costs of all candidates.

    Attributes:
        scores: for each part, the score of each of its candidates (lower is better); a candidate
            with an infinite score is never chosen.
        costs: for each named cost, the same layout.
        budgets: largest sum of each named cost, `offsets` included.
        offsets: what a cost holds besides the parts (embedding, head).
        never: solutions that are no network, whatever their costs.
    """

    scores: Sequence[Sequence[float]]
    costs: Mapping[str, Sequence[Sequence[float]]]
    budgets: Mapping[str, float]
    offsets: Mapping[str, float]
    never: Sequence[Solution] = ()

    @property
    def num_parts(self) -> int:
        """R."""
        return len(self.scores)

    def score(self, solution: Solution) -> float:
        """Sum of the chosen candidates' scores."""
        return sum(part[j] for part, j in zip(self.scores, solution, strict=True))

    def cost(self, name: str, solution: Solution) -> float:
        """Sum of one cost over the chosen candidates, with its offset."""
        chosen = zip(self.costs[name], solution, strict=True)
        return self.offsets.get(name, 0.0) + sum(part[j] for part, j in chosen)


def overlap(one: Solution, other: Solution) -> int:
    """Number of parts in which two solutions agree."""
    return sum(a == b for a, b in zip(one, other, strict=True))


def solve(
    program: Program,
    *,
    earlier: Sequence[Solution] = (),
    max_overlap: float = 1.0,
    near: Solution | None = None,
    max_changes: int | None = None,
) -> Solution | None:
    """The best solution of the program.

    Args:
        program: scores, costs and budgets.
        earlier: solutions that it may not resemble too much.
        max_overlap: largest share of the parts in which it agrees with an earlier one (UNAST,
            Equation 5); 1 allows anything but the same again.
        near: a solution that it must stay close to.
        max_changes: largest number of parts in which it differs from `near`.

    Returns:
        One candidate per part, or None if no solution is allowed. It is optimal while the program
        is small (`_PROVEN`), as a first solution always is, else within one per cent or the best
        that one node of the search gave, among candidates that can be that near.
    """
    columns = _columns(program)
    rows = [_one_each(program, columns)]
    rows += [
        _row(columns, program.costs[name], most=limit - program.offsets.get(name, 0.0))
        for name, limit in program.budgets.items()
    ]
    most = min(int(max_overlap * program.num_parts + _SLACK), program.num_parts - 1)
    rows += [_agreement(columns, program, other, most=most) for other in earlier]
    different = program.num_parts - 1
    rows += [_agreement(columns, program, other, most=different) for other in program.never]
    if near is not None and max_changes is not None:
        rows.append(_agreement(columns, program, near, least=program.num_parts - max_changes))
    scores = np.array([program.scores[part][j] for part, j in columns])
    proven = not earlier or len(columns) * (1 + len(earlier)) <= _PROVEN
    options = {"mip_rel_gap": 0.0} if proven else {"mip_rel_gap": _NEAR, "node_limit": 1}
    for share in (np.inf,) if proven else (_NEAR, 10 * _NEAR, np.inf):
        kept = _promising(scores, rows, share)
        found = milp(
            scores[kept],
            integrality=np.ones(len(kept)),
            bounds=Bounds(0, 1),
            constraints=[_columns_of(row, kept) for row in rows],
            options=options,
        )
        if found.x is not None:
            return tuple(columns[at][1] for at in kept[found.x > 0.5])
    return None


def solve_many(
    program: Program,
    count: int,
    *,
    max_overlap: float = 0.7,
    near: Solution | None = None,
    max_changes: int | None = None,
) -> list[Solution]:
    """Up to `count` solutions, best first, each different enough from all before it.

    Args:
        program: scores, costs and budgets.
        count: K, how many are wanted; fewer if no more exist.
        max_overlap: as in `solve`.
        near: as in `solve`.
        max_changes: as in `solve`.

    Raises:
        ConfigError: if not even one exists; it names the nearest attainable budget.
    """
    found: list[Solution] = []
    for _ in range(count):
        solution = solve(
            program, earlier=found, max_overlap=max_overlap, near=near, max_changes=max_changes
        )
        if solution is None:
            break
        found.append(solution)
    if not found:
        raise ConfigError(f"--constraints: {nearest(program)}")
    return found


def apart(solutions: Iterable[Solution], count: int, *, max_overlap: float) -> list[Solution]:
    """The first `count` solutions of which none agrees too much with one before it.

    Args:
        solutions: best first.
        count: how many are wanted.
        max_overlap: as in `solve`.
    """
    found: list[Solution] = []
    for one in solutions:
        most = int(max_overlap * len(one) + _SLACK)
        if len(found) < count and all(overlap(one, other) <= most for other in found):
            found.append(one)
    return found


def nearest(program: Program) -> str:
    """Why no solution exists: the smallest value that each budget could have."""
    for name, limit in program.budgets.items():
        least = _least(program, name, {})
        if least > limit:
            return f"no network has {name} <= {limit:.6g}; the smallest has {least:.6g}"
    for name, limit in program.budgets.items():
        others = {other: value for other, value in program.budgets.items() if other != name}
        least = _least(program, name, others)
        if np.isfinite(least):
            return (
                f"no network satisfies all budgets; with the others as they are, {name} can be "
                f"{least:.6g} at the lowest (asked: {limit:.6g})"
            )
    return "no network satisfies the budgets together; relax one of them"


def _least(program: Program, name: str, budgets: Mapping[str, float]) -> float:
    """Smallest sum of one cost under other budgets; infinite if there is no solution."""
    allowed = [
        [c if np.isfinite(s) else np.inf for s, c in zip(scores, costs, strict=True)]
        for scores, costs in zip(program.scores, program.costs[name], strict=True)
    ]
    solution = solve(replace(program, scores=allowed, budgets=budgets))
    return np.inf if solution is None else program.cost(name, solution)


def _promising(
    scores: NDArray[np.float64], rows: Sequence[LinearConstraint], share: float
) -> NDArray[np.int64]:
    """Variables without which no solution is missed that comes near to the relaxation's score.

    A variable's reduced cost is what it adds to the relaxation at least. Two thirds of the
    variables and four fifths of the time go.

    Args:
        scores: of the variables.
        rows: the first ones are equalities.
        share: how near, as a share of the relaxation's score.
    """
    every = np.arange(len(scores))
    if not np.isfinite(share):
        return every
    equal, *others = rows
    lower = [row for row in others if np.all(np.isfinite(row.lb))]
    matrix = sparse.vstack([*(row.A for row in others), *(-row.A for row in lower)])
    most = np.concatenate(
        [np.atleast_1d(v) for v in (*(r.ub for r in others), *(-r.lb for r in lower))]
    )
    ones = np.ones(equal.A.shape[0])
    found = linprog(scores, A_ub=matrix, b_ub=most, A_eq=equal.A, b_eq=ones, bounds=(0, 1))
    if found.x is None:
        return every
    duals = equal.A.T @ found.eqlin.marginals + matrix.T @ found.ineqlin.marginals
    return every[scores - duals <= share * abs(found.fun)]


def _columns_of(row: Any, kept: NDArray[np.int64]) -> LinearConstraint:
    return LinearConstraint(row.A[:, kept], row.lb, row.ub)


def _columns(program: Program) -> list[tuple[int, int]]:
    """(part, candidate) of every variable: of candidates that may be chosen."""
    return [
        (part, j)
        for part, scores in enumerate(program.scores)
        for j, score in enumerate(scores)
        if np.isfinite(score)
    ]


def _one_each(program: Program, columns: Sequence[tuple[int, int]]) -> LinearConstraint:
    parts = [part for part, _ in columns]
    ones = np.ones(len(columns))
    matrix = sparse.csr_matrix(
        (ones, (parts, range(len(columns)))), shape=(program.num_parts, len(columns))
    )
    return LinearConstraint(matrix, 1, 1)


def _row(
    columns: Sequence[tuple[int, int]], values: Sequence[Sequence[float]], *, most: float
) -> LinearConstraint:
    row: NDArray[np.float64] = np.array([values[part][j] for part, j in columns], dtype=np.float64)
    # Costs of 1e9 parameters next to scores of 1e-3 nats: the row is scaled to its limit.
    scale = max(abs(most), float(np.abs(row).max()), np.finfo(float).tiny)
    return LinearConstraint(sparse.csr_matrix(row / scale), -np.inf, most / scale + _SLACK)


def _agreement(
    columns: Sequence[tuple[int, int]],
    program: Program,
    other: Solution,
    *,
    least: float = 0,
    most: float = np.inf,
) -> LinearConstraint:
    row = np.array([float(other[part] == j) for part, j in columns])
    return LinearConstraint(sparse.csr_matrix(row), least, min(most, program.num_parts))
