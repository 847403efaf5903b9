"""The quality of one sub-network, the same for every trial and in every worker process."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.search.trials import Status
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.checkpoint import load_supernet


@dataclass(frozen=True)
class EvaluationSpec:
    """Everything that a process needs to evaluate sub-networks.

    Attributes:
        checkpoint_dir: the super-network.
        metrics: wanted quality metrics, see `objectives`.
        batch_size: blocks per forward pass; None: chosen for the device.
        num_blocks: blocks of a trial; None: all.
        device: name of the device; a worker that sees one GPU only calls it `cuda`.
        dtype: number format of the weights; None: as stored.
        threads: CPU threads of torch; None: as they are.
    """

    checkpoint_dir: Path
    metrics: tuple[str, ...]
    batch_size: int | None = None
    num_blocks: int | None = None
    device: str = "cpu"
    dtype: torch.dtype | None = None
    threads: int | None = None


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
        """Load the weights.

        Args:
            spec: what to evaluate and where.
            tokens: (N, T + 1) validation text in blocks.

        Raises:
            ConfigError: for a checkpoint that can't be used.
        """
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.spec = spec
        self.supernet = load_supernet(spec.checkpoint_dir, device=spec.device, dtype=spec.dtype)
        self.tokens = tokens

    @property
    def num_blocks(self) -> int:
        """Blocks of a trial."""
        return min(self.spec.num_blocks or len(self.tokens), len(self.tokens))

    def evaluate(self, sub: SubNetwork, *, whole: bool = False) -> Evaluation:
        """Measure the quality of a sub-network.

        Args:
            sub: sizes.
            whole: use all blocks, not only those of a trial.

        Returns:
            Metrics, or the reason why there are none; memory that runs out is such a reason.
        """
        start = time.perf_counter()
        try:
            result = self._evaluate(sub, len(self.tokens) if whole else self.num_blocks)
        except (RuntimeError, MemoryError, ConfigError) as error:  # memory that ran out, mostly
            reason = (str(error).strip().splitlines() or [""])[0]
            result = Evaluation(Status.failed, note=f"{type(error).__name__}: {reason[:200]}")
            if self.spec.device.startswith("cuda"):
                torch.cuda.empty_cache()
        seconds = time.perf_counter() - start
        return Evaluation(result.status, result.metrics, result.blocks, seconds, result.note)

    def _evaluate(self, sub: SubNetwork, num_blocks: int) -> Evaluation:
        model = self.supernet.standalone(sub)
        loss = nats_per_token(model, self.tokens[:num_blocks], self.spec.batch_size)
        found = {"val_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        metrics = {name: found[name] for name in self.spec.metrics}
        wrong = [
            f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)
        ]
        if wrong:
            return Evaluation(Status.failed, blocks=num_blocks, note="; ".join(wrong))
        return Evaluation(Status.complete, metrics, num_blocks)
