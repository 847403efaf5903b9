"""Correcting sums of times to whole networks' times, and saying how far off they stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear
from scipy.stats import spearmanr

# Corrections of (blocks, ends, 1), simplest first. A disturbed machine bends the free one far off
# what it measured a minute later, so it has to be clearly better, and sums to be off at all.
_FORMS = (np.array([[1.0, 1.0, 0.0]]), np.eye(3))
_CLEARLY = 0.7
_RANKS = 0.8  # Spearman's; below, parts were timed while the machine was busy
_GOOD_ENOUGH = 0.03


@dataclass(frozen=True)
class Accuracy:
    """How far the table is from whole networks.

    Attributes:
        networks: how many were timed whole.
        sum_error: median |sum - whole| / whole.
        corrected_error: the same after the correction.
        rank_correlation: Spearman's, of corrected sums and whole times.
        coefficients: of blocks, ends and a constant in the correction.
    """

    networks: int
    sum_error: float
    corrected_error: float
    rank_correlation: float
    coefficients: tuple[float, float, float]

    @property
    def ranks(self) -> bool:
        """Whether networks come in the order of their times, as on a quiet machine they do."""
        return self.rank_correlation >= _RANKS


def sums_are_right(parts: np.ndarray, whole: np.ndarray) -> bool:
    """Whether sums of parts, (N, 2), are so near to whole networks, (N,), that they stay."""
    return _median_error(parts.sum(axis=1), whole) <= _GOOD_ENOUGH


def fit_correction(parts: np.ndarray, whole: np.ndarray) -> Accuracy:
    """Correct sums by a factor, or as a * blocks + b * ends + c, where that is clearly better.

    Args:
        parts: (N, 2) milliseconds of blocks and ends.
        whole: (N,) milliseconds of whole networks.
    """
    assert len(whole) >= 4
    columns = np.column_stack([parts, np.ones(len(whole))])
    best, predicted = np.array([1.0, 1.0, 0.0]), parts.sum(axis=1)
    sum_error = error = _median_error(predicted, whole)
    for form in _FORMS:
        found, unseen = _fit(columns @ form.T, whole)
        if (left := _median_error(unseen, whole)) < _CLEARLY * error and error > _GOOD_ENOUGH:
            best, predicted, error = found @ form, unseen, left
    ranks: Any = spearmanr(predicted, whole)
    a, b, c = map(float, best)
    return Accuracy(len(whole), sum_error, error, float(ranks.statistic), (a, b, c))


def _fit(columns: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients, and each network as a fit to all others predicts it, (N,)."""
    predicted = np.empty(len(whole))
    for out in range(len(whole)):
        others = np.arange(len(whole)) != out
        predicted[out] = columns[out] @ _least_deviations(columns[others], whole[others])
    return _least_deviations(columns, whole), predicted


def _median_error(predicted: np.ndarray, whole: np.ndarray) -> float:
    return float(np.median(np.abs(predicted / whole - 1)))


def _least_deviations(columns: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Coefficients >= 0 of least relative absolute deviation; one disturbed network can't bend it.

    Least squares, with weights from the deviations of the round before.
    """
    x, weights = columns / whole[:, None], np.ones(len(whole))
    coefficients = np.zeros(x.shape[1])
    for _ in range(10):
        coefficients = least_squares_at_least_zero(x * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(x @ coefficients - 1), 1e-3))
    return coefficients


def least_squares_at_least_zero(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares with coefficients >= 0; scipy's `nnls` of Python 3.10 may not converge."""
    return lsq_linear(x, y, bounds=(0, np.inf), method="bvls").x
