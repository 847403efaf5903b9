"""Narrow networks of a sorted model, in which layers and norms are judged."""

from __future__ import annotations

from typing import Any

from whittle_nas.space.subnetwork import Block, SubNetwork


def narrowed_sizes(config: Any, width: float) -> SubNetwork:
    """Sizes of a network of that width with all layers, in (0, 1]; head size stays.

    Query groups stay where heads can go instead.
    """

    def part(size: int) -> int:
        return max(1, round(width * size))

    groups, per_group = config.n_query_groups, config.n_head // config.n_query_groups
    groups, per_group = (part(groups), 1) if per_group == 1 else (groups, part(per_group))
    block = Block(groups * per_group, groups, config.head_size, part(config.intermediate_size))
    return SubNetwork(part(config.n_embd), (block,) * config.n_layer)


def narrowed_stream(config: Any, width: float) -> SubNetwork:
    """A network with fewer residual stream channels, and everything else."""
    whole = SubNetwork.from_config(config)
    return SubNetwork(max(1, round(width * config.n_embd)), whole.blocks)
