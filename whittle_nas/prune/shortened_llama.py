"""Shortened LLaMA: drop layers by perplexity without them, or by Taylor+ (Kim et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.importance.layers import falling_order, losses_without
from whittle_nas.progress import Progress, no_progress
from whittle_nas.prune.gradients import block_products

# Layers that Taylor+ never drops, at the beginning and at the end.
FIRST, LAST = 4, 2


def shortened_llama(
    model: Any, tokens: Tensor, *, drop: int, batch_size: int = 4, progress: Progress = no_progress
) -> tuple[list[int], list[float]]:
    """Layers that stay, ascending: those without which the loss is highest, all tried at once.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        drop: how many layers go.
        batch_size: sequences per forward pass.
        progress: shows the batches.

    Returns:
        The layers, and the loss without each of the model's layers in nats per token.
    """
    layers = range(model.config.n_layer)
    way: Any = {"batch_size": batch_size, "progress": progress}
    found = losses_without(model, tokens, layers, kept=layers, **way)
    losses = [found[layer] for layer in layers]
    return sorted(falling_order(losses)[: len(layers) - drop]), losses


def shortened_llama_taylor(
    model: Any,
    tokens: Tensor,
    *,
    drop: int,
    first: int = FIRST,
    last: int = LAST,
    progress: Progress = no_progress,
) -> tuple[list[int], list[float]]:
    """Layers that stay, ascending, by sum |w dL/dw| over all weights of the layer.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        drop: how many layers go.
        first: layers at the beginning that stay whatever they score.
        last: the same at the end.
        progress: shows the passes.

    Returns:
        The layers, and the score of each of the model's layers.

    Raises:
        ConfigError: if fewer layers than that may go.
    """
    count = model.config.n_layer
    if drop > count - first - last:
        raise ConfigError(
            f"--sparsity would drop {drop} of {count} layers, but Taylor+ protects the first "
            f"{first} and the last {last}"
        )
    products = block_products(model, tokens, progress=progress)
    scores = [sum(float(p.abs().sum()) for p in products(layer).values()) for layer in range(count)]
    guarded = [
        math.inf if layer < first or layer >= count - last else score
        for layer, score in enumerate(scores)
    ]
    return sorted(falling_order(guarded)[: count - drop]), scores
