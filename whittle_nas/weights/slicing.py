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
        strip: (count, step, length) if the only gather keeps the first `length` of every `step`
            entries, `count` times, as grouped heads do: a view with one more dimension.
    """

    narrows: tuple[tuple[int, int], ...]
    gathers: tuple[tuple[int, torch.Tensor], ...]
    strip: tuple[int, int, int] | None = None


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
        strip = None
        if len(gathers) == 1:
            dim, ids = gathers[0]
            strip = _strip(ids.tolist(), axes.dim_size(full[dim], self.full_config))
        return Cut(tuple(narrows), tuple(gathers), strip)


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


def view_of(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The part of `take` that copies nothing; `copied` is the rest."""
    for dim, length in cut.narrows:
        tensor = tensor.narrow(dim, 0, length)
    if cut.strip is not None:
        dim, (count, step, length) = cut.gathers[0][0], cut.strip
        tensor = tensor.narrow(dim, 0, count * step).unflatten(dim, (count, step))
        tensor = tensor.narrow(dim + 1, 0, length)
    return tensor


def copied(view: torch.Tensor, cut: Cut) -> torch.Tensor:
    """What `take` gives, from `view_of`: one strided copy where the entries are regular.

    Half the time of `index_select` for the columns of grouped heads; with a gradient it is the
    other way round, so `take` does not use it.
    """
    if cut.strip is not None:
        return view.flatten(cut.gathers[0][0], cut.gathers[0][0] + 1)
    for dim, index in cut.gathers:
        view = view.index_select(dim, index)
    return view


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


def _strip(entries: Sequence[int], size: int) -> tuple[int, int, int] | None:
    """(count, step, length) of entries 0..length-1, step..step+length-1, ...; None if irregular.

    Also None if the last of the strips is not whole: query and value rows of a single group can
    look regular although the dimension ends after the value rows.
    """
    length = next((at for at, entry in enumerate(entries) if entry != at), len(entries))
    if not 0 < length < len(entries) or len(entries) % length:
        return None
    step, count = entries[length], len(entries) // length
    regular = [at * step + entry for at in range(count) for entry in range(length)]
    return (count, step, length) if list(entries) == regular and count * step <= size else None
