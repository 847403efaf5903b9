"""Layers of different sizes in larger ones, which a format can hold: zeros elsewhere.

A head or a neuron of zeros adds nothing, and zeros between the rotary pairs of a smaller head
change no score. So the padded model computes the same, at the cost of its own sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.space.rules import violations
from whittle_nas.space.subnetwork import BLOCK_SIZES, Block, HeadChannels, SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.config import extended
from whittle_nas.weights.slicing import SlicePlan, plan_slices, sub_config


@dataclass(frozen=True)
class Padding:
    """Where the tensors of a network stand in a model of larger layers that holds it.

    Attributes:
        outer: sizes of the larger layers.
        inner: the network as a sub-network of that model.
    """

    outer: SubNetwork
    inner: SlicePlan

    @property
    def config(self) -> Any:
        """litgpt's config of the larger model."""
        return self.inner.full_config


Enlarge = Callable[[Sequence[Block], int], list[Block]]


def alike(blocks: Sequence[Block], head_size: int) -> list[Block]:
    """The smallest equal layers that hold some layers, with heads of a given size."""
    if any(any(block.forms) for block in blocks):
        raise ConfigError(
            "--pad true: equal layers can't hold a linear map in place of attention or MLP; "
            "nearest: leave it out"
        )
    groups = max(1, *(block.n_query_groups for block in blocks))
    ratio = max(block.n_head // max(1, block.n_query_groups) for block in blocks) or 1
    neurons = max(1, *(block.intermediate_size for block in blocks))
    return [Block(groups * ratio, groups, head_size, neurons)] * len(blocks)


def plan_padding(plan: SlicePlan, enlarge: Enlarge = alike) -> Padding:
    """The model of larger layers that holds a network, with the smallest heads that do.

    Args:
        plan: the network.
        enlarge: the layers that hold some layers, with heads of a given size.

    Raises:
        ConfigError: if zeros would change what the network computes.
    """
    whole, kept = plan.full_config, tuple(block.shape.plain for block in plan.blocks)
    if hasattr(whole, "blocks"):
        whole = replace(whole, blocks=None)
    inner = SubNetwork(plan.sub.n_embd, kept)
    for head_size in range(max(1, *(b.head_size for b in kept)), whole.head_size + 1):
        outer = SubNetwork(plan.sub.n_embd, tuple(enlarge(kept, head_size)))
        heads = Block(1, 1, head_size, 1)
        alone = SubNetwork(plan.sub.n_embd, _in_layers(plan, heads))
        config = sub_config(alone, whole, plan.layers)
        config = _config(outer, config)
        if not violations(alone, whole, HeadChannels.first) and not violations(inner, config):
            _check_norms(kept, outer.blocks, config)
            return Padding(outer, plan_slices(inner, config))
    sizes = sorted({block.head_size for block in kept if block.n_head})
    raise ConfigError(
        f"--pad true: no head of up to {whole.head_size} channels has the rotary frequencies of "
        f"heads of {', '.join(map(str, sizes))}"
    )


def _config(outer: SubNetwork, config: Any) -> Any:
    """The config of larger layers; those of `config` have heads of their size."""
    if (sizes := outer.sizes()) is not None:
        return replace(config, **{name: sizes[name] for name in BLOCK_SIZES})
    assert None not in outer.blocks
    columns = zip(*(block.sizes for block in outer.blocks if block), strict=True)
    largest = dict(zip(BLOCK_SIZES, map(max, columns), strict=True))
    config = replace(config, **{**largest, "n_query_groups": largest["n_head"]})
    return extended(config, blocks=outer.blocks)


def _in_layers(plan: SlicePlan, block: Block) -> tuple[Block | None, ...]:
    """One block in every layer that a network keeps."""
    return tuple(block if layer in plan.layers else None for layer in range(len(plan.sub.blocks)))


def _check_norms(kept: Sequence[Block], outer: Sequence[Block | None], config: Any) -> None:
    """A norm over heads divides by the mean square of all their entries, zeros too."""
    first = 2 if config.norm_qk and config.norm_qk_type == "default" else 0
    pairs = zip(kept, outer, strict=True)
    if config.norm_qk and any(of and b.n_head and b[first:3] != of[first:3] for b, of in pairs):
        raise ConfigError(
            f"--pad true: zeros would change the norms of queries and keys of {config.name}; give "
            "all layers with attention the same heads"
        )


class Padded(Mapping[str, torch.Tensor]):
    """The state dict of the larger model; every tensor is made when it is asked for."""

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
