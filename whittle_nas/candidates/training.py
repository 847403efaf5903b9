"""Layer-wise training of one smaller part: adapters of low rank on all its matrices, or these.

The part sees what the whole part saw and learns what it gave. B sequences, T tokens, D channels,
r rank of the adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from whittle_nas.calibration.blocks import run_block
from whittle_nas.calibration.steps import Step, watch_writers
from whittle_nas.candidates.fitting import Fitted, Goal, Text
from whittle_nas.candidates.options import PartLoss, PartTraining
from whittle_nas.weights.patch import LowRank, Patch


def square_head(found: Tensor, wanted: Tensor) -> Tensor:
    """MSE(a, b) / MSE(a, 0) of wanted outputs a and found ones b (Kurtic et al., 2023)."""
    return (found - wanted).square().mean() / wanted.square().mean()


_LOSSES: dict[PartLoss, Callable[[Tensor, Tensor], Tensor]] = {
    PartLoss.l1: nn.functional.l1_loss,
    PartLoss.l2: nn.functional.mse_loss,
    PartLoss.square_head: square_head,
}


def train_part(
    model: Any,
    layer: int,
    step: Step,
    kind: str,
    fitted: Fitted,
    *,
    text: Text,
    goal: Goal,
    options: PartTraining,
    seed: int = 0,
) -> Fitted:
    """Train a fitted part; it stays as it was if held-back tokens say so.

    Args:
        model: the whole model, whose rotary tables are read.
        layer: where the part stands.
        step: of the smaller block with the fitted part in it; its weights are not written.
        kind: which of its parts.
        fitted: what the closed form has found, which is in `step`.
        text: what enters the step in the whole model.
        goal: what the whole part gives.
        options: how.
        seed: of the adapters and the order of the batches.
    """
    part = next(part for part in step.parts if part.name == kind)
    names = (*part.readers, part.writer)
    generator = torch.Generator().manual_seed(seed)
    adapters = {name: _change_of(step.get(name), options.rank, generator) for name in names}
    device = step.get(part.writer).weight.device
    for name, adapter in adapters.items():
        parametrize.register_parametrization(step.get(name), "weight", adapter, unsafe=True)

    def outputs(at: int) -> tuple[Tensor, Tensor]:
        with watch_writers(step) as seen:
            run_block(model, text.states[at].to(device), layer, step.module)
        return seen.outputs[kind].float(), goal.outputs[at].to(device).float()

    with torch.enable_grad():
        parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=options.lr)
        for number in range(options.steps):
            share = number / options.steps
            for group in optimizer.param_groups:
                group["lr"] = options.lr * 0.5 * (1 + math.cos(math.pi * share))
            at = int(torch.randint(text.fitted, (), generator=generator))
            loss = _LOSSES[options.loss](*outputs(at))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        error = 0.0
        for at in range(text.fitted, len(text.states)):
            given, wanted = outputs(at)
            weighted = (given - wanted) * goal.factors[at].to(device)
            error += float(weighted.double().square().sum()) / goal.power
    if not error < fitted.error:
        return fitted
    for name in names:  # with what was trained no longer in it
        parametrize.remove_parametrizations(step.get(name), "weight", leave_parametrized=False)
    found = {
        f"{name}.weight": adapter.found(step.get(name).weight.detach())
        for name, adapter in adapters.items()
    }
    return Fitted(_joined(fitted.patch, found), error, fitted.ridge)


def _change_of(linear: Any, rank: int | None, generator: torch.Generator) -> _Whole | _Adapter:
    return _Whole(linear) if rank is None else _Adapter(linear, rank, generator)


class _Whole(nn.Module):
    """A weight plus a matrix of its shape, which begins at 0."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.change.to(weight.dtype)

    def found(self, weight: Tensor) -> Tensor:
        return self(weight).detach()


class _Adapter(nn.Module):
    """A weight (R, C) plus up (R, r) times down (r, C); up begins at 0."""

    def __init__(self, linear: Any, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        rank = min(rank, rows, columns)
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.up = nn.Parameter(torch.zeros(rows, rank, device=linear.weight.device))
        self.down = nn.Parameter(down.to(linear.weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype)

    def found(self, _weight: Tensor) -> LowRank:
        return LowRank(self.up.detach(), self.down.detach())


def _joined(patch: Patch, changes: dict[str, LowRank | Tensor]) -> Patch:
    """A patch with more to add, of low rank side by side, or with whole weights."""
    replaced, added = dict(patch.replaced), dict(patch.added)
    for name, change in changes.items():
        if isinstance(change, Tensor):
            replaced[name] = change.cpu()
            added.pop(name, None)
        elif name in replaced:
            dense = replaced[name].cpu().float() + change.up.cpu() @ change.down.cpu()
            replaced[name] = dense.to(replaced[name].dtype)
        elif name in added:
            known = added[name]
            added[name] = LowRank(
                torch.cat([known.up.cpu(), change.up.cpu()], 1),
                torch.cat([known.down.cpu(), change.down.cpu()]),
            )
        else:
            added[name] = change
    return Patch(replaced, added)
