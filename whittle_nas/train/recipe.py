"""How a super-network is trained, as one value, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum

from whittle_nas.train.choices import SamplerOptions, SandwichOptions, Strategy
from whittle_nas.train.options import LoraOptions, LossOptions, OptimizerOptions


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a super-network is trained.

    Attributes:
        sandwich: which networks a step runs.
        loss: what they learn from.
        optimizer: AdamW and its schedule; `lr` is set.
        total_steps: optimiser steps of the whole training.
        batch_size: samples per process and micro-batch.
        accumulate: micro-batches per optimiser step.
        clip: largest gradient norm; None does not clip.
        seed: of data order, sub-networks and dropout.
        checkpoint_blocks: recompute activations in the backward pass.
        num_workers: processes that prepare batches.
        log_every_n_steps: optimiser steps between two rows of the logs.
        validate_every: optimiser steps between two validations.
        score_every: optimiser steps between two scorings of a Pareto sampler.
        score_samples: validation samples on which it scores.
        keep_zeros: trained weights that are zero stay zero.
        max_full_loss: nats per token of the whole model at which the training stops; None never.
        lora: of the adapters; None where all weights learn.
        start: `identity.fingerprint` of the checkpoint that is trained, if it has a file.
        sampler: what the sampler was made from.
    """

    sandwich: SandwichOptions
    loss: LossOptions
    optimizer: OptimizerOptions
    total_steps: int
    batch_size: int = 8
    accumulate: int = 1
    clip: float | None = None
    seed: int = 1337
    checkpoint_blocks: bool = False
    num_workers: int = 0
    log_every_n_steps: int = 10
    validate_every: int = 100
    score_every: int = 50
    score_samples: int = 16
    keep_zeros: bool = False
    max_full_loss: float | None = None
    lora: LoraOptions | None = None
    start: str = ""
    sampler: SamplerOptions = SamplerOptions()

    def settings(self) -> dict[str, object]:
        """What stays as it is when a training is resumed, plain values by the options' names.

        Lengths, rates, clipping and how many samples a process takes may change.
        """
        found: dict[str, object] = {"checkpoint_dir": self.start, "seed": self.seed}
        found["keep_zeros"] = self.keep_zeros
        groups = {"sandwich": self.sandwich, "loss": self.loss, "lora": self.lora}
        for group, options in groups.items():
            for name, value in asdict(options).items() if options is not None else ():
                found[f"{group}.{name}"] = _plain(value)
        if self.loss.has_frozen_teacher:
            found["loss.ce_weight"] = self.loss.weights[0]  # the default was another one once
        if self.sandwich.strategy is not Strategy.standard:
            found |= {f"sampler.{name}": v for name, v in self.sampler.settings().items()}
        del found["loss.chunk_elements"]  # decides about memory alone
        return found


def _plain(value: object) -> object:
    """As files of weights alone can hold it."""
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def learning_rate(step: int, options: OptimizerOptions, total_steps: int) -> float:
    """Rate of an optimiser step counted from 0: linear warm-up, then a cosine down to `min_lr`."""
    assert options.lr is not None
    warmup = min(options.warmup_steps, total_steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    wave = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return options.min_lr + (options.lr - options.min_lr) * wave


def validation_interval(total_steps: int, *, step_passes: int, validation_passes: int) -> int:
    """Optimiser steps between two validations that take about a tenth of the training's time.

    A tenth of the training, or more: six steps on a laptop need no seven validations.

    Args:
        total_steps: of the training.
        step_passes: networks times batches of an optimiser step; a backward pass costs two forward.
        validation_passes: networks times batches of a validation, forward only.
    """
    return max(1, total_steps // 10, math.ceil(10 * validation_passes / (3 * step_passes)))


SCORED = 24  # sub-networks that a Pareto sampler looks at at a time


def scoring_interval(*, step_passes: int, scoring_passes: int) -> int:
    """Optimiser steps between two scorings that take about a twentieth of the training's time.

    Args:
        step_passes: networks times batches of an optimiser step; a backward pass costs two forward.
        scoring_passes: networks times batches of a scoring, forward only, half as large on average.
    """
    return max(1, math.ceil(20 * 0.5 * scoring_passes / (3 * step_passes)))
