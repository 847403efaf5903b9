"""Small weights go: the baseline that all papers have. R rows, C columns."""

from __future__ import annotations

from torch import Tensor

from whittle_nas.prune.masks import kept
from whittle_nas.prune.options import Sparsity


def magnitude(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """A matrix (R, C) without its smallest weights, of the whole matrix or by pattern."""
    return weight * kept(weight.abs(), sparsity, per_row=False)
