"""From an activation to one number per entry and token: one function per criterion.

B sequences, T tokens, H heads, G query groups, K channels per head. The formulas are those of the
importance section of the papers; absolute values and reductions follow in `statistics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def heads(attention: Tensor, config: Any) -> Tensor:
    """L2 norm over the channels of every head; input of `attn.proj` (B, T, H * K) -> (B, T, H)."""
    # not vector_norm: reducing a short last axis is four times slower with it on a CPU
    squares = attention.float().square()
    return squares.unflatten(-1, (config.n_head, config.head_size)).sum(-1).sqrt_()


def head_gains(proj_weight: Tensor, config: Any) -> Tensor:
    """Frobenius norm of every head's columns of `attn.proj` (D, H * K) -> (H,)."""
    columns = proj_weight.float().unflatten(-1, (config.n_head, config.head_size))
    return columns.square().sum((0, 2)).sqrt_()


def groups(head_norms: Tensor, config: Any) -> Tensor:
    """L2 norm over the heads of a query group; their norms (B, T, H) -> (B, T, G)."""
    return head_norms.unflatten(-1, (config.n_query_groups, -1)).square().sum(-1).sqrt_()


def value_channels(attention: Tensor, config: Any) -> Tensor:
    """|a| summed over the heads of a group; input of `attn.proj` (B, T, H * K) -> (B, T, G * K)."""
    if config.n_head == config.n_query_groups:
        return attention
    per_group = attention.abs().unflatten(-1, (config.n_query_groups, -1, config.head_size))
    return per_group.sum(-2, dtype=torch.float32).flatten(-2)


def qk_channels(qkv: Tensor, config: Any) -> Tensor:
    """|q| * |k|, heads of a group summed, of channels that RoPE leaves alone.

    Output of `attn.qkv` (B, T, (H + 2G) * K) -> (B, T, G * (K - rope_n_elem)).
    """
    n_head, n_groups, size = config.n_head, config.n_query_groups, config.head_size
    rows = qkv.unflatten(-1, (-1, size))[..., config.rope_n_elem :].abs()
    query, key = rows[..., :n_head, :], rows[..., n_head : n_head + n_groups, :]
    query = query.unflatten(-2, (n_groups, -1)).sum(-2, dtype=torch.float32)
    return (query * key).flatten(-2)


def turn(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine of the residual stream before and after a block, (B, T, D) twice -> (B, T)."""
    return 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)


def mean(x: Tensor, dim: int) -> Tensor:
    """Mean of |x| in float32."""
    return x.abs().mean(dim, dtype=torch.float32)


def norm(x: Tensor, dim: int) -> Tensor:
    """L2 norm of x in float32."""
    return x.float().square().sum(dim).sqrt_()


def variance(x: Tensor, dim: int) -> Tensor:
    """Population variance of |x| in float32; two passes, since one would cancel."""
    if dim > 0:  # row by row, so that the copies stay small
        return torch.stack([variance(row, dim - 1) for row in x])
    x = x.abs().float()
    return x.sub_(x.mean(0)).square_().mean(0)


REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": mean,
    "norm": norm,
    "variance": variance,
}
