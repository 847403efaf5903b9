"""Where evaluations run: in this process, or spread over workers."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from whittle_nas.search.evaluation import Evaluation, Evaluator
from whittle_nas.space.subnetwork import SubNetwork


class Pool(Protocol):
    """Evaluates sub-networks.

    Contract: every submitted sub-network comes back from `next` exactly once, in any order.
    """

    def submit(self, number: int, sub: SubNetwork, *, whole: bool = False) -> None:
        """Start an evaluation, or queue it."""
        ...

    def next(self) -> tuple[int, Evaluation]:
        """Wait for one evaluation: its number and what came out."""
        ...

    def close(self) -> None:
        """Release the workers."""
        ...


class InlinePool:
    """No workers: evaluates in this process when the result is asked for."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._queue: deque[tuple[int, SubNetwork, bool]] = deque()

    def submit(self, number: int, sub: SubNetwork, *, whole: bool = False) -> None:
        """Queue an evaluation."""
        self._queue.append((number, sub, whole))

    def next(self) -> tuple[int, Evaluation]:
        """Evaluate what was queued first."""
        number, sub, whole = self._queue.popleft()
        return number, self._evaluator.evaluate(sub, whole=whole)

    def close(self) -> None:
        """Nothing to release."""
