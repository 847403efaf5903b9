"""What is kept of the activations that enter a layer, batch after batch.

n rows (tokens), C channels. Sums are in float64 whatever the activations are, so that neither the
number of batches nor their order shows.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Statistic(Protocol):
    """Something that is added up over rows (n, C)."""

    def add(self, rows: Tensor) -> None:
        """Take in the rows (n, C) of one batch."""
        ...

    def finite(self) -> bool:
        """Whether it is finite; an activation that is not makes it so."""
        ...


class Sums:
    """Sum of the rows, and their number.

    Attributes:
        total: (C,), float64; None before the first batch.
        count: rows so far.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Take in the rows (n, C) of one batch."""
        part = self._reduced(rows.float())
        self.total = part if self.total is None else self.total.add_(part)
        self.count += len(rows)

    def finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        return self.total is not None and bool(self.total.sum().isfinite())

    def value(self) -> Tensor:
        """The total.

        Raises:
            AssertionError: before the first batch.
        """
        assert self.total is not None
        return self.total

    def _reduced(self, rows: Tensor) -> Tensor:
        return rows.sum(0, dtype=torch.float64)


class SquareSums(Sums):
    """Sum of squares of every channel (C,): the squared norm of its column."""

    def _reduced(self, rows: Tensor) -> Tensor:
        return rows.square().sum(0, dtype=torch.float64)

    def norms(self) -> Tensor:
        """Norm of every channel over all rows (C,), float64."""
        return self.value().sqrt()


class Gram(Sums):
    """Sum of x x^T (C, C): the Hessian of a linear layer's squared error, up to a factor.

    Products are taken in float32 within a batch, and batches are added in float64.
    """

    def _reduced(self, rows: Tensor) -> Tensor:
        return (rows.T @ rows).double()

    def mean(self) -> Tensor:
        """E[x x^T] (C, C), float64."""
        return self.value() / self.count


class UnitGram(Gram):
    """The same of rows of unit length: every token counts alike.

    Models rest their attention on a few tokens, whose inputs of some MLPs are a thousand times
    larger than those of the rest. Alone they would fill the Hessian and its damping, and nothing
    would be said of all others.
    """

    def _reduced(self, rows: Tensor) -> Tensor:
        return super()._reduced(F.normalize(rows, dim=-1))


class Moments:
    """Mean and variance of every channel, by Chan's update of one batch to the ones before.

    Attributes:
        mean: (C,), float64; None before the first batch.
        squares: (C,) sum of squared differences from the mean.
        count: rows so far.
    """

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Take in the rows (n, C) of one batch."""
        rows = rows.double()
        mean, added = rows.mean(0), len(rows)
        squares = (rows - mean).square().sum(0)
        if self.mean is None or self.squares is None:
            self.mean, self.squares, self.count = mean, squares, added
            return
        total = self.count + added
        apart = mean - self.mean  # from the old mean, before it moves
        self.squares = self.squares + squares + apart.square() * (self.count * added / total)
        self.mean = self.mean + apart * (added / total)
        self.count = total

    def finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        return self.squares is not None and bool(self.squares.sum().isfinite())

    def variance(self) -> Tensor:
        """Variance of every channel over all rows (C,), with n and not n - 1; float64."""
        assert self.squares is not None
        return self.squares / self.count
