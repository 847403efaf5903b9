"""SparseGPT: a mask whose loss the remaining weights make up for (Frantar and Alistarh 2023)."""

from __future__ import annotations

from torch import Tensor

from whittle_nas.prune.masks import kept_in_pattern, kept_of_all
from whittle_nas.prune.options import Sparsity
from whittle_nas.prune.solver import Factor, solve


def sparsegpt(weight: Tensor, factor: Factor, sparsity: Sparsity) -> Tensor:
    """A sparse matrix (R, C) that does about the same on its inputs.

    Args:
        weight: (R, C).
        factor: of the C inputs.
        sparsity: how much goes, of every 128 columns or by pattern.
    """
    return solve(weight.double(), factor, _Mask(sparsity)).to(weight.dtype)


class _Mask:
    """Zeros where w^2 / U_jj^2 is lowest: in a block of columns, or in every m of a row."""

    def __init__(self, sparsity: Sparsity) -> None:
        self._sparsity = sparsity

    def begin(self, part: Tensor, diagonal: Tensor, first: int) -> None:  # noqa: ARG002
        """See `solver.Rule`."""
        self._diagonal = diagonal
        if self._sparsity.pattern is None:
            self._kept = kept_of_all((part / diagonal).square(), self._sparsity.share)

    def fix(self, part: Tensor, at: int) -> Tensor:
        """See `solver.Rule`."""
        pattern = self._sparsity.pattern
        if pattern is None:
            return part[:, at] * self._kept[:, at]
        start = at % pattern[1]
        if start == 0:  # chosen only now, by weights that the columns to the left have changed
            ahead = slice(at, at + pattern[1])
            self._kept = kept_in_pattern((part[:, ahead] / self._diagonal[ahead]).square(), pattern)
        return part[:, at] * self._kept[:, start]
