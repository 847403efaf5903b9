"""Rounding to nearest: every group of weights on its own grid, whatever the inputs are."""

from __future__ import annotations

from torch import Tensor

from whittle_nas.prune.options import Grid
from whittle_nas.prune.rounding import Quantised, fit, rounded


def rtn(weight: Tensor, grid: Grid) -> Quantised:
    """A matrix (R, C), rounded.

    Args:
        weight: (R, C).
        grid: `group_size` divides C.
    """
    groups = weight.double().unflatten(1, (-1, grid.group_size))  # (R, N, group_size)
    scales, zeros = (
        x.view(groups.shape[:2]) for x in fit(groups.flatten(0, 1), grid, weight.dtype)
    )
    found = rounded(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), grid.bits)
    return Quantised(found.flatten(1).to(weight.dtype), scales, zeros)
