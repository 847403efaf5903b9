"""Which weights stay, from a score per weight. R rows, C columns."""

from __future__ import annotations

import torch
from torch import Tensor

from whittle_nas.prune.options import Sparsity


def kept_of_all(scores: Tensor, share: float) -> Tensor:
    """All but the share of lowest scores of a whole tensor; equal scores keep their order."""
    return kept_per_row(scores.flatten()[None], share).view(scores.shape)


def kept_per_row(scores: Tensor, share: float) -> Tensor:
    """All but the share of lowest scores of every row (R, C), as booleans."""
    order = scores.argsort(dim=-1, stable=True)
    gone = order[:, : int(share * scores.shape[-1] + 1e-6)]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, gone, False)


def kept_in_pattern(scores: Tensor, pattern: tuple[int, int]) -> Tensor:
    """The n highest of every m consecutive scores of a row (R, C), as booleans."""
    kept, of = pattern
    groups = scores.reshape(-1, of)
    return kept_per_row(groups, (of - kept) / of).view(scores.shape)


def kept(scores: Tensor, sparsity: Sparsity, *, per_row: bool) -> Tensor:
    """A mask by pattern, or by share of every row or of the whole matrix."""
    if sparsity.pattern is not None:
        return kept_in_pattern(scores, sparsity.pattern)
    return (kept_per_row if per_row else kept_of_all)(scores, sparsity.share)
