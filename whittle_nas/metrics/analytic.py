"""Costs from sizes alone; no model is built."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from whittle_nas.space.subnetwork import PARTS, SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.counting import matmul_counter, matrix_counter, parameter_counter

_TABLES = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")


class AnalyticCosts:
    """Costs of the sub-networks of one model, in microseconds each.

    Attributes:
        num_params: all parameters; a table that is also the head counts once.
    """

    def __init__(self, config: Any) -> None:
        """Prepare the counts.

        Args:
            config: litgpt config of the super-network.
        """
        self._config = config
        self.num_params: Callable[[SubNetwork], int] = parameter_counter(config)
        self._matmul_weights = matmul_counter(config)
        self._matrices = {part: matrix_counter(config, part) for part in PARTS}
        self._tables = [
            axes.dims(name, config) for name in axes.stored_names(config) if name in _TABLES
        ]
        self._attended = lru_cache(None)(self._count_attended)

    def num_params_non_embedding(self, sub: SubNetwork) -> int:
        """Parameters without the token table and the head, which belong to the vocabulary."""
        widths = [sub.n_embd if len(dims) == 2 else 1 for dims in self._tables]
        return self.num_params(sub) - self._config.padded_vocab_size * sum(widths)

    def flops(self, sub: SubNetwork, tokens: int) -> int:
        """Floating-point operations of the forward pass of one sequence.

        Multiply-accumulates count two. Matrix products and causal attention are counted; norms,
        activations and the softmax, which are a few per mille, are not.

        Args:
            sub: the sub-network.
            tokens: length of the sequence.
        """
        attention = sum(
            block.n_head * block.head_size * self._attended(tokens, self._window(layer))
            for layer, block in enumerate(sub.blocks)
            if block is not None
        )
        return 2 * self._matmul_weights(sub) * tokens + 4 * attention

    def weight_bytes(self, sub: SubNetwork, dtype: torch.dtype) -> int:
        """Bytes of all parameters in a number format.

        Of compressed parts, matrices with half of it where half of their weights are zero, or with
        their bits; scales and the places of zeros are not counted, as in UNAST (appendix D).
        """
        size, saved = 8 * dtype.itemsize, 0
        bits = {"2:4": size // 2, "8bit": 8, "4bit": 4}
        for block in filter(None, sub.blocks):
            for part, form in zip(self._matrices, block.forms, strict=True):
                if form in bits:
                    of_part = self._matrices[part](SubNetwork(sub.n_embd, (block,)))
                    saved += of_part * (size - bits[form])
        return (self.num_params(sub) * size - saved) // 8

    def kv_cache_bytes(
        self, sub: SubNetwork, *, batch: int, length: int, dtype: torch.dtype
    ) -> int:
        """Bytes of litgpt's key-value cache; layers with a sliding window keep only the window."""
        rows = sum(
            block.n_query_groups * block.head_size * min(length, self._window(layer))
            for layer, block in enumerate(sub.blocks)
            if block is not None
        )
        return 2 * batch * rows * dtype.itemsize

    @staticmethod
    def _count_attended(tokens: int, window: int) -> int:
        """Pairs of tokens of which one attends to the other."""
        return sum(min(position + 1, window) for position in range(tokens))

    def _window(self, layer: int) -> int:
        """How far back a layer sees."""
        size: int | None = self._config.sliding_window_size
        if size is None or not self._config.sliding_window_indices[layer]:
            return self._config.block_size
        return size
