"""Where evaluations run: in this process, or spread over workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from whittle_nas.cluster import threads_each
from whittle_nas.search.evaluation import Evaluation, EvaluationSpec, Evaluator, Job
from whittle_nas.search.request import Request


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

    @property
    def supernet(self) -> Any:
        """What it slices; gone after `close`."""
        return self._evaluator.supernet

    def close(self) -> None:
        """Let go of the weights: what follows the trials loads models of its own."""
        del self._evaluator


def make_pool(request: Request, warn: Callable[[str], None]) -> Pool:
    """What a search asks for: this process, or Ray's workers.

    Args:
        request: the search.
        warn: takes sentences for the user.

    Raises:
        ConfigError: if the checkpoint, a task or the workers can't be used.
    """
    spec = EvaluationSpec(
        checkpoint_dir=request.checkpoint.path.absolute(),
        metrics=request.quality_metrics,
        num_blocks=request.search_blocks,
        first_blocks=request.halving.first_blocks,
        batch_size=request.batch_size,
        placed_on=request.placed_on,
        dtype=request.dtype,
        tasks=request.tasks,
        calibration=request.calibration,
        library=request.library and request.library.path.absolute(),
    )
    if request.workers == 1 and request.cluster is None:
        return InlinePool(Evaluator(spec, request.tokens))
    from whittle_nas.search.ray_pool import RayPool

    spec = replace(spec, threads=threads_each(request.workers, request.placed_on))
    return RayPool(
        spec, request.tokens, workers=request.workers, address=request.cluster, warn=warn
    )
