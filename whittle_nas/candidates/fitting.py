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
from whittle_nas.calibration.steps import Step, watch_writers
from whittle_nas.errors import ConfigError
from whittle_nas.repair.least_squares import NormalEquations, best_step, error_after
from whittle_nas.weights.patch import LowRank, Patch


@dataclass(frozen=True)
class Text:
    """The hidden states at one place of the whole model.

    Attributes:
        states: (B, T, D) per batch.
        fitted: the first batches, which are fitted; the others choose.
    """

    states: Sequence[Tensor]
    fitted: int


@dataclass(frozen=True)
class Fitted:
    """A smaller part.

    Attributes:
        patch: what changes, by names in the block; empty if nothing helped.
        error: squared error of its output on held-back tokens, as a share of the square of the
            whole part's output: 1 for a part that is left out (SquareHead, on all tokens at once).
        ridge: that was chosen, None if nothing was changed.
    """

    patch: Patch
    error: float
    ridge: float | None


def fit_writer(
    model: Any,
    layer: int,
    step: Step,
    kind: str,
    *,
    text: Text,
    wanted: Sequence[Tensor],
    ridges: Sequence[float],
    rank: int | None,
) -> Fitted:
    """Fit the writer of a part again, so that it gives what the whole part gave.

    Args:
        model: the whole model, whose rotary tables are read.
        layer: where the part stands.
        step: of the smaller block, with the part in it.
        kind: which of its parts.
        text: what enters the step in the whole model.
        wanted: (B, T, D) per batch, what the whole part's writer gave.
        ridges: to choose from.
        rank: of the change; None: any.

    Raises:
        ConfigError: if an activation is not finite.
    """
    part = next(part for part in step.parts if part.name == kind)
    writer = step.get(part.writer)
    bias = writer.bias is not None
    device = writer.weight.device
    tokens = sum(x.shape[0] * x.shape[1] for x in text.states[: text.fitted])
    sizes = writer.in_features + bias, writer.out_features
    fit, held = (NormalEquations.zeros(*sizes, tokens=tokens, device=device) for _ in range(2))
    power = 0.0
    with watch_writers(step) as seen:
        for at, (x, goal) in enumerate(zip(text.states, wanted, strict=True)):
            run_block(model, x.to(device), layer, step.module)
            inputs, errors = seen.inputs[kind], goal.to(device) - seen.outputs[kind]
            if bias:
                inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
            chosen = fit if at < text.fitted else held
            chosen.add(inputs.flatten(0, -2), errors.flatten(0, -2))
            power += float(goal.double().square().sum()) if at >= text.fitted else 0.0
    if not (fit.finite() and held.finite()):
        raise ConfigError(
            f"activations of layer {layer}, {part.writer}, are not finite on the calibration text: "
            "use a dtype with more range (--dtype float32), or check that layer's weights"
        )
    choice = best_step({"fit": fit}, held, ridges=ridges, free=int(bias))
    before = float(held.power) / power
    if choice.step is None:
        return Fitted(Patch(), before, None)
    change = low_rank(choice.step, fit.gram, rank)
    left = error_after(change if isinstance(change, Tensor) else change.up @ change.down, held)
    if left >= float(held.power):  # what a low rank leaves of it may not help
        return Fitted(Patch(), before, None)
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


def outputs_of(
    model: Any, layer: int, step: Step, states: Sequence[Tensor]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """What the writers of a step give, by part, and the states behind it, for every batch."""
    given: dict[str, list[Tensor]] = {part.name: [] for part in step.parts}
    after = []
    with watch_writers(step) as seen:
        for x in states:
            after.append(run_block(model, x, layer, step.module))
            for name, outputs in given.items():
                outputs.append(seen.outputs[name])
    return given, after
