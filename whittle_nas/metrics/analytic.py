"""Costs from sizes alone; no model is built.

All take the litgpt config of the network itself: for a sub-network, `supernet.plan(sub).config`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from whittle_nas.weights import axes

_TABLES = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")


def num_params(config: Any) -> int:
    """All parameters; a table that is also the head counts once."""
    return axes.num_params(config)


def num_params_non_embedding(config: Any) -> int:
    """Parameters without the token table and the head, which belong to the vocabulary."""
    names = [name for name in axes.stored_names(config) if name not in _TABLES]
    return sum(math.prod(axes.shape(name, config)) for name in names)


def flops(config: Any, tokens: int) -> int:
    """Floating-point operations of the forward pass of one sequence.

    Multiply-accumulates count two. Matrix products and causal attention are counted; norms,
    activations and the softmax, which are a few per mille, are not.

    Args:
        config: litgpt config of the network.
        tokens: length of the sequence.
    """
    attended = sum(sum(_attended(config, layer, tokens)) for layer in range(config.n_layer))
    return 2 * _matmul_weights(config) * tokens + 4 * config.n_head * config.head_size * attended


def weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of all parameters in a number format."""
    return num_params(config) * dtype.itemsize


def kv_cache_bytes(config: Any, *, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of litgpt's key-value cache; layers with a sliding window keep only the window."""
    kept = sum(min(length, _window(config, layer)) for layer in range(config.n_layer))
    return 2 * batch * config.n_query_groups * config.head_size * kept * dtype.itemsize


def _matmul_weights(config: Any) -> int:
    """Weights that every token is multiplied with: all matrices but the looked-up table."""
    shapes = [
        axes.shape(name, config)
        for name in axes.parameter_names(config)
        if name != "transformer.wte.weight"
    ]
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def _attended(config: Any, layer: int, tokens: int) -> list[int]:
    window = _window(config, layer)
    return [min(position + 1, window) for position in range(tokens)]


def _window(config: Any, layer: int) -> int:
    """How far back a layer sees."""
    size: int | None = config.sliding_window_size
    if size is None or not config.sliding_window_indices[layer]:
        return config.block_size
    return size
