"""ShortGPT: drop the layers that turn the residual stream least (Men et al. 2024)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from whittle_nas.importance.layers import falling_order
from whittle_nas.importance.statistics import collect
from whittle_nas.progress import Progress, no_progress


def shortgpt(
    model: Any, tokens: Tensor, *, drop: int, batch_size: int = 4, progress: Progress = no_progress
) -> list[int]:
    """Layers that stay, ascending, by block importance: 1 - mean cosine of input and output.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        drop: how many layers go.
        batch_size: sequences per forward pass.
        progress: shows the passes.
    """
    scores = collect(model, tokens[:, :-1], batch_size=batch_size, progress=progress)
    return sorted(falling_order(scores.block_importance.tolist())[: model.config.n_layer - drop])
