"""The steps of a block: what reads the residual stream once and writes into it once.

B sequences, T tokens, D channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from whittle_nas.calibration.blocks import head
from whittle_nas.weights.assembly import Nothing

# Logits that exist at a time, in elements; 2^24 in float32 are 64 MiB.
_LOGITS = 2**24


@dataclass(frozen=True)
class Part:
    """Attention or MLP of a block, by the names of its modules.

    Attributes:
        name: `attn` or `mlp`.
        norm: the norm whose output it reads.
        readers: the linear layers that read it, none where the writer does.
        writer: the linear layer whose output goes into the stream.
        post_norm: whether a norm stands between the writer and the stream.
    """

    name: str
    norm: str
    readers: tuple[str, ...]
    writer: str
    post_norm: bool


@dataclass(frozen=True)
class Step:
    """One or, with a parallel residual, two parts of a block.

    Attributes:
        parts: at least one.
        module: called as litgpt's `Block`; adds what these parts give and nothing else. It shares
            its modules with the block, so weights that are replaced there are replaced here.
    """

    parts: tuple[Part, ...]
    module: Any

    def names(self) -> set[str]:
        """Names of the parts."""
        return {part.name for part in self.parts}

    def get(self, name: str) -> Any:
        """A module of the block by its dotted name."""
        return self.module.get_submodule(name)


def steps(block: Any) -> list[Step]:
    """What a block does, one after the other; a part that it lacks is no step.

    Args:
        block: litgpt's `Block`.
    """
    parts = [part for part in (_attention(block), _mlp(block)) if _has(block, part.writer)]
    if block.config.parallel_residual:
        return [Step(tuple(parts), block)] if parts else []
    return [Step((part,), _alone(block, part)) for part in parts]


def token_factor(step: Step, outputs: Tensor, stream: Tensor) -> Tensor:
    """The factor by which the norm behind a step divides each token, (B, T, 1).

    Least squares on the stream are weighted with it: errors count as the layers behind that norm
    see them. Without it the few tokens on which a model rests its attention, whose stream is many
    times larger, would decide alone.

    Args:
        step: what has run.
        outputs: (B, T, D) of its writers, where a norm stands between them and the stream.
        stream: (B, T, D) behind it.
    """
    normed = (outputs if step.parts[0].post_norm else stream).float()
    eps = step.module.config.norm_eps
    return (normed.square().mean(-1, keepdim=True) + eps).rsqrt()


def _attention(block: Any) -> Part:
    return _part(block, "attn", "norm_1", ("qkv",), block.config.post_attention_norm)


def _mlp(block: Any) -> Part:
    norm = "norm_1" if block.config.shared_attention_norm else "norm_2"
    return _part(block, "mlp", norm, ("fc", "fc_1", "fc_2"), block.config.post_mlp_norm)


def _part(block: Any, name: str, norm: str, readers: Sequence[str], post_norm: bool) -> Part:
    """A part of a block; a matrix in its place is a writer that reads the norm itself."""
    there = tuple(f"{name}.{one}" for one in readers if _has(block, f"{name}.{one}"))
    writer = f"{name}.map" if _has(block, f"{name}.map") else f"{name}.proj"
    return Part(name, norm, there, writer, post_norm)


def _has(block: Any, name: str) -> bool:
    owner, _, module = name.partition(".")
    return hasattr(getattr(block, owner), module)


def _alone(block: Any, part: Part) -> Any:
    """A second face of a block, without its other part."""
    other, norms = ("mlp", ("norm_2", "post_mlp_norm"))
    if part.name == "mlp":
        other, norms = "attn", ("norm_1", "post_attention_norm")
    twin = copy.copy(block)
    left_out = {other: Nothing(), **{name: nn.Identity() for name in norms}}
    twin._modules = {**block._modules, **left_out}
    return twin


@dataclass(frozen=True)
class Seen:
    """What went through the writers of a step in its last call, by the names of the parts.

    Attributes:
        inputs: (B, T, C) of the writers.
        outputs: (B, T, D) of the writers, before a norm behind them.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watch_writers(step: Step) -> Iterator[Seen]:
    """Look at the writers of a step while the block lasts."""
    seen = Seen()

    def looking(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen.inputs[name], seen.outputs[name] = inputs[0], output

        return look

    with ExitStack() as stack:
        for part in step.parts:
            hook = step.get(part.writer).register_forward_hook(looking(part.name))
            stack.callback(hook.remove)
        yield seen


def nats(model: Any, hidden: Tensor, targets: Tensor) -> float:
    """Sum of -log p of the targets (B, T), from the output of the last norm (B, T, D).

    Args:
        model: `litgpt.GPT`, whose head is used.
        hidden: what the head reads.
        targets: token ids.
    """
    rows = max(1, _LOGITS // model.lm_head.weight.shape[0])
    total = torch.zeros((), device=hidden.device, dtype=torch.float64)
    pairs = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    for part, label in pairs:
        logits = head(model, part).float()  # (rows, V)
        total += nn.functional.cross_entropy(logits, label, reduction="sum")
    return total.item()
