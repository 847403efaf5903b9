"""What a command will need, from sizes alone: bytes in and out, memory and arithmetic.

Pure functions of a config and numbers; nothing is loaded or built. B rows, T tokens, D `n_embd`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.placement import share_out

# What a pass over the blocks takes along: every device holds as much of it while it works.
ACTIVATIONS, STREAMS, EQUATIONS = "activations", "streams", "normal equations"
PRODUCTS = "sums of products"
_WITH_BLOCKS = (ACTIVATIONS, STREAMS, EQUATIONS, PRODUCTS)
_LOGITS = 2**24  # elements of the logits that exist at a time in scoring


@dataclass(frozen=True)
class Plan:
    """A run of a command, before it runs.

    Attributes:
        config: litgpt config of the model.
        reads: bytes by name; None where they are not known.
        writes: the same.
        memory: bytes of each device, or of the host where no device is used, by part.
        work: FLOPs over all devices, by part; a multiply-accumulate counts two.
        devices: how many share the work.
        dtype: number format of the arithmetic.
        rows: tokens that a matrix product takes at once.
        notes: sentences on what is not counted.
    """

    config: Any
    reads: Mapping[str, int | None]
    writes: Mapping[str, int | None]
    memory: Mapping[str, int] = field(default_factory=dict)
    work: Mapping[str, float] = field(default_factory=dict)
    devices: int = 1
    dtype: torch.dtype = torch.bfloat16
    rows: int = 1
    notes: tuple[str, ...] = ()

    @property
    def memory_total(self) -> int:
        """Bytes of each device."""
        return sum(self.memory.values())

    @property
    def flops(self) -> float:
        """All arithmetic."""
        return sum(self.work.values())

    def seconds(self, rate: float) -> float:
        """Time of the arithmetic at `rate` FLOPs per second and device."""
        return self.flops / (rate * self.devices)


def forward_flops(config: Any, tokens: int, length: int, sub: SubNetwork | None = None) -> float:
    """Arithmetic of forward passes.

    Args:
        config: of the whole model.
        tokens: of all rows.
        length: tokens per row, T.
        sub: a part of the model; by default all of it.
    """
    of_row = AnalyticCosts(config).flops(sub or SubNetwork.from_config(config), length)
    return of_row * tokens / length


def forward_memory(config: Any, *, dtype: torch.dtype, batch: int, tokens: int) -> dict[str, int]:
    """Bytes of scoring text without gradients: weights, one layer's activations, some logits.

    The widest moment is the MLP: the stream, its norm, and three of `intermediate_size`; or
    queries, keys, values and their rotated copies.
    """
    full = SubNetwork.from_config(config)
    heads = (config.n_head + 2 * config.n_query_groups) * config.head_size
    widest = 2 * config.n_embd + max(3 * config.intermediate_size, 3 * heads)
    rows = batch * tokens
    logits = min(rows, max(1, _LOGITS // config.padded_vocab_size)) * config.padded_vocab_size
    return {
        "weights": AnalyticCosts(config).weight_bytes(full, dtype),
        ACTIVATIONS: rows * widest * dtype.itemsize,
        "logits": 3 * 4 * logits,
    }


def placed_memory(
    config: Any, memory: Mapping[str, int], placed_on: Sequence[torch.device]
) -> dict[torch.device, dict[str, int]]:
    """Bytes of each device, by part, of a model that is shared out; see `weights.placement`.

    Weights are split. Activations, the streams of a repair and sums over what enters a matrix are
    on all devices, one after the other. All else is on the first.

    Args:
        config: of the whole model.
        memory: what one device would need.
        placed_on: the devices; one that is named twice has two shares.
    """
    held = _placed_parameters(config, placed_on)
    total = held.total()
    return {
        device: {
            what: size * held[device] // total if what == "weights" else size
            for what, size in memory.items()
            if device == placed_on[0] or what in ("weights", *_WITH_BLOCKS)
        }
        for device in dict.fromkeys(placed_on)
    }


def placed_rate(
    config: Any, placed_on: Sequence[torch.device], rates: Mapping[torch.device, float]
) -> float:
    """FLOPs per second of devices that take turns, each with the matrices that it holds.

    Args:
        config: of the whole model.
        placed_on: the devices; one that is named twice has two shares.
        rates: of each alone.
    """
    held = _placed_parameters(config, placed_on)
    if not axes.is_tied(config):  # rows of the token table are looked up, not multiplied
        held[placed_on[0]] -= config.padded_vocab_size * config.n_embd
    return held.total() / sum(held[device] / rates[device] for device in held)


def _placed_parameters(config: Any, placed_on: Sequence[torch.device]) -> Counter[torch.device]:
    """Parameters of each device."""
    sizes: Counter[int | None] = Counter()
    for name in axes.parameter_names(config):
        if name != "lm_head.weight" or not axes.is_tied(config):
            sizes[axes.split_layer(name)[0]] += math.prod(axes.shape(name, config))
    blocks = [sizes[layer] for layer in range(config.n_layer)]
    held = Counter({placed_on[0]: sizes[None]})
    for at, size in zip(share_out(sizes[None], blocks, len(placed_on)), blocks, strict=True):
        held[placed_on[at]] += size
    return held


def training_flops(
    config: Any,
    subs: Mapping[SubNetwork, float],
    *,
    length: int,
    adapters: bool,
    recomputes: bool,
    teacher: bool,
) -> dict[str, float]:
    """Arithmetic per token of a training step.

    Forward pass F; gradients of the inputs of all matrices F; those of the matrices F, or next to
    nothing where only adapters learn.

    Args:
        config: of the whole model.
        subs: networks of a step and how often each is in it.
        length: tokens per row.
        adapters: whether only adapters learn.
        recomputes: whether blocks are computed again in the backward pass.
        teacher: whether the whole model's forward pass comes before.
    """
    forward = sum(share * forward_flops(config, 1, length, sub) for sub, share in subs.items())
    work = {"forward passes": forward, "backward passes": forward * (1 if adapters else 2)}
    if recomputes:
        work["recomputation"] = forward
    if teacher:
        work["teacher"] = forward_flops(config, 1, length)
    return work


def greedy_flops(config: Any, tokens: int, length: int, *, width: float, least: int) -> float:
    """Arithmetic of ordering layers by greedy dropping, `importance.layers.greedy_order`.

    First every layer is left out once, on a quarter of the text, which costs L^2 / 2 layers; then
    a round tries five or more, which share what comes before them: about three passes.
    """
    layers = config.n_layer
    of_layer = width * forward_flops(config, tokens, length) / layers
    rounds = sum(3 * kept for kept in range(layers, max(least, 1), -1))
    return of_layer * (layers * layers / 8 + rounds)


def hessian_flops(config: Any, tokens: int) -> float:
    """Products x x^T of what enters the matrices of all blocks, over calibration tokens."""
    heads = config.n_head * config.head_size
    widths = (config.n_embd, heads, config.n_embd, config.intermediate_size)
    return 2.0 * tokens * config.n_layer * sum(width * width for width in widths)
