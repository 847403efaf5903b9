"""Where evaluations run: in this process, or spread over workers."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from whittle_nas.search.evaluation import Evaluation, Evaluator, Job


class Pool(Protocol):
    """Evaluates sub-networks.

    Contract: every submitted job comes back from `next` exactly once, in any order.
    """

    def submit(self, job: Job) -> None:
        """Start an evaluation, or queue it."""
        ...

    def next(self) -> tuple[int, Evaluation]:
        """Wait for one evaluation: the number of its job, and what came out."""
        ...

    def close(self) -> None:
        """Release the workers."""
        ...


class InlinePool:
    """No workers: evaluates in this process when the result is asked for."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._queue: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """Queue an evaluation."""
        self._queue.append(job)

    def next(self) -> tuple[int, Evaluation]:
        """Evaluate what was queued first."""
        job = self._queue.popleft()
        return job.number, self._evaluator.evaluate(job)

    def close(self) -> None:
        """Nothing to release."""
