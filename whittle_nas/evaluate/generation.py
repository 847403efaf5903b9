"""Generating text for many prompts at once. B prompts, S columns of tokens so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from whittle_nas.calibration import head
from whittle_nas.evaluate.forward import (
    Layout,
    attention_over,
    attentions_of,
    hidden_states,
)


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens and when to stop.

    Args:
        max_new_tokens: At most this many tokens per prompt.
        eos_ids: Tokens that end a text.
        temperature: Of sampling; 0 takes the most probable token.
        top_k: Sample among the k most probable tokens.
        top_p: Sample among the most probable tokens that together reach this probability.
        seed: Of sampling.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stopped: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Args:
        model: A plain `litgpt.GPT` in eval mode.
        prompts: Tokens of each prompt, at least one.
        decoding: How to choose tokens and when to stop.
        stopped: Told the new tokens of one prompt, says whether they contain a stop sequence.

    Returns:
        The new tokens of each prompt, with the end-of-text token if it came.
    """
    device = model.transformer.wte.weight.device
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    padding = torch.tensor([width - len(p) for p in prompts], device=device)  # (B,)
    generator = torch.Generator(device).manual_seed(decoding.seed)
    texts: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # numbers of the prompts that still have a row
    with attention_over(model, len(prompts), width + decoding.max_new_tokens):
        hidden = hidden_states(model, tokens, _layout(padding, 0, width))
        for step in range(decoding.max_new_tokens):
            chosen = choose(head(model, hidden[:, -1]), decoding, generator)  # (B,)
            ended = _append(texts, alive, chosen.tolist(), decoding, stopped)
            keep = [row for row, end in enumerate(ended) if not end]
            if not keep or step + 1 == decoding.max_new_tokens:
                break
            if len(keep) < len(alive):
                rows = torch.tensor(keep, device=device)
                alive, padding, chosen = [alive[r] for r in keep], padding[rows], chosen[rows]
                for attention in attentions_of(model):
                    attention.kv_cache.keep_rows(rows)
            start = width + step
            hidden = hidden_states(model, chosen[:, None], _layout(padding, start, start + 1))
    return texts


def choose(logits: torch.Tensor, decoding: Decoding, generator: torch.Generator) -> torch.Tensor:
    """One token per row (B,) from logits (B, V)."""
    if not decoding.temperature:
        return logits.argmax(-1)
    logits = logits.float() / decoding.temperature
    if decoding.top_k is not None:
        least = logits.topk(min(decoding.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if decoding.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= decoding.top_p  # the first token always stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _append(
    texts: list[list[int]],
    alive: list[int],
    chosen: list[int],
    decoding: Decoding,
    stopped: Callable[[list[int]], bool] | None,
) -> list[bool]:
    """Add a token to every live text; say which of them end with it."""
    ended = []
    for number, token in zip(alive, chosen, strict=True):
        texts[number].append(token)
        stop = stopped is not None and stopped(texts[number])
        ended.append(stop or token in decoding.eos_ids)
    return ended


def _layout(padding: torch.Tensor, start: int, end: int) -> Layout:
    """Columns start..end-1 of prompts that are filled up on the left by `padding` (B,)."""
    columns = torch.arange(end, device=padding.device)
    positions = (columns - padding[:, None]).clamp(min=0)  # (B, S)
    queries = columns[start:, None]
    text = (columns >= padding[:, None])[:, None]  # (B, 1, S)
    # a filler sees itself: a row of attention without any column would be NaN
    visible = (text & (columns <= queries)) | (columns == queries)
    return Layout(positions[:, start:], positions, visible)
