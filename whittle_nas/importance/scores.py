"""Scores and orders as values. L layers, D, F, G, H, K as in litgpt, Q = H / G heads per group."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from whittle_nas.importance.options import Scope
from whittle_nas.weights.bases import Bases, LayerBasis


@dataclass(frozen=True)
class Scores:
    """One float32 score per entry on the CPU, higher = more important.

    Attributes:
        embd: (D,) residual stream channels, over all norms of the model.
        neurons: (L, F).
        groups: (L, G) query groups.
        heads: (L, G, Q) heads of every group.
        value_channels: (L, G, K) channels of value and attention output.
        qk_channels: (L, G, R) query and key channels that RoPE leaves alone, R = K - rope_n_elem.
        block_importance: (L,) 1 - mean cosine of the residual stream before and after the layer.
    """

    embd: Tensor
    neurons: Tensor
    groups: Tensor
    heads: Tensor
    value_channels: Tensor
    qk_channels: Tensor
    block_importance: Tensor

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def rank(scores: Scores, config: Any, *, scope: Scope = Scope.layer) -> Bases:
    """Bases by falling score; equal scores keep their order.

    Args:
        scores: scores of the model.
        config: `litgpt.Config` of the model.
        scope: `global` gives all layers one order, by the mean of their scores.
    """
    if scope is Scope["global"]:
        scores = _shared(scores)
    if config.norm_qk and config.norm_qk_type == "default":
        # One norm weight serves all heads, so their channels must move together.
        shared = scores.qk_channels.mean(1, keepdim=True).expand_as(scores.qk_channels)
        scores = replace(scores, qk_channels=shared)
    return Bases(
        embd=_falling(scores.embd).tolist(),
        layers=[_rank_layer(scores, layer, config) for layer in range(config.n_layer)],
    )


def _rank_layer(scores: Scores, layer: int, config: Any) -> LayerBasis:
    rotary = list(range(config.rope_n_elem))
    unrotated = _falling(scores.qk_channels[layer]) + config.rope_n_elem
    return LayerBasis(
        neurons=_falling(scores.neurons[layer]).tolist(),
        groups=_falling(scores.groups[layer]).tolist(),
        heads=_falling(scores.heads[layer]).tolist(),
        qk_channels=[rotary + free for free in unrotated.tolist()],
        value_channels=_falling(scores.value_channels[layer]).tolist(),
    )


def _falling(scores: Tensor) -> Tensor:
    return torch.argsort(scores, dim=-1, descending=True, stable=True)


def _shared(scores: Scores) -> Scores:
    """Every layer with the mean scores of all layers."""
    per_layer = ("neurons", "groups", "heads", "value_channels", "qk_channels")
    means = {name: getattr(scores, name).mean(0, keepdim=True) for name in per_layer}
    return replace(
        scores, **{name: mean.expand_as(getattr(scores, name)) for name, mean in means.items()}
    )
