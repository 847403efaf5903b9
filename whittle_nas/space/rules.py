"""Which sizes a sub-network of a given `litgpt.Config` may have."""

from __future__ import annotations

from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.space.subnetwork import HeadChannels, SubNetwork


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


def violations(
    sub: SubNetwork, config: Any, head_channels: HeadChannels = HeadChannels.rope
) -> list[str]:
    """Every rule that `sub` breaks as a part of the model of `config`; empty if it fits.

    Args:
        sub: sizes to check.
        config: the `litgpt.Config` of the super-network.
        head_channels: how a smaller head chooses its query and key channels.
    """
    full = SubNetwork.from_config(config)
    broken = []
    for name, value in sub.to_dict().items():
        limit = getattr(full, name)
        if not 1 <= value <= limit:
            broken.append(f"{name}={value} must be between 1 and the model's {limit}")
    if sub.n_query_groups >= 1 and sub.n_head % sub.n_query_groups:
        broken.append(
            f"n_head={sub.n_head} must be a multiple of n_query_groups={sub.n_query_groups}"
        )
    elif sub.n_query_groups >= 1:
        heads, most = sub.n_head // sub.n_query_groups, full.n_head // full.n_query_groups
        if heads > most:
            broken.append(
                f"n_head={sub.n_head} with n_query_groups={sub.n_query_groups} asks for {heads} "
                f"heads per group, the model has {most}"
            )
    if 1 <= sub.head_size < full.head_size:
        broken += _head_size_violations(sub.head_size, config, head_channels)
    return broken


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
