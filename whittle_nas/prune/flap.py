"""FLAP: what fluctuates little goes, and a bias keeps its mean (An et al. 2024).

D channels, G query groups, F neurons, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whittle_nas.calibration import Moments, Stream, walk
from whittle_nas.progress import Progress, no_progress
from whittle_nas.prune.structure import Structure, check_heads, group_columns
from whittle_nas.weights.axes import is_gated

_INPUTS = ("attn.proj", "mlp.proj")


@dataclass(frozen=True)
class Flap:
    """What stays, and what makes up for the rest.

    Attributes:
        structure: groups and neurons that stay.
        biases: by layer and module (`attn.proj`, `mlp.proj`), W mean_j summed over what goes (D,).
    """

    structure: Structure
    biases: tuple[dict[str, Tensor], ...]


def flap(
    model: Any,
    stream: Stream,
    *,
    share: float,
    progress: Progress = no_progress,
) -> Flap:
    """Score by the variance of inputs times the norm of their columns, one threshold for all.

    WIFV_j = Var_tokens(X_j) ||W_:j||^2 for the inputs of `attn.proj` and `mlp.proj`, standardised
    in every layer and module; a group counts by the mean over its channels.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        stream: calibration text at its first block.
        share: of the weights of heads and neurons that goes.
        progress: shows the blocks.

    Raises:
        ConfigError: if an activation is not finite, or heads can't go one by one.
    """
    config = model.config
    check_heads(config, "flap")
    seen: list[Mapping[str, Any]] = []
    scores: list[dict[str, Tensor]] = []

    def score(_layer: int, block: Any, statistics: Mapping[str, Any]) -> Any:
        seen.append(statistics)
        weights = {name: block.get_submodule(name).weight for name in _INPUTS}
        scores.append({n: standardised(fluctuation(w, statistics[n])) for n, w in weights.items()})
        return block

    walk(
        model,
        stream,
        score,
        watch=lambda _block: {name: Moments() for name in _INPUTS},
        sequential=False,  # one threshold for all: nothing is pruned before all layers are scored
        progress=progress,
        label="scoring blocks",
    )
    structure = _threshold(scores, config, share)
    biases = []
    for layer, statistics in enumerate(seen):
        block = model.transformer.h[layer]
        heads = [group_columns(config, group) for group in structure.groups[layer]]
        kept = {"attn.proj": heads, "mlp.proj": [list(structure.neurons[layer])]}
        biases.append(
            {
                name: compensation(block.get_submodule(name).weight, statistics[name].mean, parts)
                for name, parts in kept.items()
            }
        )
    return Flap(structure, tuple(biases))


def fluctuation(weight: Tensor, inputs: Moments) -> Tensor:
    """WIFV of every input (C,) of a weight (D, C)."""
    return inputs.variance() * weight.double().square().sum(0)


def standardised(scores: Tensor) -> Tensor:
    """Scores (C,) less their mean, over their standard deviation."""
    return (scores - scores.mean()) / scores.std().clamp(min=1e-30)


def compensation(weight: Tensor, mean: Tensor, kept: list[Any]) -> Tensor:
    """W times the mean input where inputs go (D,).

    Args:
        weight: (D, C).
        mean: of the inputs, (C,).
        kept: slices or lists of the inputs that stay.
    """
    gone = mean.clone()
    for part in kept:
        gone[part] = 0
    return (weight.double() @ gone).to(weight.dtype)


def _threshold(scores: list[dict[str, Tensor]], config: Any, share: float) -> Structure:
    """Keep the best units of all layers until their weights are 1 - share of all units' weights."""
    heads = config.n_head // config.n_query_groups
    costs = {  # of one unit, in rows and columns of length D
        "attn.proj": (2 * heads + 2) * config.head_size,
        "mlp.proj": 3 if is_gated(config) else 2,
    }
    units = []
    for layer, found in enumerate(scores):
        columns = [group_columns(config, group) for group in range(config.n_query_groups)]
        groups = torch.stack([found["attn.proj"][part].mean() for part in columns])
        for name, values in (("attn.proj", groups), ("mlp.proj", found["mlp.proj"])):
            best = int(values.argmax())  # one of each stays, whatever it scores
            units += [
                (unit != best, -value, layer, name, unit)
                for unit, value in enumerate(values.tolist())
            ]
    budget = (1 - share) * sum(costs[name] for *_, name, _ in units)
    kept: dict[str, list[list[int]]] = {name: [[] for _ in scores] for name in costs}
    spent = 0.0
    for may_go, _, layer, name, unit in sorted(units):
        if may_go and spent + costs[name] / 2 > budget:
            break
        spent += costs[name]
        kept[name][layer].append(unit)
    return Structure(*(tuple(tuple(sorted(ids)) for ids in kept[name]) for name in costs))
