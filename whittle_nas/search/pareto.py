"""Dominance, ranks and hypervolume. All objectives are minimised. N points, M objectives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np


def is_on_front(points: np.ndarray) -> np.ndarray:
    """Which points no other point dominates.

    A point dominates another if it is at most equal in every objective and lower in one; of equal
    points none dominates.

    Args:
        points: (N, M), finite.

    Returns:
        Booleans (N,).
    """
    points = np.asarray(points, dtype=float)
    on_front = np.zeros(len(points), dtype=bool)
    # In lexicographic order nothing is dominated by what comes later.
    kept = np.empty((0, points.shape[1] if points.ndim == 2 else 0))
    for at in np.lexsort(points.T[::-1]) if len(points) else ():
        point = points[at]
        no_worse = (kept <= point).all(axis=1)
        if not (no_worse & (kept < point).any(axis=1)).any():
            on_front[at] = True
            kept = np.vstack([kept, point])
    return on_front


def pareto_rank(points: np.ndarray) -> np.ndarray:
    """Number of the front that each point is on, (N,): 0 is the Pareto front, 1 the next."""
    points = np.asarray(points, dtype=float)
    ranks = np.full(len(points), -1)
    front = 0
    while (left := np.flatnonzero(ranks < 0)).size:
        ranks[left[is_on_front(points[left])]] = front
        front += 1
    return ranks


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume that the points dominate, up to the reference point.

    Args:
        points: (N, M); those beyond the reference in an objective count nothing.
        reference: (M,).
    """
    points, reference = np.asarray(points, dtype=float), np.asarray(reference, dtype=float)
    points = points[(points < reference).all(axis=1)] if len(points) else points
    if not len(points):
        return 0.0
    points = points[is_on_front(points)]
    if points.shape[1] == 2:
        points = points[np.argsort(points[:, 0])]
        right = np.append(points[1:, 0], reference[0])
        return float(((right - points[:, 0]) * (reference[1] - points[:, 1])).sum())
    from pymoo.indicators.hv import HV

    volume: Any = HV(ref_point=reference)(points)
    return float(volume)


def improvement(candidates: np.ndarray, front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Hypervolume that each candidate alone would add to a front.

    With three or more objectives the space is cut into slabs between the values of the last
    objective; what a candidate adds to a slab is its height times a volume of one dimension less.
    The time is O(N K^(M - 1)).

    Args:
        candidates: (N, M).
        front: (K, M).
        reference: (M,).

    Returns:
        Volumes (N,).
    """
    if candidates.shape[1] == 1:
        return np.maximum(0.0, min([reference[0], *front[:, 0]]) - candidates[:, 0])
    if candidates.shape[1] == 2:
        return _improvement_2d(candidates, front, reference)
    total = np.zeros(len(candidates))
    for low, high, volume in slabs(candidates, front, reference):
        total += volume * np.maximum(0.0, high - np.maximum(candidates[:, -1], low))
    return total


def slabs(
    candidates: np.ndarray, front: np.ndarray, reference: np.ndarray
) -> Iterator[tuple[float, float, np.ndarray]]:
    """Cut the objectives between the values that the last one takes on a front.

    Args:
        candidates: (N, M); their last objective is not looked at.
        front: (K, M).
        reference: (M,).

    Yields:
        Lower and upper end of each slab, and the volume (N,) that a candidate dominates at one
        value of the last objective inside it, beyond what the front does.
    """
    front = front[front[:, -1] < reference[-1]]
    front = front[np.argsort(front[:, -1], kind="stable")]
    ends = [-np.inf, *front[:, -1], reference[-1]]
    for below, (low, high) in enumerate(itertools.pairwise(ends)):
        if high > low:
            yield low, high, improvement(candidates[:, :-1], front[:below, :-1], reference[:-1])


def _improvement_2d(candidates: np.ndarray, front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Area between each candidate and the staircase of the front, (N,)."""
    front = front[(front < reference).all(axis=1)]
    front = front[np.lexsort(front.T[::-1])]
    lowest = np.minimum.accumulate(front[:, 1])
    front = front[front[:, 1] < np.concatenate([[np.inf], lowest[:-1]])[: len(front)]]
    # Step k of the staircase: x from left[k] to right[k], height top[k].
    left = np.concatenate([[-np.inf], front[:, 0]])
    right = np.concatenate([front[:, 0], [reference[0]]])
    top = np.concatenate([[reference[1]], front[:, 1]])
    x, y = candidates[:, :1], candidates[:, 1:]
    width = np.maximum(0.0, right - np.maximum(left, x))  # (N, K + 1)
    return (width * np.maximum(0.0, top - y)).sum(axis=1)
