"""How a smaller part is made to do what the whole one did: least squares on its writer.

B sequences, T tokens, D channels, C inputs of the writer, R = D its outputs, r a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whittle_nas.calibration.blocks import run_block
from whittle_nas.calibration.steps import Step, token_factor, watch_writers
from whittle_nas.errors import ConfigError
from whittle_nas.repair.least_squares import NormalEquations, best_step, error_after
from whittle_nas.weights.patch import LowRank, Patch
from whittle_nas.weights.slicing import Index


@dataclass(frozen=True)
class Text:
    """The hidden states at one place of the whole model.

    Attributes:
        states: (B, T, D) per batch.
        fitted: the first batches, which are fitted; the others choose.
    """

    states: Sequence[Tensor]
    fitted: int

    def tokens(self) -> int:
        """How many are fitted."""
        return sum(x.shape[0] * x.shape[1] for x in self.states[: self.fitted])


@dataclass(frozen=True)
class Goal:
    """What the whole part does.

    Attributes:
        outputs: (B, T, D) per batch, of its writer.
        factors: (B, T, 1) per batch, the weight of each token in all sums (`token_factor`).
        power: sum of the squares of the outputs on held-back tokens.
        fit: sums over the writer's own inputs, and a 1 for a bias, on tokens to fit; errors are 0.
        held: the same on held-back tokens.
    """

    outputs: Sequence[Tensor]
    factors: Sequence[Tensor]
    power: float
    fit: NormalEquations
    held: NormalEquations


@dataclass(frozen=True)
class Fitted:
    """A smaller part.

    Attributes:
        patch: what changes, by names in the block; empty if nothing helped.
        error: squared error of its output on held-back tokens, as a share of the square of the
            whole part's output: 1 for a part that is left out (SquareHead, on all tokens at once);
            0 where the whole part gives nothing, as one of zeros that fill up a layer.
        ridge: that was chosen, None if nothing was changed.
    """

    patch: Patch
    error: float
    ridge: float | None


def run_whole(
    model: Any, layer: int, step: Step, text: Text
) -> tuple[dict[str, Goal], list[Tensor]]:
    """Run a step of the whole model: what its parts do, and the states behind it.

    Raises:
        ConfigError: if an activation is not finite.
    """
    sums = {part.name: _sums(step, part.name, text) for part in step.parts}
    given: dict[str, list[Tensor]] = {name: [] for name in sums}
    factors: dict[str, list[Tensor]] = {name: [] for name in sums}
    power = dict.fromkeys(sums, 0.0)
    after = []
    with watch_writers(step) as seen:
        for at, x in enumerate(text.states):
            behind = run_block(model, x.to(_device(step)), layer, step.module)
            after.append(behind.to(x.device))
            held_back = at >= text.fitted
            for name, both in sums.items():
                outputs = seen.outputs[name]
                scale = token_factor(step, outputs, behind)
                inputs = _with_one(seen.inputs[name], step, name) * scale
                both[held_back].gram.add_(_gram(inputs.flatten(0, -2), both[0].products))
                power[name] += held_back * float((outputs * scale).double().square().sum())
                given[name].append(outputs.to(x.device))
                factors[name].append(scale.to(x.device))
    goals = {}
    for name, (fit, held) in sums.items():
        _check_finite(layer, name, fit, held)
        goals[name] = Goal(given[name], factors[name], power[name], fit, held)
    return goals, after


def slice_equations(
    step: Step, kind: str, goal: Goal, kept: Index
) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations of a part that keeps some inputs of the writer as they are.

    What it gets wrong is what the others gave: with W = (W_s, W_d), errors are W_d a_d. So the
    sums of the whole part have everything, and a grid of sizes costs one pass.

    Args:
        step: of the whole model.
        kind: the part.
        goal: of the whole part.
        kept: the inputs that stay.
    """
    writer = _writer(step, kind)
    total = goal.fit.gram.shape[0]
    every = torch.arange(total, device=writer.weight.device)
    stays = torch.zeros(total, dtype=torch.bool, device=every.device)
    stays[writer.in_features :] = True  # the 1 of a bias
    stays[: writer.in_features][slice(kept) if isinstance(kept, int) or kept is None else kept] = (
        True
    )
    stay, gone = every[stays], every[~stays]
    lost = writer.weight.double()[:, gone].mT  # (gone, R)

    def part(whole: NormalEquations) -> NormalEquations:
        gram = whole.gram
        power = ((gram[gone][:, gone] @ lost) * lost).sum()
        return NormalEquations(
            gram[stay][:, stay], gram[stay][:, gone] @ lost, power, whole.products
        )

    return part(goal.fit), part(goal.held)


def run_equations(
    model: Any, layer: int, step: Step, kind: str, *, text: Text, goal: Goal
) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations of a part whose activations are its own, as with smaller heads.

    Args:
        model: the whole model, whose rotary tables are read.
        layer: where the part stands.
        step: of the smaller block, with the part in it.
        kind: which of its parts.
        text: what enters the step in the whole model.
        goal: of the whole part.

    Raises:
        ConfigError: if an activation is not finite.
    """
    fit, held = _sums(step, kind, text)
    with watch_writers(step) as seen:
        together = zip(text.states, goal.outputs, goal.factors, strict=True)
        for at, (x, wanted, weight) in enumerate(together):
            run_block(model, x.to(_device(step)), layer, step.module)
            scale = weight.to(_device(step))
            errors = (wanted.to(_device(step)) - seen.outputs[kind]) * scale
            chosen = fit if at < text.fitted else held
            inputs = _with_one(seen.inputs[kind], step, kind) * scale
            chosen.add(inputs.flatten(0, -2), errors.flatten(0, -2))
    _check_finite(layer, kind, fit, held)
    return fit, held


def fit_writer(
    step: Step,
    kind: str,
    fit: NormalEquations,
    held: NormalEquations,
    *,
    power: float,
    ridges: Sequence[float],
    rank: int | None,
) -> Fitted:
    """Fit the writer of a part again, so that it gives what the whole part gave.

    Args:
        step: of the smaller block, with the part in it.
        kind: which of its parts.
        fit: errors of the slice on tokens to fit.
        held: the same on other tokens, which choose.
        power: sum of squares of what the whole part gives there.
        ridges: to choose from.
        rank: of the change; None: any.
    """
    if not power:
        return Fitted(Patch(), 0.0, None)
    part = next(part for part in step.parts if part.name == kind)
    writer = step.get(part.writer)
    bias = writer.bias is not None
    before = float(held.power)
    choice = best_step({"fit": fit}, held, ridges=ridges, free=int(bias))
    if choice.step is None:
        return Fitted(Patch(), before / power, None)
    change = low_rank(choice.step, fit.gram, rank)
    left = error_after(change if isinstance(change, Tensor) else change.up @ change.down, held)
    if left >= before:  # what a low rank leaves of it may not help
        return Fitted(Patch(), before / power, None)
    return Fitted(_patch(part.writer, writer, change, bias), left / power, choice.ridge)


def low_rank(step: Tensor, gram: Tensor, rank: int | None) -> Tensor | LowRank:
    """The change of rank r that comes nearest to a change in what it does on the tokens.

    With inputs a and U the first eigenvectors of step E[a a^T] step^T, U U^T step is the least
    squares solution among all of rank r (reduced-rank regression).

    Args:
        step: (R, C).
        gram: (C, C) sum of a a^T.
        rank: r; None, or so high that nothing is saved: the change as it is.
    """
    rows, columns = step.shape
    if rank is None or rank * (rows + columns) >= rows * columns:
        return step
    vectors = torch.linalg.eigh(step @ gram @ step.mT).eigenvectors[:, -rank:]  # (R, r)
    return LowRank(vectors, vectors.mT @ step)


def _patch(name: str, writer: Any, change: Tensor | LowRank, bias: bool) -> Patch:
    """Changes of a weight, whose last column is that of the bias, as a patch."""
    weight, last = f"{name}.weight", writer.in_features
    if isinstance(change, Tensor):
        whole = writer.weight.double() + change[:, :last]
        replaced, added = {weight: whole.to(writer.weight.dtype)}, {}
        shift = change[:, last] if bias else None
    else:
        replaced = {}
        added = {weight: LowRank(change.up.float(), change.down[:, :last].float().contiguous())}
        shift = change.up @ change.down[:, last] if bias else None
    if shift is not None:
        replaced[f"{name}.bias"] = (writer.bias.double() + shift).to(writer.bias.dtype)
    return Patch(replaced, added)


def _sums(step: Step, kind: str, text: Text) -> tuple[NormalEquations, NormalEquations]:
    """Empty normal equations of a writer, on tokens to fit and on those that are held back."""
    writer = _writer(step, kind)
    sizes = writer.in_features + (writer.bias is not None), writer.out_features
    size = {"tokens": text.tokens(), "device": writer.weight.device}
    return NormalEquations.zeros(*sizes, **size), NormalEquations.zeros(*sizes, **size)


def _gram(inputs: Tensor, products: torch.dtype) -> Tensor:
    rows = inputs.to(products)
    return (rows.mT @ rows).double()


def _with_one(inputs: Tensor, step: Step, kind: str) -> Tensor:
    """Inputs of a writer (B, T, C), and a 1 where it has a bias."""
    if _writer(step, kind).bias is None:
        return inputs
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)


def _writer(step: Step, kind: str) -> Any:
    return step.get(next(part.writer for part in step.parts if part.name == kind))


def _device(step: Step) -> torch.device:
    return _writer(step, step.parts[0].name).weight.device


def _check_finite(layer: int, kind: str, *sums: NormalEquations) -> None:
    if not all(one.finite() and bool(one.gram.sum().isfinite()) for one in sums):
        raise ConfigError(
            f"activations of {kind} in layer {layer} are not finite on the calibration text: use a "
            "dtype with more range (--dtype float32), or check that layer's weights"
        )
