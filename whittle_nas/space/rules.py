"""Which sizes a sub-network of a given `litgpt.Config` may have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.space.subnetwork import BLOCK_SIZES, Block, HeadChannels, SubNetwork


def check_supported(config: Any) -> None:
    """Refuse the architectures whose weights the axes table does not describe.

    Raises:
        ConfigError: for mixture-of-experts and latent-attention models.
    """
    if config.mlp_class_name == "LLaMAMoE":
        raise ConfigError(
            f"model {config.name!r} is a mixture of experts (mlp_class_name=LLaMAMoE), which is "
            "not supported; dense litgpt models are"
        )
    if config.latent_attention is not None:
        raise ConfigError(
            f"model {config.name!r} uses latent attention, which is not supported; multi-head, "
            "grouped-query and multi-query attention are"
        )


def rope_n_elem(config: Any, head_size: int) -> int:
    """Rotary channels of a head of `head_size` channels, as litgpt computes them."""
    return int(config.rotary_percentage * head_size)


def of_layer(config: Any, layer: int | None) -> Any:
    """The config whose sizes are those of one layer; a part that it lacks has the model's.

    Args:
        config: litgpt config; the same comes back unless its layers have sizes of their own.
        layer: which one; None for what is outside the layers.
    """
    blocks = getattr(config, "blocks", None)
    if blocks is None or layer is None:
        return config
    own, block = copy.copy(config), blocks[layer]
    own.blocks = None
    if block.n_head:
        own.n_head, own.n_query_groups, own.head_size = block[:3]
        own.rope_n_elem = rope_n_elem(own, own.head_size)
    if block.intermediate_size:
        own.intermediate_size = block.intermediate_size
    return own


def violations(
    sub: SubNetwork, config: Any, head_channels: HeadChannels = HeadChannels.rope
) -> list[str]:
    """Every rule that `sub` breaks as a part of the model of `config`; empty if it fits.

    Args:
        sub: sizes to check.
        config: the `litgpt.Config` of the super-network.
        head_channels: how a smaller head chooses its query and key channels.
    """
    if len(sub.blocks) != config.n_layer:
        return [f"there are {len(sub.blocks)} blocks, the model has n_layer={config.n_layer}"]
    broken = _out_of_range({"n_embd": sub.n_embd, "n_layer": sub.n_layer}, config)
    blocks = getattr(config, "blocks", None)
    if blocks is None:
        for block in sub.shapes:
            broken += _block_violations(block, config, head_channels)
        return list(dict.fromkeys(broken))
    for layer, (block, whole) in enumerate(zip(sub.blocks, blocks, strict=True)):
        if block is not None:
            found = _block_violations(block, of_layer(config, layer), head_channels)
            sizes = (("attention", "n_head"), ("MLP", "intermediate_size"))
            for (part, size), form, own in zip(sizes, block.forms, whole.forms, strict=True):
                if getattr(block, size) and not getattr(whole, size):
                    found = [f"{size}={getattr(block, size)} where the model has no {part}"]
                if form and not getattr(whole, size) and form != own:
                    found = [f"a {form} map where the model has no {part}"]
            broken += [f"layer {layer}: {rule}" for rule in found]
    return broken


def _block_violations(block: Block, config: Any, head_channels: HeadChannels) -> list[str]:
    """Rules that one block breaks; no heads mean no attention, no neurons no MLP."""
    sizes = block.to_dict()
    if block.n_head == 0:
        sizes = {"intermediate_size": block.intermediate_size}
    if block.intermediate_size == 0:
        del sizes["intermediate_size"]
    broken = _out_of_range(sizes, config)
    if block.n_query_groups >= 1 and block.n_head % block.n_query_groups:
        broken.append(
            f"n_head={block.n_head} must be a multiple of n_query_groups={block.n_query_groups}"
        )
    elif block.n_query_groups >= 1:
        heads, most = block.n_head // block.n_query_groups, config.n_head // config.n_query_groups
        if heads > most:
            broken.append(
                f"n_head={block.n_head} with n_query_groups={block.n_query_groups} asks for "
                f"{heads} heads per group, the model has {most}"
            )
    if 1 <= block.head_size < config.head_size:
        broken += _head_size_violations(block.head_size, config, head_channels)
    return broken


def _out_of_range(sizes: Mapping[str, int], config: Any) -> list[str]:
    return [
        f"{name}={value} must be between 1 and the model's {getattr(config, name)}"
        for name, value in sizes.items()
        if not 1 <= value <= getattr(config, name)
    ]


def check(
    sub: SubNetwork, config: Any, head_channels: HeadChannels = HeadChannels.rope
) -> SubNetwork:
    """Return `sub` if it fits into the model of `config`.

    Raises:
        ConfigError: naming every violated rule.
    """
    broken = violations(sub, config, head_channels)
    if broken:
        raise ConfigError(f"sub-network does not fit {config.name!r}: " + "; ".join(broken))
    return sub


def check_sizes(sizes: Mapping[str, int], config: Any, head_channels: HeadChannels) -> None:
    """Refuse the six sizes of a sub-network with equal blocks if they do not fit, as `check`.

    Raises:
        ConfigError: naming every violated rule.
    """
    broken = _out_of_range(sizes, config)
    block = Block._make(sizes[name] for name in BLOCK_SIZES)
    if not any(size == 0 for size in block):
        broken += _block_violations(block, config, head_channels)
    if broken:
        rules = "; ".join(dict.fromkeys(broken))
        raise ConfigError(f"sub-network does not fit {config.name!r}: {rules}")


def _head_size_violations(head_size: int, config: Any, channels: HeadChannels) -> list[str]:
    """RoPE's own limits: frequencies base^(-2j/n) of n rotary channels."""
    n, kept = config.rope_n_elem, rope_n_elem(config, head_size)
    if n == 0:
        return []
    if channels is HeadChannels.first:
        return [] if kept % 2 == 0 else [f"head_size={head_size} has {kept} rotary channels, odd"]
    if {"beta_fast", "beta_slow"} & set(config.rope_adjustments or ()):
        # YaRN blends by the *index* of a pair, so a smaller head can't have the same phases.
        return [f"head_size={head_size} must stay {config.head_size} for a model with YaRN RoPE"]
    if kept < 2 or kept % 2 or n % kept:
        fitting = [
            size
            for size in range(1, config.head_size + 1)
            if (m := rope_n_elem(config, size)) >= 2
            and m % 2 == 0
            and n % m == 0
            and size - m <= config.head_size - n
        ]
        return [
            f"head_size={head_size} has {kept} rotary channels, which must be even and divide the "
            f"model's {n} (head sizes that fit: {', '.join(map(str, fitting))})"
        ]
    return []
