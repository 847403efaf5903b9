"""Grids of integers for groups of weights. R rows, C columns, N = C / group_size groups.

A weight is scale * (q - zero) with q from -2^(b-1) to 2^(b-1) - 1, the layout of packed formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whittle_nas.prune.options import Grid


@dataclass(frozen=True)
class Quantised:
    """A matrix on a grid.

    Attributes:
        weight: (R, C) values on the grid.
        scales: (R, N).
        zeros: (R, N) zero points, whole numbers; 0 on symmetric grids.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor


def fit(weights: Tensor, grid: Grid, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover the weights (R, group_size) of one group, each (R,).

    Scales are numbers of `kind`, the format of the weights, so that an engine that keeps them in it
    multiplies by the same ones.
    """
    steps = 2**grid.bits - 1
    low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    # A hair wider: the largest weight of a symmetric grid is else halfway between two integers.
    scale = (high - low) / steps * (1 + 1e-6)
    scale = scale.to(kind).to(scale.dtype)
    scale = torch.where(scale == 0, 1.0, scale)
    if grid.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (-(2 ** (grid.bits - 1)) - low / scale).round()


def rounded(weights: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest values on a grid; all tensors of one shape, or such that they broadcast."""
    half = 2 ** (bits - 1)
    return scale * ((weights / scale + zero).round().clamp(-half, half - 1) - zero)
