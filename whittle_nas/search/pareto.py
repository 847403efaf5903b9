"""Dominance, ranks and hypervolume. All objectives are minimised. N points, M objectives."""

from __future__ import annotations

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


def improvement(
    candidates: np.ndarray, front: np.ndarray, reference: np.ndarray, limit: int | None = None
) -> np.ndarray:
    """Hypervolume that each candidate alone would add to a front.

    Args:
        candidates: (N, M).
        front: (K, M), mutually non-dominated.
        reference: (M,).
        limit: with three or more objectives, where every candidate costs one hypervolume, look only
            at this many candidates: those that lie furthest ahead of the front.

    Returns:
        Volumes (N,).
    """
    candidates = np.asarray(candidates, dtype=float)
    if candidates.shape[1] == 2:
        return _improvement_2d(candidates, np.asarray(front, dtype=float), reference)
    gains = np.zeros(len(candidates))
    ahead = _lead(candidates, front, reference)
    best = np.argsort(-ahead, kind="stable")[:limit]
    before = hypervolume(front, reference)
    for at in best[ahead[best] > 0]:
        gains[at] = hypervolume(np.vstack([front, candidates[at]]), reference) - before
    return gains


def _improvement_2d(candidates: np.ndarray, front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Area between each candidate and the staircase of the front, (N,)."""
    front = front[(front < reference).all(axis=1)]
    front = front[np.argsort(front[:, 0])]
    # Step k of the staircase: x from left[k] to right[k], height top[k].
    left = np.concatenate([[-np.inf], front[:, 0]])
    right = np.concatenate([front[:, 0], [reference[0]]])
    top = np.concatenate([[reference[1]], front[:, 1]])
    x, y = candidates[:, :1], candidates[:, 1:]
    width = np.maximum(0.0, right - np.maximum(left, x))  # (N, K + 1)
    return (width * np.maximum(0.0, top - y)).sum(axis=1)


def _lead(candidates: np.ndarray, front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How far a candidate is ahead of every front point in its best objective, (N,)."""
    inside = (candidates < reference).all(axis=1)
    ahead = (front[None] - candidates[:, None]).max(axis=2).min(axis=1)  # (N, K, M) -> (N,)
    return np.where(inside, ahead, -1.0)
