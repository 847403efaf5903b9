"""Importance from the weights alone: the sum of |w| over all weights that touch an entry.

The simplest baseline there is (methods: magnitude order). Embedding channels, neurons, heads and
head channels only; a layer's weights say little about whether the model needs it. D, F, G, H, K, L
as in litgpt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whittle_nas.importance.scores import Scores
from whittle_nas.weights import axes
from whittle_nas.weights.axes import Axis


def by_magnitude(scores: Scores, model: Any) -> Scores:
    """The scores of a model with all but `block_importance` replaced by sums of |w|.

    Args:
        scores: what was measured; gives the shapes.
        model: `litgpt.GPT`.
    """
    config = model.config
    totals = {name: torch.zeros_like(tensor) for name, tensor in scores.to_dict().items()}
    totals["block_importance"] = scores.block_importance
    for name, weight in model.named_parameters():
        layer, _ = axes.split_layer(name)
        for position, dim in enumerate(axes.dims(name, config)):
            others = [other for other in range(weight.dim()) if other != position]
            sums = weight.detach().abs()
            sums = sums.sum(others, dtype=torch.float32) if others else sums.float()
            parts = sums.cpu().split([axes.axis_size(axis, config) for axis in dim])
            for axis, part in zip(dim, parts, strict=True):
                _add(totals, axis, part, layer, config)
    return replace(scores, **totals)


def _add(
    totals: dict[str, Tensor], axis: Axis, sums: Tensor, layer: int | None, config: Any
) -> None:
    """Add the sums of one axis to every score that they belong to."""
    if axis is Axis.EMBD:
        totals["embd"] += sums
    elif axis is Axis.MLP:
        totals["neurons"][layer] += sums
    elif axis in (Axis.QUERY, Axis.HEADS, Axis.KEY, Axis.VALUE):
        rows = sums.unflatten(0, (config.n_query_groups, -1, config.head_size))  # (G, H / G, K)
        totals["groups"][layer] += rows.sum((1, 2))
        if axis in (Axis.QUERY, Axis.HEADS):
            totals["heads"][layer] += rows.sum(2)
        if axis in (Axis.HEADS, Axis.VALUE):
            totals["value_channels"][layer] += rows.sum(1)
        else:
            totals["qk_channels"][layer] += rows.sum(1)[:, config.rope_n_elem :]
