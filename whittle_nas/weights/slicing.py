"""Sub-network weights as slices of the super-network's, and the sub-network's own config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from whittle_nas.space.rules import check, check_supported
from whittle_nas.space.subnetwork import HeadChannels, SubNetwork
from whittle_nas.weights import axes

Index = int | torch.Tensor | None  # first entries | these entries | all


@dataclass(frozen=True)
class Cut:
    """How to take a slice out of a full tensor; ready to run thousands of times.

    Attributes:
        narrows: (dimension, length): keep the first entries, as a view.
        gathers: (dimension, ids): keep these entries, as a copy.
    """

    narrows: tuple[tuple[int, int], ...]
    gathers: tuple[tuple[int, torch.Tensor], ...]


@dataclass(frozen=True)
class SlicePlan:
    """Everything that running or extracting one sub-network needs besides the weights.

    Attributes:
        sub: the sizes.
        config: the sub-network's own litgpt config.
        layers: ids of the kept layers, ascending; layer i of the sub-network is `layers[i]`.
        selection: the kept entries, the same in every layer.
    """

    sub: SubNetwork
    config: Any
    layers: tuple[int, ...]
    selection: axes.Selection
    full_config: Any

    def source_name(self, name: str) -> str:
        """The super-network's name of a parameter of the sub-network."""
        layer, rest = axes.split_layer(name)
        return name if layer is None else f"transformer.h.{self.layers[layer]}.{rest}"

    def indices(self, name: str, device: torch.device | None = None) -> tuple[Index, ...]:
        """For each dimension of a parameter: which entries it keeps."""
        return tuple(
            _index(axes.kept_entries(dim, self.selection, self.full_config), device)
            for dim in axes.dims(name, self.full_config)
        )

    def cut(self, name: str, device: torch.device | None = None) -> Cut:
        """How to slice the full parameter; dimensions that stay whole need no step."""
        narrows, gathers = [], []
        full = axes.dims(name, self.full_config)
        for dim, index in enumerate(self.indices(name, device)):
            if isinstance(index, torch.Tensor):
                gathers.append((dim, index))
            elif index is not None and index != axes.dim_size(full[dim], self.full_config):
                narrows.append((dim, index))
        return Cut(tuple(narrows), tuple(gathers))


def plan_slices(
    sub: SubNetwork,
    config: Any,
    *,
    layer_order: Sequence[int] | None = None,
    head_channels: HeadChannels = HeadChannels.rope,
) -> SlicePlan:
    """Resolve a sub-network of the model of `config`.

    Args:
        sub: sizes.
        config: the super-network's `litgpt.Config` (or `litgpt.lora.Config`).
        layer_order: layer ids, most important first; default: the first layers are.
        head_channels: how a smaller head chooses its query and key channels.

    Raises:
        ConfigError: if the sizes do not fit, naming each violated rule.
    """
    check_supported(config)
    check(sub, config, head_channels)
    order = range(config.n_layer) if layer_order is None else layer_order
    layers = tuple(sorted(order[: sub.n_layer]))
    return SlicePlan(
        sub=sub,
        config=sub_config(sub, config, layers),
        layers=layers,
        selection=axes.prefix_selection(sub, config, head_channels),
        full_config=config,
    )


def sub_config(sub: SubNetwork, config: Any, layers: Sequence[int]) -> Any:
    """The litgpt config of a sub-network.

    The name stays, since litgpt chooses Gemma's and OLMo's norms, converters and prompt styles by
    it. The attention scale stays 1/sqrt(full head size); per-layer settings are re-indexed.
    """
    changed: dict[str, Any] = sub.to_dict()
    if sub.head_size != config.head_size and config.attention_scores_scalar is None:
        changed["attention_scores_scalar"] = config.head_size
    for per_layer in ("sliding_window_indices", "rope_indices"):
        values = getattr(config, per_layer)
        if values is not None:
            changed[per_layer] = [values[layer] for layer in layers]
    return replace(config, **changed)


def take(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The entries of `tensor` that a cut keeps: a view, unless one dimension needs a gather."""
    for dim, length in cut.narrows:
        tensor = tensor.narrow(dim, 0, length)
    for dim, index in cut.gathers:  # after narrowing, so that less is copied
        tensor = tensor.index_select(dim, index)
    return tensor


def slice_state_dict(
    plan: SlicePlan, tensors: Mapping[str, torch.Tensor], names: Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    """State dict of a sub-network, as views of `tensors` wherever possible.

    Args:
        plan: the resolved sub-network.
        tensors: the super-network's parameters by litgpt name.
        names: parameters of the sub-network; default: those of a plain `litgpt.GPT`.
    """
    cache: dict[str, Cut] = {}
    found = {}
    for name in axes.parameter_names(plan.config) if names is None else names:
        rest = axes.split_layer(name)[1]
        tensor = tensors[plan.source_name(name)]
        if rest not in cache:
            cache[rest] = plan.cut(name, tensor.device)
        found[name] = take(tensor, cache[rest])
    return found


def _index(entries: Sequence[int] | None, device: torch.device | None) -> Index:
    if entries is None:
        return None
    length = axes.prefix_length(entries)
    return torch.tensor(entries, device=device) if length is None else length
