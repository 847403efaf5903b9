"""Orders of importance, and permuting weights by them with the axes table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from whittle_nas.weights import axes


@dataclass(frozen=True)
class LayerOrder:
    """Entries of one layer, most important first.

    Attributes:
        neurons: (F,) neuron ids.
        groups: (G,) query group ids.
        heads: (G, H/G) heads of every group, counted inside the group; row g is group g.
        qk_channels: (G, K) query and key channels of every group. Rotary channels must stay where
            they are; only channels that are not rotated may move.
        value_channels: (G, K) value channels of every group.
    """

    neurons: Sequence[int]
    groups: Sequence[int]
    heads: Sequence[Sequence[int]]
    qk_channels: Sequence[Sequence[int]]
    value_channels: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Orders:
    """How a whole model is sorted. Layers keep their places, so their order is not part of it.

    Attributes:
        embd: (D,) residual stream channels, the same for all layers, which share the stream.
        layers: one `LayerOrder` per layer.
    """

    embd: Sequence[int]
    layers: Sequence[LayerOrder]

    def selection(self, layer: int | None) -> axes.Selection:
        """All entries of one layer in their new order."""
        order = self.layers[layer or 0]
        return axes.Selection(
            embd=self.embd,
            neurons=order.neurons,
            groups=order.groups,
            heads=[order.heads[group] for group in order.groups],
            qk_channels=[order.qk_channels[group] for group in order.groups],
            value_channels=[order.value_channels[group] for group in order.groups],
        )


def permute(name: str, tensor: torch.Tensor, orders: Orders, config: Any) -> torch.Tensor:
    """A parameter with its entries in the new order; the model's outputs stay the same.

    Args:
        name: parameter name as in `litgpt.GPT.state_dict()`.
        tensor: the parameter.
        orders: how to sort.
        config: `litgpt.Config` of the model.
    """
    layer, _ = axes.split_layer(name)
    selection = orders.selection(layer)
    for axis, dim in enumerate(axes.dims(name, config)):
        entries = axes.kept_entries(dim, selection, config)
        if entries is not None and axes.prefix_length(entries) is None:
            tensor = tensor.index_select(axis, torch.tensor(entries, device=tensor.device))
    return tensor
