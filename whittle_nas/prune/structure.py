"""Heads and neurons that stay, different from layer to layer, as a checkpoint.

D channels, G query groups, Q heads per group, K channels per head, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.space import Block, SubNetwork
from whittle_nas.weights import axes


@dataclass(frozen=True)
class Structure:
    """What stays of every layer, ascending ids; at least one group and one neuron.

    Attributes:
        groups: query groups, with all their heads.
        neurons: of the MLP.
    """

    groups: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]


def whole(config: Any) -> Structure:
    """Everything stays."""
    layers = range(config.n_layer)
    return Structure(
        tuple(tuple(range(config.n_query_groups)) for _ in layers),
        tuple(tuple(range(config.intermediate_size)) for _ in layers),
    )


def check_heads(config: Any, method: str) -> None:
    """Refuse a model whose heads can't go one by one.

    Raises:
        ConfigError: for a norm over all queries.
    """
    if config.norm_qk and config.norm_qk_type == "olmo2":
        raise ConfigError(
            f"--method {method} can't take heads out of {config.name!r}: its query norm spans them"
        )


def group_columns(config: Any, group: int) -> slice:
    """Inputs of `attn.proj` that the heads of a query group make."""
    width = config.n_head // config.n_query_groups * config.head_size
    return slice(group * width, (group + 1) * width)


def group_rows(config: Any, group: int) -> list[slice]:
    """Rows of `attn.qkv` that belong to a query group: queries, keys and values."""
    size, query = config.head_size, config.n_head * config.head_size
    key, value = query + group * size, query + (config.n_query_groups + group) * size
    return [group_columns(config, group), slice(key, key + size), slice(value, value + size)]


def narrowed_config(structure: Structure, config: Any) -> Any:
    """The litgpt config whose layers have room for what stays of the largest layer."""
    groups = max(map(len, structure.groups))
    return replace(
        config,
        n_query_groups=groups,
        n_head=groups * (config.n_head // config.n_query_groups),
        intermediate_size=max(map(len, structure.neurons)),
    )


def shape_of(structure: Structure, config: Any) -> SubNetwork:
    """What stays, as a sub-network of the model of `narrowed_config`: it needs no zeros."""
    heads = config.n_head // config.n_query_groups
    sizes = zip(map(len, structure.groups), map(len, structure.neurons), strict=True)
    blocks = [Block(heads * groups, groups, config.head_size, width) for groups, width in sizes]
    return SubNetwork(config.n_embd, tuple(blocks))


class NarrowedTensors(Mapping[str, Tensor]):
    """The state dict of `narrowed_config`: in every layer what stays, then zeros.

    Each tensor is made when it is asked for, so that no second model is in memory.
    """

    def __init__(self, structure: Structure, tensors: Mapping[str, Tensor], config: Any) -> None:
        """Cut a model.

        Args:
            structure: what stays.
            tensors: state dict of the model.
            config: its litgpt config.
        """
        self._structure, self._tensors, self._config = structure, tensors, config
        self._room = narrowed_config(structure, config)

    def __getitem__(self, name: str) -> Tensor:
        return _narrowed(name, self._tensors[name], self._structure, self._config, self._room)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _narrowed(name: str, tensor: Tensor, structure: Structure, config: Any, room: Any) -> Tensor:
    layer, _ = axes.split_layer(name)
    if layer is None:
        return tensor
    groups, neurons = structure.groups[layer], structure.neurons[layer]
    kept = _selection(groups, neurons, config)
    filled = _selection(
        (*groups, *_others(groups, config.n_query_groups))[: room.n_query_groups],
        (*neurons, *_others(neurons, config.intermediate_size))[: room.intermediate_size],
        config,
    )
    for at, dim in enumerate(axes.dims(name, config)):
        entries = axes.kept_entries(dim, filled, config)
        stays = axes.kept_entries(dim, kept, config)
        if entries is None or stays is None or axes.Axis.EMBD in dim or axes.Axis.CHANNEL in dim:
            continue
        there = torch.isin(torch.tensor(list(entries)), torch.tensor(list(stays)))
        shape = [-1 if dimension == at else 1 for dimension in range(tensor.dim())]
        tensor = tensor.index_select(at, torch.tensor(list(entries))) * there.view(shape)
    return tensor


def _others(kept: tuple[int, ...], count: int) -> list[int]:
    return sorted(set(range(count)) - set(kept))


def _selection(groups: tuple[int, ...], neurons: tuple[int, ...], config: Any) -> axes.Selection:
    channels = [range(config.head_size)] * len(groups)
    return axes.Selection(
        embd=range(config.n_embd),
        neurons=neurons,
        groups=groups,
        heads=[range(config.n_head // config.n_query_groups)] * len(groups),
        qk_channels=channels,
        value_channels=channels,
    )
