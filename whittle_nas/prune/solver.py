"""The solver of SparseGPT and GPTQ: fix columns one by one, let those to the right make up for it.

Frantar and Alistarh, "SparseGPT" (2023), algorithm 1; Frantar et al., "GPTQ" (2022), algorithm 1.
R rows, C columns of a weight (outputs, inputs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from whittle_nas.calibration import Gram
from whittle_nas.errors import ConfigError

DAMPING = (
    0.01,
    0.1,
    1.0,
)  # of the mean of the diagonal; the later ones where the first is too little
BLOCK = 128  # columns whose mask is chosen at a time


class Rule(Protocol):
    """What fixed weights may be: zeros in a mask, or integers times a scale."""

    def begin(self, part: Tensor, diagonal: Tensor, first: int) -> None:
        """A block starts: its weights (R, B) by now, its diagonal (B,) of U, its first column."""
        ...

    def fix(self, part: Tensor, at: int) -> Tensor:
        """What column `at` of the block becomes (R,), given the block as it is by now."""
        ...


@dataclass(frozen=True)
class Factor:
    """What the solver needs of the inputs of a layer.

    Attributes:
        upper: (C, C) U with H^-1 = U^T U, H = 2 E[x x^T] plus damping, float64.
        dead: (C,) inputs that were always zero: their weights say nothing.
    """

    upper: Tensor
    dead: Tensor


def factorise(gram: Gram, name: str) -> Factor:
    """Invert and factorise the Hessian of a layer, with as much damping as that takes.

    Args:
        gram: of the layer's inputs.
        name: of the layer, for the message.

    Raises:
        ConfigError: if it stays singular.
    """
    dead = gram.value().diagonal() == 0
    for damping in DAMPING:
        hessian = 2 * gram.mean()
        diagonal = hessian.diagonal()
        diagonal[dead] = 1
        diagonal += damping * diagonal.mean()
        lower, failed = torch.linalg.cholesky_ex(hessian)
        del hessian, diagonal  # two of these at a time: they can be larger than the block
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            return Factor(upper, dead)
    raise ConfigError(
        f"the Hessian of {name} is singular, also when damped by {DAMPING[-1]:g} of its mean: use "
        "more calibration text (--data.num_blocks), or check that layer's inputs"
    )


def solve(weight: Tensor, factor: Factor, rule: Rule, *, block: int = BLOCK) -> Tensor:
    """Fix all columns of a weight (R, C) from left to right.

    Args:
        weight: float64; it stays as it is.
        factor: of its inputs.
        rule: gives what a column becomes; the error is spread over the columns to its right.
        block: columns that are finished before those right of the block see their errors.

    Returns:
        The new weight, (R, C).
    """
    weight, upper = weight.clone(), factor.upper
    weight[:, factor.dead] = 0
    for first in range(0, weight.shape[1], block):
        last = min(first + block, weight.shape[1])
        part, rows = weight[:, first:last], upper[first:last]
        rule.begin(part, rows[:, first:last].diagonal(), first)
        errors = torch.empty_like(part)
        for at in range(last - first):
            column, scale = part[:, at].clone(), rows[at, first + at]
            fixed = rule.fix(part, at)
            errors[:, at] = (column - fixed) / scale
            part[:, at + 1 :] -= errors[:, at : at + 1] * rows[at, first + at + 1 : last]
            part[:, at] = fixed
        weight[:, last:] -= errors @ rows[:, last:]
    return weight
