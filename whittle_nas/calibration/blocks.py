"""The parts of litgpt's forward pass, one at a time.

B sequences, T tokens, D channels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from litgpt.model import do_softcapping
from torch import Tensor, nn


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden states (..., D), soft-capped where the model does that."""
    logits = model.lm_head(hidden)
    cap = model.config.final_logit_softcapping
    return logits if cap is None else do_softcapping(logits, cap)


def embed(model: Any, ids: Tensor) -> Tensor:
    """What enters the first block (B, T, D), for token ids (B, T)."""
    x = model.transformer.wte(ids)  # (B, T, D)
    if model.config.scale_embeddings:
        x = x * torch.tensor(model.config.n_embd**0.5, dtype=x.dtype)
    return x


def rotary(model: Any, layer: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The part of rotary tables that one layer reads: they differ by layer in Gemma 3."""
    if model.config.rope_indices is None:
        return cos, sin
    own = model.config.rope_indices[layer]
    return cos[..., own], sin[..., own]


def run_block(model: Any, x: Tensor, layer: int, block: nn.Module | None = None) -> Tensor:
    """One layer on (B, T, D).

    Args:
        model: `litgpt.GPT`, whose rotary tables are read.
        x: (B, T, D), on the device and in the number format of the block.
        layer: which one.
        block: what runs in its place, in the same way; by default the model's own.
    """
    tables = model.cos[None, : x.shape[1]], model.sin[None, : x.shape[1]]
    cos, sin = (table.to(x.device) for table in rotary(model, layer, *tables))
    return (model.transformer.h[layer] if block is None else block)(x, cos, sin)


def fetch_block(
    model: Any,
    layer: int,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> Any:
    """A copy of one block for a device; the model's own, often mapped from a file, stays as it is.

    Args:
        model: `litgpt.GPT`.
        layer: which block.
        device: where the copy is to be.
        dtype: its number format; by default that of the model.
        tensors: weights by litgpt name, for a model whose own blocks have none.
    """
    block: Any = copy.deepcopy(model.transformer.h[layer])
    if tensors is not None:
        names = list(block.state_dict())
        own = {name: tensors[f"transformer.h.{layer}.{name}"].clone() for name in names}
        block.load_state_dict(own, assign=True)
    return block.to(device=device, dtype=dtype).requires_grad_(False).eval()
