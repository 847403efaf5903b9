"""Layers of different sizes in a checkpoint whose layers are equal: zeros elsewhere.

A head or a neuron of zeros adds nothing, and zeros between the rotary pairs of a smaller head
change no score. So the padded model computes the same, at the size of its largest layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.space.rules import violations
from whittle_nas.space.subnetwork import Block, HeadChannels, SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.slicing import SlicePlan, plan_slices, sub_config


@dataclass(frozen=True)
class Padding:
    """Where the tensors of a network stand in a uniform model that holds it.

    Attributes:
        block: sizes of every layer of the uniform model.
        inner: the network as a sub-network of that model.
    """

    block: Block
    inner: SlicePlan

    @property
    def config(self) -> Any:
        """litgpt's config of the uniform model."""
        return self.inner.full_config


def plan_padding(plan: SlicePlan) -> Padding:
    """The smallest uniform model that holds a network.

    Raises:
        ConfigError: if zeros would change what the network computes.
    """
    whole, kept = plan.full_config, tuple(block.shape for block in plan.blocks)
    if hasattr(whole, "blocks"):
        whole = replace(whole, blocks=None)
    groups = max(1, *(block.n_query_groups for block in kept))
    ratio = max(block.n_head // max(1, block.n_query_groups) for block in kept) or 1
    neurons = max(1, *(block.intermediate_size for block in kept))
    inner = SubNetwork(plan.sub.n_embd, kept)
    for head_size in range(max(1, *(b.head_size for b in kept)), whole.head_size + 1):
        block = Block(groups * ratio, groups, head_size, neurons)
        hull = SubNetwork(plan.sub.n_embd, _in_layers(plan, block))
        config = sub_config(hull, whole, plan.layers)
        if not violations(hull, whole, HeadChannels.first) and not violations(inner, config):
            _check_norms(kept, block, config)
            return Padding(block, plan_slices(inner, config))
    sizes = sorted({block.head_size for block in kept if block.n_head})
    raise ConfigError(
        f"--pad true: no head of up to {whole.head_size} channels has the rotary frequencies of "
        f"heads of {', '.join(map(str, sizes))}"
    )


def _in_layers(plan: SlicePlan, block: Block) -> tuple[Block | None, ...]:
    """One block in every layer that a network keeps."""
    return tuple(block if layer in plan.layers else None for layer in range(len(plan.sub.blocks)))


def _check_norms(kept: tuple[Block, ...], block: Block, config: Any) -> None:
    """A norm over heads divides by the mean square of all their entries, zeros too."""
    alike = 2 if config.norm_qk and config.norm_qk_type == "default" else 0
    if config.norm_qk and any(b.n_head and b[alike:3] != block[alike:3] for b in kept):
        raise ConfigError(
            f"--pad true: zeros would change the norms of queries and keys of {config.name}; give "
            "all layers with attention the same heads"
        )


class Padded(Mapping[str, torch.Tensor]):
    """The state dict of the uniform model; every tensor is made when it is asked for."""

    def __init__(self, padding: Padding, tensors: Mapping[str, torch.Tensor]) -> None:
        """Wrap the network's own state dict."""
        self._inner, self._config, self._tensors = padding.inner, padding.config, tensors
        self._names = axes.parameter_names(padding.config)
        self._dtype = tensors["lm_head.weight"].dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        own = self._inner.kept_name(name)
        shape = axes.shape(name, self._config)
        if own is None:
            return torch.zeros(shape, dtype=self._dtype)
        tensor = self._tensors[own]
        if tuple(tensor.shape) == shape:
            return tensor
        padded = tensor.new_zeros(shape)
        entries = map(_entries, shape, self._inner.indices(own))
        # Every dimension's entries along a dimension of their own, as numpy's ix_ has them.
        places = [ids.view(-1, *[1] * (len(shape) - 1 - at)) for at, ids in enumerate(entries)]
        padded[tuple(places)] = tensor
        return padded

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _entries(size: int, index: Any) -> torch.Tensor:
    """Entries of a dimension: those listed, the first ones, or all."""
    return index if isinstance(index, torch.Tensor) else torch.arange(index or size)
