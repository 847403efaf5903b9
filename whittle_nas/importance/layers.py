"""Which layers carry the model: losses without them, and greedy dropping.

B sequences, T tokens, D channels, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whittle_nas.calibration import embed, run_block
from whittle_nas.progress import Progress, no_progress

# Logits that exist at a time, in elements; 2^24 float32 are 64 MiB.
_CHUNK = 2**24


def losses_without_each(
    model: Any, tokens: Tensor, *, kept: Sequence[int], batch_size: int = 4
) -> list[float]:
    """Loss of the model made of the layers `kept`, less each of them in turn.

    All candidates share the layers before the one that they leave out, so that m of them cost
    m^2 / 2 layers.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        kept: ids of the layers that are there, ascending.
        batch_size: sequences per forward pass.

    Returns:
        Mean nats per token, in the order of `kept`.
    """
    device = model.cos.device
    totals = torch.zeros(len(kept), dtype=torch.float64)
    with torch.inference_mode():
        for batch in tokens.split(batch_size):
            ids = batch.to(device)
            x, targets = embed(model, ids[:, :-1]), ids[:, 1:]
            for at, layer in enumerate(kept):
                rest = x
                for later in kept[at + 1 :]:
                    rest = run_block(model, rest, later)
                totals[at] += _loss(model, rest, targets)
                x = run_block(model, x, layer)
    return (totals / tokens[:, 1:].numel()).tolist()


def greedy_order(
    model: Any, tokens: Tensor, *, batch_size: int = 4, progress: Progress = no_progress
) -> tuple[list[int], list[float]]:
    """Drop the layer whose loss hurts least, again and again.

    Returns:
        Layer ids, the one dropped last first; and for every layer the loss in nats per token that
        the model had just after it was dropped.
    """
    kept = list(range(model.config.n_layer))
    dropped, losses = [], [0.0] * len(kept)
    for _ in progress(range(len(kept)), "dropping layers", len(kept)):
        without = losses_without_each(model, tokens, kept=kept, batch_size=batch_size)
        at = min(range(len(kept)), key=without.__getitem__)
        losses[kept[at]] = without[at]
        dropped.append(kept.pop(at))
    return dropped[::-1], losses


def falling_order(values: Sequence[float]) -> list[int]:
    """Layer ids by falling value; equal values keep their order."""
    return sorted(range(len(values)), key=lambda layer: -values[layer])


def _loss(model: Any, x: Tensor, targets: Tensor) -> float:
    """Sum of -log p of the targets (B, T) in nats."""
    hidden, labels = model.transformer.ln_f(x).flatten(0, 1), targets.flatten()
    rows = max(1, _CHUNK // model.config.padded_vocab_size)
    cap = model.config.final_logit_softcapping
    total = torch.zeros((), device=x.device)
    for part, label in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = model.lm_head(part).float()  # (rows, V)
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        total += F.cross_entropy(logits, label, reduction="sum")
    return total.item()
