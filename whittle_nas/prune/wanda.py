"""Wanda: weights count by their size times the norm of their input (Sun et al. 2024, eq. 1)."""

from __future__ import annotations

from torch import Tensor

from whittle_nas.calibration import SquareSums
from whittle_nas.prune.masks import kept
from whittle_nas.prune.options import Sparsity


def wanda(weight: Tensor, inputs: SquareSums, sparsity: Sparsity) -> Tensor:
    """A matrix (R, C) without its weights of lowest |w_ij| * ||x_j||, row by row or by pattern.

    Args:
        weight: (R, C).
        inputs: squares of the C inputs.
        sparsity: how much goes.
    """
    scores = weight.abs().double() * inputs.norms()
    return weight * kept(scores, sparsity, per_row=True)
