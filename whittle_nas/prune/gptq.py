"""GPTQ: rounding whose error the columns to the right make up for (Frantar et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from whittle_nas.prune.options import Grid
from whittle_nas.prune.rounding import Quantised, fit, rounded
from whittle_nas.prune.solver import Factor, solve


def gptq(weight: Tensor, factor: Factor, grid: Grid) -> Quantised:
    """A matrix (R, C) on a grid that does about the same on its inputs.

    Args:
        weight: (R, C).
        factor: of the C inputs.
        grid: `group_size` divides C; a group's scale is fitted when its first column is reached.
    """
    rule = _Rounding(grid, weight.dtype)
    found = solve(weight.double(), factor, rule, block=grid.group_size)
    scales, zeros = torch.stack(rule.scales, 1), torch.stack(rule.zeros, 1)
    return Quantised(found.to(weight.dtype), scales, zeros)


class _Rounding:
    """A block of the solver is a group, so that errors from the left are in when it is fitted."""

    def __init__(self, grid: Grid, kind: torch.dtype) -> None:
        self._grid, self._kind = grid, kind
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []

    def begin(self, part: Tensor, diagonal: Tensor, first: int) -> None:  # noqa: ARG002
        """See `solver.Rule`."""
        scale, zero = fit(part, self._grid, self._kind)
        self.scales.append(scale)
        self.zeros.append(zero)

    def fix(self, part: Tensor, at: int) -> Tensor:
        """See `solver.Rule`."""
        return rounded(part[:, at], self.scales[-1], self.zeros[-1], self._grid.bits)
