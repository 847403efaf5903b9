"""Parts of a litgpt model, built with random weights to be timed. B batch, T tokens, D `n_embd`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from litgpt import GPT
from torch import nn

from whittle_nas.metrics.measured import time_runs
from whittle_nas.weights import axes
from whittle_nas.weights.assembly import assemble, repeated, without_parts
from whittle_nas.weights.slicing import BlockPlan, SlicePlan

# Weights of a stack: fewer would stay in the cache of the processor, as no large model's do, and
# decoding, which waits for them, would look up to twice as fast.
_STACK_BYTES = 256 * 2**20
_WARMUP = 3
_ROUNDS = 3
_ROUND_MS = 100.0  # time of one round of repetitions
_REPEATS = (5, 50)


class Phase(str, Enum):
    """What is timed: reading a prompt, or generating one token with a key-value cache."""

    prefill = "prefill"
    decode = "decode"


@dataclass(frozen=True)
class Load:
    """What the model works on.

    Attributes:
        batch: sequences at once, B.
        tokens: tokens per sequence in prefill, and in the cache while decoding, T.
        device: where it runs.
        dtype: number format of weights and activations.
    """

    batch: int
    tokens: int
    device: torch.device
    dtype: torch.dtype


def time_stack(block: BlockPlan, load: Load, phase: Phase, *, highest: int) -> float:
    """Milliseconds per layer of a stack of equal blocks.

    What the model does around its blocks is in `time_ends` already and is taken off here: it is a
    tenth of generating one token with a small model.

    Args:
        block: the block; sliding windows and RoPE are those of its layer.
        load: what it works on.
        phase: what is timed.
        highest: layers of the whole model, the stack has no more.
    """
    names = [f"transformer.h.0.{name}" for name in axes.block_parameter_names(block.config)]
    held = [
        name for name in names if axes.is_in(block.shape, axes.split_layer(name)[1], block.config)
    ]
    count = sum(math.prod(axes.shape(name, block.config)) for name in held)
    height = min(highest, max(2, -(-_STACK_BYTES // (count * load.dtype.itemsize))))
    model = _random_model(repeated(block.config, height), load)
    for module in model.transformer.h:
        without_parts(module, block)
    width = load.tokens if phase is Phase.prefill else 1
    n_embd = block.config.n_embd
    hidden = torch.randn(load.batch, width, n_embd, device=load.device, dtype=load.dtype)
    model.transformer.wte = _Fixed(hidden)
    model.transformer.ln_f = nn.Identity()
    model.lm_head = nn.Identity()
    whole = time_forward(model, load, phase)
    model.transformer.h = nn.ModuleList()
    return max(0.0, whole - time_forward(model, load, phase)) / height


def time_ends(config: Any, load: Load, phase: Phase, *, whole: Any) -> float:
    """Milliseconds of embedding, last norm and head.

    Several heads take turns, as large together as the blocks that would push a head out of the
    cache between two calls.

    Args:
        config: litgpt config of the network.
        load: what it works on.
        phase: what is timed.
        whole: litgpt config of the super-network.
    """
    model = _random_model(repeated(config, 1), load, vocabulary=config.padded_vocab_size)
    model.transformer.h = nn.ModuleList()
    weights = min(_STACK_BYTES, axes.num_params(whole) * load.dtype.itemsize)
    head = config.padded_vocab_size * config.n_embd * load.dtype.itemsize
    model.lm_head = _InTurn(model.lm_head, -(-weights // head))
    return time_forward(model, load, phase)


def time_whole(plan: SlicePlan, load: Load, phase: Phase) -> float:
    """Milliseconds of a whole sub-network with random weights."""
    with torch.device(load.device):
        model = assemble(plan)
    model = model.to(dtype=load.dtype).requires_grad_(False).eval()
    return time_forward(model, load, phase)


@torch.inference_mode()
def time_forward(model: Any, load: Load, phase: Phase) -> float:
    """Time of a forward pass of any litgpt model, in milliseconds."""
    if phase is Phase.prefill:
        ids = torch.zeros(load.batch, load.tokens, dtype=torch.long, device=load.device)
        return _median(lambda: model(ids), load.device)
    # One position is decoded again and again: the cache is as long as in the middle of a text.
    context = min(load.tokens, model.max_seq_length - 1)
    model.set_kv_cache(load.batch, context + 1, device=load.device, dtype=load.dtype)
    try:
        ids = torch.zeros(load.batch, 1, dtype=torch.long, device=load.device)
        at = torch.tensor([context], device=load.device)
        return _median(lambda: model(ids, at, input_pos_maxp1=context + 1), load.device)
    finally:
        model.clear_kv_cache()


def _median(run: Callable[[], Any], device: torch.device) -> float:
    """The lowest of a few medians: a burst of other work on the machine spoils only one of them."""
    once = time_runs(run, device, warmup=_WARMUP, repeats=1).median_ms
    repeats = round(min(max(_ROUND_MS / max(once, 1e-6), _REPEATS[0]), _REPEATS[1]))
    rounds = (time_runs(run, device, warmup=0, repeats=repeats) for _ in range(_ROUNDS))
    return min(timing.median_ms for timing in rounds)


def _random_model(config: Any, load: Load, *, vocabulary: int = 8) -> Any:
    """A litgpt model whose weights lie on the device as those of an exported model do."""
    config = replace(
        config,
        vocab_size=vocabulary,
        padded_vocab_size=vocabulary,
        final_logit_softcapping=None,
    )
    with torch.device(load.device):
        model = GPT(config)
    return model.to(dtype=load.dtype).requires_grad_(False).eval()


class _InTurn(nn.Module):
    """Copies of a module, of which every call uses the next."""

    def __init__(self, module: nn.Module, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(count))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.copies[self.calls % len(self.copies)](x)


class _Fixed(nn.Module):
    """In place of the embedding: hidden states that are there already, (B, T, D)."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, _ids: torch.Tensor) -> torch.Tensor:
        return self.hidden
