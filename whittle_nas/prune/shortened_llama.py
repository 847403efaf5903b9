"""Shortened LLaMA: drop layers by perplexity without them, or by Taylor+ (Kim et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from whittle_nas.calibration import Stream, first_overflow
from whittle_nas.errors import ConfigError
from whittle_nas.importance.layers import falling_order, nats_behind
from whittle_nas.progress import Progress, no_progress
from whittle_nas.prune.gradients import block_products
from whittle_nas.prune.store import BlockStore

# Layers that Taylor+ never drops, at the beginning and at the end.
FIRST, LAST = 4, 2


def shortened_llama(
    model: Any,
    tokens: Tensor,
    *,
    drop: int,
    store: BlockStore | None = None,
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> tuple[list[int], list[float]]:
    """Layers that stay, ascending: those without which the loss is highest, all tried at once.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        drop: how many layers go.
        store: where the losses of finished layers are kept; those that it has are not measured.
        batch_size: sequences per forward pass.
        progress: shows the layers that are left out.

    Returns:
        The layers, and the loss without each of the model's layers in nats per token.

    Raises:
        ConfigError: if a loss is not finite, naming the layer.
    """
    count, device = model.config.n_layer, model.cos.device
    inputs, targets = tokens[:, :-1], tokens[:, 1:].to(device).split(batch_size)
    stream = Stream(model, inputs, batch_size=batch_size, device=device)
    losses = []
    for layer in progress(range(count), "leaving out layers", count):
        kept = None if store is None else store.get(layer)
        if kept is None:
            behind, total = range(layer + 1, count), 0.0
            with torch.inference_mode():
                for state, labels in zip(stream.states, targets, strict=True):
                    total += nats_behind(model, state.to(device), behind, labels)
            kept = {"loss": total / inputs.numel()}
            if not math.isfinite(kept["loss"]):
                without = f"the loss without transformer.h.{layer} is"
                raise first_overflow(model, inputs, otherwise=without, batch_size=batch_size)
            if store is not None:
                store.put(layer, kept)
        losses.append(kept["loss"])
        stream.run(model.transformer.h[layer], layer)  # all that follow share the layers before
    return sorted(falling_order(losses)[: count - drop]), losses


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
        ConfigError: if fewer layers than that may go, or an activation or a gradient is not finite.
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
