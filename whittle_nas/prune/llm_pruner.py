"""LLM-Pruner: coupled weights go together, by first-order Taylor scores (Ma et al. 2023).

A query group is coupled through its heads' rows and columns, a neuron through all that reads and
writes it. D channels, G query groups, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.progress import Progress, no_progress
from whittle_nas.prune.gradients import reduced_products
from whittle_nas.prune.structure import Structure, check_heads, group_columns, group_rows, whole

# Layers that stay whole, at the beginning and at the end.
FIRST, LAST = 4, 2


def llm_pruner(
    model: Any,
    tokens: Tensor,
    *,
    share: float,
    first: int = FIRST,
    last: int = LAST,
    progress: Progress = no_progress,
) -> Structure:
    """What stays: in every layer of a range the groups and neurons of highest |sum w dL/dw|.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        share: of the groups, and of the neurons, that goes in the layers of the range.
        first: layers at the beginning that stay whole.
        last: the same at the end.
        progress: shows the passes.

    Raises:
        ConfigError: if no layer is left to prune, or a gradient is not finite.
    """
    config = model.config
    check_heads(config, "llm_pruner")
    layers = range(first, config.n_layer - last)
    if not layers:
        raise ConfigError(
            f"--protect_first {first} and --protect_last {last} leave none of the "
            f"{config.n_layer} layers to prune"
        )
    products = reduced_products(model, tokens, _by_unit, progress=progress)
    everything = whole(config)
    groups, neurons = list(everything.groups), list(everything.neurons)
    for layer in layers:
        found = products(layer)
        groups[layer] = _best(group_scores(found, config), share)
        neurons[layer] = _best(neuron_scores(found), share)
    return Structure(tuple(groups), tuple(neurons))


def _by_unit(name: str, product: Tensor) -> Tensor:
    """Sums of w dL/dw over the other side of a matrix: units are rows, of what writes columns."""
    if product.dim() == 1:
        return product
    return product.sum(0 if name.endswith("proj.weight") else 1)


def group_scores(sums: Mapping[str, Tensor], config: Any) -> Tensor:
    """|sum w dL/dw| over the rows and columns of every query group (G,)."""
    rows, columns = sums["attn.qkv.weight"], sums["attn.proj.weight"]
    if "attn.qkv.bias" in sums:
        rows = rows + sums["attn.qkv.bias"]
    scores = [
        sum(rows[part].sum() for part in group_rows(config, group))
        + columns[group_columns(config, group)].sum()
        for group in range(config.n_query_groups)
    ]
    return torch.stack([torch.as_tensor(score) for score in scores]).abs()


def neuron_scores(sums: Mapping[str, Tensor]) -> Tensor:
    """|sum w dL/dw| over what reads and writes every neuron (F,)."""
    readers = [found for name, found in sums.items() if name.startswith("mlp.fc")]
    return (sums["mlp.proj.weight"] + sum(readers)).abs()


def _best(scores: Tensor, share: float) -> tuple[int, ...]:
    """Ids of all but the share of lowest scores, at least one, ascending."""
    count = max(1, len(scores) - round(share * len(scores)))
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))
