"""Ranking again after recovery: the best before fine-tuning need not be the best after it.

UNAST (Figure 5) finds the losses before and after a short training uncorrelated among architectures
of one budget. So the best few of a budget are trained briefly, each with adapters of its own and
taught by the whole model, and compared by what becomes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.search.halving import FIRST
from whittle_nas.search.options import RecoveryOptions
from whittle_nas.search.results import candidates
from whittle_nas.search.trials import Trial
from whittle_nas.space.front import Constraint, parse_constraints
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.train.batches import Sample
from whittle_nas.train.choices import ValidationOptions
from whittle_nas.train.module import Diverged
from whittle_nas.train.options import (
    Distillation,
    LoraOptions,
    LossOptions,
    OptimizerOptions,
    TrainerOptions,
)
from whittle_nas.train.run import TrainingOptions
from whittle_nas.train.specialise import slice_of, specialise
from whittle_nas.weights.checkpoint import Checkpoint, load_supernet
from whittle_nas.weights.patch import Patch
from whittle_nas.weights.supernet import SuperNetwork

RECOVERED = "recovered_val_loss"


def best_of_budget(
    trials: Sequence[Trial], constraints: Sequence[Constraint], options: RecoveryOptions
) -> list[Trial]:
    """The trials of lowest loss under the budget, best first.

    Raises:
        ConfigError: if there are fewer than two, which leaves nothing to rank.
    """
    limits = parse_constraints(options.budget, option="--recovery.budget")
    known = trials[0].metrics
    for limit in limits:
        if limit.metric not in known or limit.metric == FIRST:
            raise ConfigError(
                f"--recovery.budget: unknown metric {limit.metric!r}; the trials have "
                f"{', '.join(known)}"
            )
    fitting = candidates(trials, [*constraints, *limits])
    ranked = sorted(fitting, key=lambda trial: trial.metrics["val_loss"])
    if len(ranked) < 2:
        raise ConfigError(
            f"--recovery.budget {options.budget!r} leaves {len(ranked)} of the trials and there is "
            "nothing to rank; relax it, or raise --num_trials"
        )
    return ranked[: options.candidates]


@dataclass(frozen=True)
class Recovery:
    """How the best of a budget are trained.

    Attributes:
        options: of the command.
        checkpoint: the super-network.
        teacher: the same, loaded and frozen.
        train: training samples.
        valid: validation samples.
        device: where to train.
        seed: of the order of the data and of the adapters.
        patch_of: what is special to a sub-network: its repair, or parts of a library.
    """

    options: RecoveryOptions
    checkpoint: Checkpoint
    teacher: SuperNetwork
    train: Sequence[Sample]
    valid: Sequence[Sample]
    device: torch.device
    seed: int
    patch_of: Callable[[SubNetwork], Patch | None] = lambda _: None

    def losses_of(
        self, sub: SubNetwork, on_step: Callable[[], object] = lambda: None
    ) -> tuple[float, float]:
        """Validation loss of a sub-network before and after its training; inf if it diverges."""
        start = slice_of(self.checkpoint, sub, self.patch_of(sub))
        torch.manual_seed(self.seed)  # of the adapters
        try:
            trained = specialise(
                self._training,
                start,
                samples=self.train,
                valid=self.valid,
                teacher=self.teacher if self._taught else None,
                on_step=on_step,
            )
        except Diverged:
            return math.inf, math.inf
        history = trained.history
        return history[0]["full"], history[max(history)]["full"]

    @property
    def _taught(self) -> bool:
        return self.options.distillation is not Distillation.none

    @property
    def _training(self) -> TrainingOptions:
        options, device = self.options, self.device
        half = self.teacher.model.lm_head.weight.dtype is torch.bfloat16
        return TrainingOptions(
            loss=LossOptions(distillation=options.distillation),
            lora=LoraOptions(r=options.r, dropout=0.0),
            optimizer=OptimizerOptions(lr=options.lr),
            trainer=TrainerOptions(
                max_steps=options.steps,
                accelerator=device.type,
                devices=1 if device.index is None else f"{device.index},",
                precision="bf16-true" if half else "32-true",
                gradient_clip_val=1.0,
                enable_progress_bar=False,
            ),
            validation=ValidationOptions(every_n_steps=options.steps),
            batch_size=min(options.batch_size, len(self.train)),
            seed=self.seed,
        )


def load_teacher(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None
) -> SuperNetwork:
    """The super-network in the format that the networks are trained in: bfloat16 or float32."""
    kept = dtype if dtype is torch.bfloat16 else torch.float32
    return load_supernet(checkpoint.path, device=device, dtype=kept)


def recover(
    recovery: Recovery, trials: Sequence[Trial], on_step: Callable[[int], object]
) -> list[Trial]:
    """Train the sub-networks of trials.

    Args:
        recovery: how.
        trials: the best of a budget.
        on_step: called with the number of training steps that are left.

    Returns:
        The trials with `RECOVERED` and `rank_before` among their metrics, best first.
    """
    left = iter(range(len(trials) * recovery.options.steps - 1, -1, -1))
    found = []
    for trial in trials:
        before, after = recovery.losses_of(trial.sub, lambda: on_step(next(left, 0)))
        metrics = {RECOVERED: after, "rank_before": 0, **trial.metrics, "val_loss": before}
        found.append(replace(trial, metrics=metrics, blocks=len(recovery.valid)))
    found.sort(key=lambda trial: trial.metrics["val_loss"])
    ranked = [
        replace(trial, metrics={**trial.metrics, "rank_before": rank})
        for rank, trial in enumerate(found, start=1)
    ]
    return sorted(ranked, key=lambda trial: trial.metrics[RECOVERED])
