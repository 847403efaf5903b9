"""A narrower model out of the most important entries, without a second copy of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.orders import Orders
from whittle_nas.weights.slicing import SlicePlan, plan_slices


def narrowed(model: Any, orders: Orders, width: float) -> Any:
    """The model with its most important channels, heads and neurons only, and all its layers.

    Layers matter differently in the narrow networks that a search space is full of. Every part
    gathers its weights when it is called: a copy of them all would be half a model more.

    Args:
        model: `litgpt.GPT`.
        orders: what is important.
        width: share of every dimension but head size and depth, in (0, 1].
    """
    if width == 1:
        return model
    plan = plan_slices(narrowed_sizes(model.config, width), model.config)
    with torch.device("meta"):
        small: Any = type(model)(plan.config).eval()
    small.cos, small.sin = model.cos, model.sin
    blocks = [f"transformer.h.{layer}" for layer in range(model.config.n_layer)]
    for name in ("lm_head", "transformer.wte", "transformer.ln_f", *blocks):
        source = model.get_submodule(name)
        indices = {
            key: _entries(f"{name}.{key}", orders, plan, parameter.device)
            for key, parameter in source.named_parameters()
        }
        parent, _, child = name.rpartition(".")
        skeleton = small.get_submodule(name)
        small.get_submodule(parent)._modules[child] = _Gathered(skeleton, source, indices)
    return small


class _Gathered(nn.Module):
    """One part of a model, run with some entries of the weights of a larger one."""

    def __init__(
        self, skeleton: nn.Module, source: nn.Module, indices: dict[str, list[Tensor | None]]
    ) -> None:
        super().__init__()
        self._skeleton = skeleton
        self._source = (source,)  # in a tuple, so that it is not registered as a child
        self._indices = indices

    def forward(self, *args: Any) -> Tensor:
        weights: dict[str, Tensor] = dict(self._source[0].named_parameters())
        for name, indices in self._indices.items():
            for dim, index in enumerate(indices):
                if index is not None:
                    weights[name] = weights[name].index_select(dim, index)
        return functional_call(self._skeleton, weights, args, tie_weights=False)


def _entries(
    name: str, orders: Orders, plan: SlicePlan, device: torch.device
) -> list[Tensor | None]:
    """For each dimension of a parameter, the ids that a sub-network of the sorted model keeps."""
    selection, config = orders.selection(axes.split_layer(name)[0]), plan.full_config
    found: list[Tensor | None] = []
    for dim in axes.dims(name, config):
        ordered = axes.kept_entries(dim, selection, config)
        kept = axes.kept_entries(dim, plan.selection, config)
        if ordered is None or kept is None:  # vocabulary
            found.append(None)
        else:
            found.append(torch.tensor([ordered[i] for i in kept], device=device))
    return found


def narrowed_sizes(config: Any, width: float) -> SubNetwork:
    """Sizes of a network of that width; query groups stay where heads can go instead."""

    def part(size: int) -> int:
        return max(1, round(width * size))

    groups, per_group = config.n_query_groups, config.n_head // config.n_query_groups
    groups, per_group = (part(groups), 1) if per_group == 1 else (groups, part(per_group))
    return SubNetwork(
        n_embd=part(config.n_embd),
        n_head=groups * per_group,
        n_query_groups=groups,
        head_size=config.head_size,
        intermediate_size=part(config.intermediate_size),
        n_layer=config.n_layer,
    )
