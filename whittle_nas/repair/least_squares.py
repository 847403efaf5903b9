"""Ridge regression on normal equations: what to add to a matrix so that its outputs come nearer.

n tokens, C inputs of a linear layer, R its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# In units of the mean diagonal of the Gram matrix. With few tokens for many inputs the smallest fit
# noise, so the choice is made on text that was held back.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FEW = 4  # tokens per input


@dataclass(frozen=True)
class NormalEquations:
    """All that least squares needs of n tokens: sums of products, in float64.

    Batches are added in float64. Products within a batch are in float32, but in float64 where the
    tokens are few for so many inputs: then rounding would be large beside the smallest ridges.

    Attributes:
        gram: (C, C) inputs with inputs.
        cross: (C, R) inputs with errors: the wanted outputs less those of the layer as it is.
        power: () sum of the squared errors, which is what the layer as it is gets wrong.
        products: number format of products.
    """

    gram: Tensor
    cross: Tensor
    power: Tensor
    products: torch.dtype

    @classmethod
    def zeros(
        cls, inputs: int, outputs: int, *, tokens: int, device: torch.device
    ) -> NormalEquations:
        """Sums over no tokens yet; `tokens` will come."""
        shapes = (inputs, inputs), (inputs, outputs), ()
        sums = (torch.zeros(s, dtype=torch.float64, device=device) for s in shapes)
        few = tokens < _FEW * inputs
        return cls(*sums, products=torch.float64 if few else torch.float32)

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Add tokens in place: a Gram matrix may be the largest thing in memory.

        Args:
            inputs: (n, C) of the layer.
            errors: (n, R) wanted outputs less those of the layer.
        """
        inputs, errors = inputs.to(self.products), errors.to(self.products)
        self.gram.add_(inputs.mT @ inputs)
        self.cross.add_(inputs.mT @ errors)
        self.power.add_(errors.square().sum(dtype=torch.float64))

    def finite(self) -> bool:
        """Whether no activation was NaN or infinite."""
        return bool((self.gram.diagonal().sum() + self.cross.sum() + self.power).isfinite())


@dataclass(frozen=True)
class Choice:
    """What held-back text says about the change of one layer.

    Attributes:
        source: where it was fitted, "" if the layer stays as it is.
        ridge: in units of the mean diagonal; NaN if the layer stays.
        error: squared error on held-back text, as a share of that of the layer as it is.
        step: (R, C) to add; None if the layer stays.
        singular: nothing could be fitted, whatever the ridge.
    """

    source: str = ""
    ridge: float = math.nan
    error: float = 1.0
    step: Tensor | None = None
    singular: bool = False


def ridge_step(fit: NormalEquations, ridge: float, *, free: int = 0) -> Tensor | None:
    """The change (R, C) of a layer that minimises |errors - inputs change^T|^2 + ridge |change|^2.

    Args:
        fit: tokens to fit.
        ridge: in units of the mean diagonal of the Gram matrix.
        free: so many of the last inputs are not damped, a constant that stands for a bias.

    Returns:
        None if the Gram matrix is still singular with its damping: for instance, all inputs are 0.
    """
    damped = fit.gram.clone()
    diagonal = damped.diagonal()
    last = len(diagonal) - free
    diagonal[:last] += ridge * diagonal[:last].mean()
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        return None
    return torch.cholesky_solve(fit.cross, factor).mT


def error_after(change: Tensor, tokens: NormalEquations) -> float:
    """Squared error, summed over tokens, that a change (R, C) leaves."""
    gained = (change.mT * (2 * tokens.cross - tokens.gram @ change.mT)).sum()
    return float(tokens.power - gained)


def best_step(
    fits: Mapping[str, NormalEquations],
    held_back: NormalEquations,
    *,
    ridges: Sequence[float] = RIDGES,
    free: int = 0,
) -> Choice:
    """The change of a layer that is best on text that it was not fitted to; none if all are worse.

    The first fit's ridges are climbed from the middle one while the error falls; another fit is
    tried from the ridge that was best so far. That is half of the solutions that a grid takes.

    Args:
        fits: tokens to fit, each by the name of what was wanted there, the likeliest first.
        held_back: other tokens, which choose.
        ridges: see `ridge_step`, in rising order.
        free: see `ridge_step`.
    """
    best, before, at = Choice(singular=True), float(held_back.power), len(ridges) // 2
    if before <= 0:
        return Choice()
    for source, fit in fits.items():

        def tried(place: int, source: str = source, fit: NormalEquations = fit) -> Choice:
            step = ridge_step(fit, ridges[place], free=free)
            error = math.inf if step is None else error_after(step, held_back) / before
            return Choice(source, ridges[place], error, step)

        found, place = _climb(tried, at, len(ridges))
        if found.error < best.error:
            best, at = found, place
        elif found.step is not None:
            best = replace(best, singular=False)
    return best


def _climb(tried: Callable[[int], Choice], start: int, count: int) -> tuple[Choice, int]:
    """The least error near a place, going on in each direction while it falls."""
    best, at = tried(start), start
    for step in (1, -1):
        place = start + step
        while 0 <= place < count:
            found = tried(place)
            if found.error >= best.error:
                break
            best, at, place = found, place, place + step
        if at != start:
            break
    return best, at
