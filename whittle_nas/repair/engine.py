"""Repair of a sub-network without gradients: what `--repair true` does in every command."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from whittle_nas.progress import Progress, no_progress
from whittle_nas.repair.least_squares import Choice
from whittle_nas.repair.lockstep import Lockstep
from whittle_nas.repair.options import RepairOptions
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.patch import Patch

_PLENTY = 16  # tokens per input of a layer, from which fits that follow the stream hold elsewhere


@dataclass(frozen=True)
class Repaired:
    """What repair found.

    Attributes:
        patch: the changed tensors of the sub-network; empty if none helped on held-back text.
        choices: what was chosen, by the name of the layer or of the norm that layers read; also
            where the patch is empty, because the sub-network as a whole did not get better.
        before: loss of the plain slices on held-back calibration text, nats per token.
        after: the same of the patched ones, never higher.
        tokens: calibration tokens that were fitted.
        held_back: those that chose.
        seconds: time that it took.
        notes: sentences for the user.
    """

    patch: Patch
    choices: dict[str, Choice]
    before: float
    after: float
    tokens: int
    held_back: int
    seconds: float
    notes: tuple[str, ...] = ()


@torch.no_grad()
def repair(
    supernet: Any,
    sub: SubNetwork,
    tokens: Tensor,
    *,
    options: RepairOptions | None = None,
    progress: Progress = no_progress,
) -> Repaired:
    """Fit the matrices of a sub-network again, in closed form, block by block.

    With what the slices of a layer get wrong, e (n, R), and its inputs a (n, C) on n tokens, its
    weight is changed by the minimum of |e - a W^T|^2 + ridge |W|^2, every token weighted by what
    the next norm divides it by (`calibration.steps.token_factor`). The last tokens are held back.
    They choose for every layer the ridge, whether it makes up for the errors of the blocks before
    it or only for its own, and whether it is changed at all; and in the end, whether the whole
    sub-network is. Where text is short, a second pass lets every layer make up for its own error
    only, and the better one is kept.

    Args:
        supernet: the `SuperNetwork`; its weights stay as they are.
        sub: what is repaired.
        tokens: (N, T + 1) calibration text in blocks.
        options: how.
        progress: shows the steps of the blocks.

    Raises:
        ConfigError: if there is too little text, or an activation is not finite.
    """
    start, options = time.perf_counter(), options or RepairOptions()

    def once(*, follow: bool) -> tuple[Repaired, bool]:
        """One pass, and whether its text was little for what it fitted."""
        streams = Lockstep(supernet, sub, tokens, options, follow=follow)
        before = streams.plain_loss()
        pairs = streams.pairs()
        for pair in progress(pairs, "repairing" if follow else "repairing alone", len(pairs)):
            streams.repair(pair)
        after = streams.repair_head()
        helped = after < before
        found = Repaired(
            patch=streams.patch() if helped else Patch(),
            choices=streams.choices,
            before=before,
            after=after if helped else before,
            tokens=streams.tokens(held_back=False),
            held_back=streams.tokens(held_back=True),
            seconds=0.0,
            notes=streams.notes(),
        )
        return found, found.tokens < _PLENTY * streams.most_inputs

    found, little = once(follow=True)
    if little:
        alone = once(follow=False)[0]
        if alone.after < found.after:
            found = alone
    return replace(found, seconds=time.perf_counter() - start)
