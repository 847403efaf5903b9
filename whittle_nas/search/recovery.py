"""Ranking again after recovery: the best before fine-tuning need not be the best after it.

UNAST (Figure 5) finds the losses before and after a short training uncorrelated among architectures
of one budget. So the best few of a budget are trained briefly, each with adapters of its own and
taught by the whole model, and compared by what becomes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.search.halving import FIRST
from whittle_nas.search.options import RecoveryOptions
from whittle_nas.search.results import candidates
from whittle_nas.search.trials import Trial
from whittle_nas.space.front import Constraint, parse_constraints
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.train import losses
from whittle_nas.train.batches import Sample, collate, from_blocks
from whittle_nas.train.lora import reset_adapter
from whittle_nas.train.options import LoraOptions, LossOptions, OptimizerOptions
from whittle_nas.train.prepare import load_trainable
from whittle_nas.train.recipe import learning_rate
from whittle_nas.train.step import finish_gradients, full_logits, labelled_hidden, loss_sums
from whittle_nas.weights.checkpoint import Checkpoint, load_supernet

RECOVERED = "recovered_val_loss"
_CLIP = 1.0  # largest gradient norm


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


class Recovery:
    """Trains sub-networks of one checkpoint, each from the checkpoint's weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: RecoveryOptions,
        train: Tensor,
        valid: Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        """Load the model twice, once as the teacher.

        Args:
            checkpoint: the super-network.
            options: how to train.
            train: (N, T + 1) training text in blocks.
            valid: (N, T + 1) validation text in blocks.
            device: where to train.
            dtype: number format of the weights.
            seed: of the order of the data and of the adapters.
        """
        self.options, self._seed, self._device = options, seed, device
        adapters = LoraOptions(r=options.r, dropout=0.0)
        precision = "bf16-true" if dtype is torch.bfloat16 else "32-true"
        self._student = load_trainable(checkpoint, adapters, precision=precision)
        self._student.model.to(device)
        teacher_dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
        self._teacher = load_supernet(checkpoint.path, device=device, dtype=teacher_dtype)
        self._train, self.valid = from_blocks(train), from_blocks(valid)
        self._loss = LossOptions(distillation=options.distillation)
        self._schedule = OptimizerOptions(lr=options.lr).resolved(full=False)

    def losses_of(
        self, sub: SubNetwork, on_step: Callable[[], object] = lambda: None
    ) -> tuple[float, float]:
        """Validation loss of a sub-network before and after its training; inf if it diverges."""
        torch.manual_seed(self._seed)
        for module in self._student.model.modules():
            reset_adapter(module)
        before = self._evaluate(sub)
        parameters = [p for p in self._student.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self._schedule.lr or 0.0, weight_decay=0.0)
        self._student.model.train()
        for step, batch in zip(range(self.options.steps), self._batches(), strict=False):
            if not self._step(sub, batch, parameters):
                return before, math.inf
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, self._schedule, self.options.steps)
            optimizer.step()
            optimizer.zero_grad()
            on_step()
        return before, self._evaluate(sub)

    def _step(self, sub: SubNetwork, batch: Sample, parameters: list[Any]) -> bool:
        """Gradients of one batch; False if they are not finite."""
        labels = batch.labels.flatten()
        sums = losses.backward(
            labelled_hidden(self._student, sub, batch),
            self._student.head(sub),
            labels,
            self._loss,
            teacher=full_logits(self._teacher, batch, self._loss),
            vocabulary=self._student.config.padded_vocab_size,
        )
        norm = finish_gradients(parameters, len(labels))
        torch.nn.utils.clip_grads_with_norm_(parameters, _CLIP, norm)
        return math.isfinite(float(sums.ce + sums.kd + norm))

    def _batches(self) -> Iterator[Sample]:
        """Batches of training text in random order, epoch after epoch."""
        generator = torch.Generator().manual_seed(self._seed)
        size = min(self.options.batch_size, len(self._train))
        while True:
            order = torch.randperm(len(self._train), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield self._collate([self._train[i] for i in order[start : start + size]])

    @torch.no_grad()
    def _evaluate(self, sub: SubNetwork) -> float:
        self._student.model.eval()
        total, size = 0.0, self.options.batch_size
        for start in range(0, len(self.valid), size):
            batch = self._collate(self.valid[start : start + size])
            sums = loss_sums(self._student, batch, [sub], chunk_elements=self._loss.chunk_elements)
            total += float(sums[0])
        return total / sum(sample.num_labels for sample in self.valid)

    def _collate(self, samples: Sequence[Sample]) -> Sample:
        batch = collate(samples)
        return Sample(batch.input_ids.to(self._device), batch.labels.to(self._device))


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
