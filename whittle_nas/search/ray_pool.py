"""Evaluations on several devices or machines: workers of Ray that each hold the super-network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from whittle_nas.cluster import Lost, Workers, as_seen_by_a_worker, bound
from whittle_nas.search.evaluation import Evaluation, EvaluationSpec, Evaluator, Job
from whittle_nas.search.trials import Status


class RayPool:
    """Evaluates on one device each, or on as many as the model is placed on."""

    def __init__(
        self,
        spec: EvaluationSpec,
        tokens: torch.Tensor,
        *,
        workers: int,
        address: str | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start the workers and wait until each has loaded the super-network.

        Args:
            spec: what they evaluate.
            tokens: validation text.
            workers: how many; on GPUs, each takes as many as the model is placed on.
            address: a running Ray cluster, see `Workers`.
            warn: takes sentences for the user.

        Raises:
            ConfigError: as `Workers` does, and if a worker can't load the checkpoint.
        """
        placed_on, gpus = as_seen_by_a_worker(spec.placed_on)
        kind = bound(Evaluator, replace(spec, placed_on=placed_on), tokens)
        self._workers = Workers(
            kind, "evaluate", count=workers, gpus=gpus, address=address, warn=warn
        )

    def submit(self, job: Job) -> None:
        """Start an evaluation on an idle worker, or queue it."""
        self._workers.submit(job)

    def next(self) -> tuple[int, Evaluation]:
        """Wait for one evaluation.

        Raises:
            ConfigError: as `Workers` does.
        """
        job, result = self._workers.next()
        if isinstance(result, Lost):
            result = Evaluation(Status.failed, note=result.reason)
        return job.number, result

    def close(self) -> None:
        """End the workers."""
        self._workers.close()
