"""Parts of a litgpt model, built with random weights to be timed. B batch, T tokens, D `n_embd`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import cycle
from typing import Any

import torch
from litgpt import GPT
from torch import nn

from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.metrics.measured import time_runs
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.assembly import assemble, built_in, make_block, repeated, without_parts
from whittle_nas.weights.slicing import BlockPlan, SlicePlan

# Weights of a stack: fewer would stay in the cache of the processor, as no large model's do, and
# decoding, which waits for them, would look up to twice as fast.
_STACK_BYTES = 256 * 2**20
# Time of a stack that is high enough, whatever its weights: it computes, and waits for nothing.
_STACK_MS = 200.0
_WARMUP = 3  # runs, or as many as fit into `_WARM_MS`
_WARM_MS = 100.0
ROUNDS = 3
_ROUND_MS = 150.0  # time of one round of repetitions
_REPEATS = 50  # of one round at most
_MOST_MS = 2000.0  # no round begins after that time


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

    Two layers that take long tell as much as all; quick ones are stacked until no cache holds them.
    What the model does around its blocks is in `time_ends` already and is taken off here: it is a
    tenth of generating one token with a small model.

    Args:
        block: the block; sliding windows and RoPE are those of its layer.
        load: what it works on.
        phase: what is timed.
        highest: layers of the whole model, the stack has no more.
    """
    model = _random_model(repeated(block.config, 1), load)
    model.config = repeated(block.config, highest)
    width = load.tokens if phase is Phase.prefill else 1
    n_embd = block.config.n_embd
    hidden = torch.randn(load.batch, width, n_embd, device=load.device, dtype=load.dtype)
    model.transformer.wte = _Fixed(hidden)
    model.transformer.ln_f = nn.Identity()
    model.lm_head = nn.Identity()
    layers = [without_parts(model.transformer.h[0], block)]
    height = _height(model, load, phase, highest=highest)
    with built_in(load.dtype), load.device:
        layers += [make_block(block, model) for _ in range(height - 1)]
    model.transformer.h = nn.ModuleList(layers).requires_grad_(False).eval()
    whole = time_forward(model, load, phase)
    model.transformer.h = nn.ModuleList()
    return max(0.0, whole - time_forward(model, load, phase)) / height


def _height(model: Any, load: Load, phase: Phase, *, highest: int) -> int:
    """Layers of a stack: more than a cache holds, or enough to take a while."""
    count = sum(parameter.numel() for parameter in model.transformer.h.parameters())
    large = -(-_STACK_BYTES // (max(1, count) * load.dtype.itemsize))
    slow = math.ceil(_STACK_MS / max(time_forward(model, load, phase, rounds=0), 1e-3))
    return min(highest, max(2, min(large, slow)))


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


def time_whole(plan: SlicePlan, load: Load, phase: Phase, *, rounds: int = ROUNDS) -> float:
    """Milliseconds of a whole sub-network with random weights; `rounds` as in `time_forward`."""
    with built_in(load.dtype), load.device:
        model = assemble(plan)
    return time_forward(_ready(model, load), load, phase, rounds=rounds)


def most_held(config: Any, load: Load) -> tuple[int, int]:
    """Bytes of all that exists at a time while a network is timed.

    Args:
        config: litgpt config of the super-network.
        load: what is timed.

    Returns:
        Of its parts, and of a whole network beside its weights.
    """
    costs, full = AnalyticCosts(config), SubNetwork.from_config(config)
    size, table = load.dtype.itemsize, config.padded_vocab_size * config.n_embd
    whole = costs.weight_bytes(full, load.dtype)
    block = costs.num_params_non_embedding(full) * size // config.n_layer
    stack = max(min(2, config.n_layer) * block, min(_STACK_BYTES, whole) + block)
    heads = 1 - (-min(_STACK_BYTES, whole) // (table * size))  # the copies, and what is copied
    rows = load.batch * load.tokens
    states = rows * (2 * config.n_embd + 3 * config.intermediate_size) * size
    logits = rows * config.padded_vocab_size * size
    cache = costs.kv_cache_bytes(full, batch=load.batch, length=load.tokens + 1, dtype=load.dtype)
    ends = (1 + heads) * table * size + logits
    return max(stack + states + cache // config.n_layer, ends), states + logits + cache


@torch.inference_mode()
def time_pace(config: Any, load: Load, phase: Phase) -> float:
    """Milliseconds of products such as a model is made of: how fast the device is at the moment.

    As many matrices take turns as no cache holds, but for those of tiny models.

    Args:
        config: litgpt config of the super-network.
        load: what it works on.
        phase: what is timed beside it.
    """
    like: Any = {"device": load.device, "dtype": load.dtype}
    width, height = config.n_embd, config.intermediate_size
    rows = load.batch * (load.tokens if phase is Phase.prefill else 1)
    copies = min(128, -(-_STACK_BYTES // (width * height * load.dtype.itemsize)))
    left, matrices = torch.ones(rows, width, **like), torch.ones(copies, width, height, **like)
    turn = cycle(matrices)
    return _median(lambda: left @ next(turn), load.device, ROUNDS)


@torch.inference_mode()
def time_forward(model: Any, load: Load, phase: Phase, *, rounds: int = ROUNDS) -> float:
    """Time of a forward pass of any litgpt model, in milliseconds.

    Args:
        model: on the device of `load`.
        load: what it works on.
        phase: what is timed.
        rounds: of repetitions, of which the fastest counts; 0: one warm run.
    """
    if phase is Phase.prefill:
        ids = torch.zeros(load.batch, load.tokens, dtype=torch.long, device=load.device)
        return _median(lambda: model(ids), load.device, rounds)
    # One position is decoded again and again: the cache is as long as in the middle of a text.
    context = min(load.tokens, model.max_seq_length - 1)
    model.set_kv_cache(load.batch, context + 1, device=load.device, dtype=load.dtype)
    try:
        ids = torch.zeros(load.batch, 1, dtype=torch.long, device=load.device)
        at = torch.tensor([context], device=load.device)
        run = partial(model, ids, at, input_pos_maxp1=context + 1)
        return _median(run, load.device, rounds)
    finally:
        model.clear_kv_cache()


def _median(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The lowest of a few medians: a burst of other work on the machine spoils only one of them.

    What takes seconds is run once before and twice more: it is a mean of many calls by itself.
    """
    once = math.inf
    start = time.perf_counter()
    for _ in range(_WARMUP):
        once = time_runs(run, device, warmup=0, repeats=1).median_ms
        if 1e3 * (time.perf_counter() - start) > _WARM_MS:
            break
    repeats = round(min(max(_ROUND_MS / max(once, 1e-6), 1), _REPEATS))
    medians: list[float] = []
    start = time.perf_counter()
    while len(medians) < rounds and 1e3 * (time.perf_counter() - start) < _MOST_MS:
        medians.append(time_runs(run, device, warmup=0, repeats=repeats).median_ms)
    return min(medians, default=once)


def _random_model(config: Any, load: Load, *, vocabulary: int = 8) -> Any:
    """A litgpt model whose weights lie on the device as those of an exported model do."""
    config = replace(
        config,
        vocab_size=vocabulary,
        padded_vocab_size=vocabulary,
        final_logit_softcapping=None,
    )
    with built_in(load.dtype), load.device:
        return _ready(GPT(config), load)


def _ready(model: Any, load: Load) -> Any:
    """A model as it runs: its rotary tables are in the number format of the weights."""
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
