"""A Gaussian process for one objective. N points, d dimensions."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel


def fit_kernel(x: np.ndarray, y: np.ndarray) -> Any:
    """Hyperparameters of maximal likelihood.

    Args:
        x: (N, d) in [0, 1].
        y: (N,) values.

    Returns:
        A scikit-learn kernel for standardised values: a smooth function of every dimension with a
        length of its own, plus what it can't explain.
    """
    lengths: Any = np.ones(x.shape[1])
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(lengths, (5e-2, 5e1), nu=2.5)
    kernel = kernel + WhiteKernel(1e-3, (1e-6, 1e-1))
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        # A length at its bound means that a dimension does not matter.
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(x, y)
    return process.kernel_


class Posterior:
    """What some values say about all others, for a fixed kernel."""

    def __init__(self, kernel: Any, x: np.ndarray, y: np.ndarray) -> None:
        """Condition on values.

        Args:
            kernel: of `fit_kernel`.
            x: (N, d) in [0, 1].
            y: (N,) values.
        """
        self._kernel, self._x = kernel, x
        self._mean, self._scale = float(y.mean()), float(y.std()) or 1.0
        covariance = kernel(x)
        covariance[np.diag_indices_from(covariance)] += 1e-8
        self._cholesky = cholesky(covariance, lower=True)
        self._weights = cho_solve((self._cholesky, True), (y - self._mean) / self._scale)

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation at points (K, d): two arrays (K,)."""
        cross = self._kernel.k1(x, self._x)  # without the noise, (K, N)
        mean = self._mean + self._scale * (cross @ self._weights)
        explained = solve_triangular(self._cholesky, cross.T, lower=True)
        variance = self._kernel.k1.diag(x) - (explained**2).sum(axis=0)
        return mean, self._scale * np.sqrt(np.maximum(variance, 1e-12))
