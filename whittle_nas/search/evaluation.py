"""The quality of one sub-network, the same for every trial and in every worker process."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from whittle_nas.candidates.library import open_library
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.batching import is_out_of_memory
from whittle_nas.evaluate.perplexity import nats_per_block
from whittle_nas.repair.engine import repair
from whittle_nas.search.halving import FIRST
from whittle_nas.search.objectives import QUALITY, REPAIR
from whittle_nas.search.options import TaskOptions
from whittle_nas.search.trials import Status
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
from whittle_nas.weights.patch import Patch
from whittle_nas.weights.placement import spelled


@dataclass(frozen=True)
class EvaluationSpec:
    """Everything that a process needs to evaluate sub-networks.

    Attributes:
        checkpoint_dir: the super-network.
        metrics: wanted quality metrics, see `objectives`.
        num_blocks: blocks of a trial; None: all.
        first_blocks: blocks after which a trial may be stopped; 0: none.
        batch_size: blocks per forward pass; None: chosen for the device.
        placed_on: devices of the model, see `weights.placement`; a worker numbers its GPUs from 0.
        dtype: number format of the weights; None: as stored.
        threads: CPU threads of torch; None: as they are.
        tasks: how lm-eval tasks are asked.
        calibration: (N, T + 1) text on which sub-networks are repaired first; None: they are not.
        library: directory of the candidates that they are made of; None: plain slices.
    """

    checkpoint_dir: Path
    metrics: tuple[str, ...]
    num_blocks: int | None = None
    first_blocks: int = 0
    batch_size: int | None = None
    placed_on: tuple[torch.device, ...] = (torch.device("cpu"),)
    dtype: torch.dtype | None = None
    threads: int | None = None
    tasks: TaskOptions = field(default_factory=TaskOptions)
    calibration: torch.Tensor | None = None
    library: Path | None = None


@dataclass(frozen=True)
class Job:
    """One evaluation.

    Attributes:
        number: names it.
        sub: sizes.
        stop_above: loss on the first blocks beyond which the rest is left out.
        whole: use all blocks and all questions, not only those of a trial.
    """

    number: int
    sub: SubNetwork
    stop_above: float = math.inf
    whole: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        status: `failed` if a metric is not finite or memory ran out.
        metrics: values by name.
        blocks: blocks that the loss is a mean of.
        seconds: time that it took.
        note: why it failed.
    """

    status: Status
    metrics: dict[str, float] = field(default_factory=dict)
    blocks: int = 0
    seconds: float = 0.0
    note: str = ""


class Evaluator:
    """Holds a super-network and validation text; runs in this process or in a worker."""

    def __init__(self, spec: EvaluationSpec, tokens: torch.Tensor) -> None:
        """Load the weights, and the tasks if there are any.

        Args:
            spec: what to evaluate and where.
            tokens: (N, T + 1) validation text in blocks; N may be 0 if no metric needs text.

        Raises:
            ConfigError: for a checkpoint or a task that can't be used.
        """
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.spec = spec
        self.supernet = load_supernet(spec.checkpoint_dir, device=spec.placed_on, dtype=spec.dtype)
        self.tokens = tokens
        self._library = spec.library and open_library(
            spec.library, open_checkpoint(spec.checkpoint_dir)
        )
        self._score: Any = None
        if names := [name for name in spec.metrics if name not in (*QUALITY, FIRST, REPAIR)]:
            from whittle_nas.search.tasks import TaskScorer  # lm-eval takes seconds to import

            self._score = TaskScorer(
                names, spec.checkpoint_dir, self.supernet.config, spec.tasks, spec.batch_size
            )

    def ready(self) -> bool:
        """Answers when the constructor has ended: workers are waited for with it."""
        return True

    def evaluate(self, job: Job) -> Evaluation:
        """Measure the quality of a sub-network.

        Returns:
            Metrics, or the reason why there are none: one that is not finite, or memory that ran
            out.

        Raises:
            ConfigError: if the device fails, on which every other evaluation would fail as well.
        """
        start = time.perf_counter()
        try:
            result = self._evaluate(job)
        except (RuntimeError, MemoryError, ConfigError) as error:
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            if not is_out_of_memory(error):
                if "CUDA error" in str(error):
                    raise ConfigError(
                        f"--device {spelled(self.spec.placed_on)} failed at {job.sub} ({reason}); "
                        "finished trials are kept, go on with --resume true"
                    ) from error
                raise
            result = Evaluation(Status.failed, note=reason)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return replace(result, seconds=time.perf_counter() - start)

    def _evaluate(self, job: Job) -> Evaluation:
        patch, about = self._repaired(job.sub)
        model = self.supernet.standalone(job.sub, patch)
        status, metrics, blocks = self._on_text(model, job)
        metrics |= about
        if self._score is not None and status is Status.complete:
            metrics |= self._score(model, whole=job.whole)
        wrong = [
            f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)
        ]
        if wrong:
            return Evaluation(Status.failed, blocks=blocks, note="; ".join(wrong))
        return Evaluation(status, metrics, blocks)

    def _repaired(self, sub: SubNetwork) -> tuple[Patch | None, dict[str, float]]:
        """What repair or the candidates change, and what repair took."""
        if self.spec.calibration is None:
            return self._library and self._library.patch(sub), {}
        found = repair(self.supernet, sub, self.spec.calibration)
        return found.patch, {REPAIR: found.seconds}

    def _on_text(self, model: Any, job: Job) -> tuple[Status, dict[str, float], int]:
        """Loss and perplexity, on few blocks if the loss on those is too high."""
        if "val_loss" not in self.spec.metrics:
            return Status.complete, {}, 0
        last = len(self.tokens)
        if not job.whole and self.spec.num_blocks is not None:
            last = min(last, self.spec.num_blocks)
        metrics: dict[str, float] = {}
        first, nats = 0 if job.whole else self.spec.first_blocks, 0.0
        if first:
            nats = self._nats(model, 0, first)
            metrics[FIRST] = self._mean(nats, first)
            if metrics[FIRST] > job.stop_above:
                return Status.stopped, metrics, first
        loss = self._mean(nats + self._nats(model, first, last), last)
        return Status.complete, metrics | _loss(loss), last

    def _nats(self, model: Any, start: int, end: int) -> float:
        tokens = self.tokens[start:end]
        return float(nats_per_block(model, tokens, batch_size=self.spec.batch_size).sum())

    def _mean(self, nats: float, blocks: int) -> float:
        return nats / (blocks * (self.tokens.shape[1] - 1))


def _loss(nats_per_token: float) -> dict[str, float]:
    return {"val_loss": nats_per_token, "perplexity": math.exp(min(nats_per_token, 700.0))}
