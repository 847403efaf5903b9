"""From trials to the front: selection, hypervolume over time, best per budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from whittle_nas.search.pareto import hypervolume, is_on_front
from whittle_nas.search.trials import Status, Trial
from whittle_nas.space.front import Constraint


def candidates(trials: Sequence[Trial], constraints: Sequence[Constraint]) -> list[Trial]:
    """Trials that may be on the front: wholly evaluated and within all constraints."""
    return [
        trial
        for trial in trials
        if trial.status is Status.complete and all(c.holds(trial.metrics) for c in constraints)
    ]


def points_of(trials: Sequence[Trial], objectives: Sequence[str]) -> np.ndarray:
    """Objectives of trials, (N, M)."""
    values = [[trial.metrics[name] for name in objectives] for trial in trials]
    return np.array(values, dtype=float).reshape(len(trials), len(objectives))


def front_of(
    trials: Sequence[Trial], objectives: Sequence[str], constraints: Sequence[Constraint]
) -> list[Trial]:
    """The trials that no other one dominates, by the last objective; equal points once."""
    found = candidates(trials, constraints)
    points = points_of(found, objectives)
    unique: dict[tuple[float, ...], Trial] = {}
    for trial, point, kept in zip(found, points, is_on_front(points), strict=True):
        if kept:
            unique.setdefault(tuple(point), trial)
    return sorted(
        unique.values(), key=lambda trial: [trial.metrics[name] for name in reversed(objectives)]
    )


def hypervolume_over_time(
    trials: Sequence[Trial], objectives: Sequence[str], constraints: Sequence[Constraint]
) -> list[float]:
    """Share of the box between the best and the worst values that the first n trials dominate.

    Returns:
        One value per trial, rising from 0 to at most 1.
    """
    found = candidates(trials, constraints)
    if not found:
        return [0.0] * len(trials)
    points = points_of(found, objectives)
    low, span = points.min(axis=0), np.ptp(points, axis=0)
    scaled = dict(
        zip((t.number for t in found), (points - low) / np.where(span > 0, span, 1), strict=True)
    )
    reference = np.ones(len(objectives))
    values, front, value = [], np.empty((0, len(objectives))), 0.0
    for trial in trials:
        point = scaled.get(trial.number)
        if point is not None and not (front <= point).all(axis=1).any():
            front = np.vstack([front, point])
            front = front[is_on_front(front)]
            value = hypervolume(front, reference)
        values.append(value)
    return values


def best_per_budget(
    trials: Sequence[Trial],
    objectives: Sequence[str],
    constraints: Sequence[Constraint],
    *,
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
) -> list[tuple[float, Trial]]:
    """The trial with the lowest first objective below each share of the largest cost.

    The cost is the last objective. Shares that no trial keeps to are left out.
    """
    found = candidates(trials, constraints)
    cost, quality = objectives[-1], objectives[0]
    most = max((trial.metrics[cost] for trial in found), default=0.0)
    best = []
    for share in shares:
        within = [trial for trial in found if trial.metrics[cost] <= share * most]
        if within:
            best.append((share, min(within, key=lambda trial: trial.metrics[quality])))
    return best
