"""Expected growth of a front's hypervolume. N candidates, M objectives, K points seen so far."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

from whittle_nas.search.pareto import improvement, is_on_front, slabs

_MARGIN = 0.05  # of the front's range, beyond its ends
_SAMPLES = 16
_PROMISING = 200  # candidates that are worth samples


def expected_growth(
    mean: np.ndarray, deviation: np.ndarray, seen: np.ndarray, *, seed: int
) -> np.ndarray:
    """What each candidate promises to add to the hypervolume of the points seen.

    The reference point is the nadir of the front, a little extended.

    Args:
        mean: (N, M) predicted objectives.
        deviation: (N, M) standard deviations, 0 for a cost that is known.
        seen: (K, M).
        seed: of the samples that are drawn where there is no formula.

    Returns:
        Expected volumes (N,), as shares of the front's range.
    """
    front = seen[is_on_front(seen)]
    low, span = front.min(axis=0), np.ptp(front, axis=0)
    scale = np.where(span > 0, span, 1.0)
    mean, deviation, front = (mean - low) / scale, deviation / scale, (front - low) / scale
    reference = np.full(mean.shape[1], 1.0 + _MARGIN)
    uncertain = np.flatnonzero(deviation.any(axis=0))
    if len(uncertain) == 1:
        # The uncertain one last, where slabs leave it open.
        order = [i for i in range(mean.shape[1]) if i != uncertain[0]] + [int(uncertain[0])]
        spread = np.maximum(deviation[:, order[-1]], 1e-12)
        return _one_uncertain(mean[:, order], spread, front[:, order], reference)
    return _sampled(mean, deviation, front, reference, np.random.default_rng(seed))


def _sampled(
    mean: np.ndarray,
    deviation: np.ndarray,
    front: np.ndarray,
    reference: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Mean over samples, for the candidates that promise most if they come out well."""
    promise = improvement(mean - deviation, front, reference)
    best = np.argsort(-promise, kind="stable")[:_PROMISING]
    total = np.zeros(len(mean))
    for _ in range(_SAMPLES):
        drawn = mean[best] + deviation[best] * rng.standard_normal(mean.shape[1])
        total[best] += improvement(drawn, front, reference)
    return total / _SAMPLES


def _one_uncertain(
    mean: np.ndarray, spread: np.ndarray, front: np.ndarray, reference: np.ndarray
) -> np.ndarray:
    """All objectives exact but the last: in each slab, volume times expected height.

    A loss y reaches max(0, t - y) below a level t; in expectation that is the expected
    improvement of y on t.
    """
    total, below = np.zeros(len(mean)), np.zeros(len(mean))
    for _, high, volume in slabs(mean, front, reference):
        z = (high - mean[:, -1]) / spread
        reached = spread * (z * ndtr(z) + np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi))
        total += volume * (reached - below)
        below = reached
    return total
