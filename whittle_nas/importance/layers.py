"""Which layers carry the model: losses without them, and greedy dropping.

B sequences, T tokens, D channels, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from whittle_nas.calibration import embed, run_block
from whittle_nas.calibration.steps import nats
from whittle_nas.progress import Progress, no_progress

# Layers on either side of a gap that a round of `greedy_order` tries; all where there are few.
_NEAR = 2
_FEW = 8


def losses_without(
    model: Any,
    tokens: Tensor,
    candidates: Collection[int],
    *,
    kept: Sequence[int],
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> dict[int, float]:
    """Loss of the model made of the layers `kept`, less each candidate in turn.

    All candidates share the layers before the one that they leave out, so that leaving out each of
    m layers costs m^2 / 2 layers.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        candidates: ids of layers in `kept`.
        kept: ids of the layers that are there, ascending.
        batch_size: sequences per forward pass.
        progress: shows the batches.

    Returns:
        Mean nats per token for every candidate.
    """
    device = model.cos.device
    totals = dict.fromkeys(candidates, 0.0)
    last = max((at for at, layer in enumerate(kept) if layer in totals), default=-1)
    batches = tokens.split(batch_size)
    with torch.inference_mode():
        for batch in progress(batches, "leaving out layers", len(batches)):
            ids = batch.to(device)
            x, targets = embed(model, ids[:, :-1]), ids[:, 1:]
            for at, layer in enumerate(kept[: last + 1]):
                if layer in totals:
                    totals[layer] += nats_behind(model, x, kept[at + 1 :], targets)
                if at < last:
                    x = run_block(model, x, layer)
    return {layer: total / tokens[:, 1:].numel() for layer, total in totals.items()}


def loss_of(model: Any, tokens: Tensor, *, kept: Sequence[int], batch_size: int = 4) -> float:
    """Mean nats per token of the model made of the layers `kept`; see `losses_without`."""
    total = 0.0
    with torch.inference_mode():
        for batch in tokens.split(batch_size):
            ids = batch.to(model.cos.device)
            total += nats_behind(model, embed(model, ids[:, :-1]), kept, ids[:, 1:])
    return total / tokens[:, 1:].numel()


def greedy_order(
    model: Any,
    tokens: Tensor,
    *,
    min_layers: int = 1,
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> tuple[list[int], list[float]]:
    """Drop the layer whose loss hurts least, again and again.

    What a layer costs hardly ever falls while others go, but for those beside a gap: in one model
    the third layer that was best dropped was the next but one to the first two. So a round
    tries the layers beside the last gap and the one whose last known cost is the lowest, and more
    while one of the others was cheaper when it was tried last. The first costs, of all layers, come
    from a quarter of the text. While there are few layers, every round tries them all.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        min_layers: layers that are left in the end, and are ranked by their last known costs.
        batch_size: sequences per forward pass.
        progress: shows the layers that are dropped.

    Returns:
        Layer ids, the one dropped last first; and for every layer the loss in nats per token that
        the model had just after it was dropped, or would have had.
    """
    kept = list(range(model.config.n_layer))
    costs = dict.fromkeys(kept, 0.0)
    if len(kept) > _FEW:
        costs = _first_costs(model, tokens, kept, batch_size, progress)
    dropped, losses = [], [0.0] * len(kept)
    loss = loss_of(model, tokens, kept=kept, batch_size=batch_size)
    rounds, beside = len(kept) - max(min_layers, 1), set[int]()
    for _ in progress(range(rounds), "dropping layers", rounds):
        layer = _cheapest(model, tokens, kept, costs, loss, batch_size, beside=beside)
        beside = _beside(kept, layer)
        loss += costs[layer]
        losses[layer] = loss
        dropped.append(layer)
        kept.remove(layer)
    for layer in kept:
        losses[layer] = loss + costs[layer]
    return sorted(kept, key=lambda layer: -costs[layer]) + dropped[::-1], losses


def _first_costs(
    model: Any, tokens: Tensor, kept: Sequence[int], batch_size: int, progress: Progress
) -> dict[int, float]:
    part = tokens[: -(-len(tokens) // 4)]
    whole = loss_of(model, part, kept=kept, batch_size=batch_size)
    way: Any = {"batch_size": batch_size, "progress": progress}
    without = losses_without(model, part, kept, kept=kept, **way)
    return {layer: loss - whole for layer, loss in without.items()}


def _cheapest(
    model: Any,
    tokens: Tensor,
    kept: Sequence[int],
    costs: dict[int, float],
    loss: float,
    batch_size: int,
    *,
    beside: set[int],
) -> int:
    """The layer to drop from `kept`, whose loss is `loss`; corrects the costs that it looks at."""
    waiting = sorted(kept, key=lambda layer: (layer not in beside, costs[layer]))
    number = len(waiting) if len(kept) <= _FEW else len(beside) + 1
    tried: list[int] = []
    while waiting and (not tried or min(map(costs.__getitem__, tried)) > costs[waiting[0]]):
        several, waiting, number = waiting[:number], waiting[number:], 1
        found = losses_without(model, tokens, several, kept=kept, batch_size=batch_size)
        costs.update({layer: without - loss for layer, without in found.items()})
        tried += several
    return min(tried, key=lambda layer: (costs[layer], layer))


def _beside(kept: Sequence[int], layer: int) -> set[int]:
    """The layers on either side of one of them."""
    at = kept.index(layer)
    return {*kept[max(0, at - _NEAR) : at], *kept[at + 1 : at + 1 + _NEAR]}


def falling_order(values: Sequence[float]) -> list[int]:
    """Layer ids by falling value; equal values keep their order."""
    return sorted(range(len(values)), key=lambda layer: -values[layer])


def nats_behind(model: Any, x: Tensor, layers: Sequence[int], targets: Tensor) -> float:
    """Sum of -log p of the targets (B, T), where a state (B, T, D) goes through these layers."""
    for layer in layers:
        x = run_block(model, x, layer)
    return nats(model, model.transformer.ln_f(x), targets)
