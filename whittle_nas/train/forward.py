"""Forward passes up to the last norm, at the positions that have a label.

B rows, T tokens, N positions with a label, D channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.train.batches import Sample, attention_mask, labelled, positions
from whittle_nas.train.blocks import outputs_of
from whittle_nas.weights.supernet import SuperNetwork


def labelled_hidden(
    supernet: SuperNetwork, sub: SubNetwork, batch: Sample, *, checkpoint_blocks: bool = False
) -> Tensor:
    """Final hidden states at the positions that have a label, (N, D)."""
    model: Any = supernet.subnet(sub, hidden=True, checkpoint_blocks=checkpoint_blocks)
    whole = batch.segments is None
    hidden = supernet.run(model, batch.input_ids) if whole else supernet.run(_packed, model, batch)
    hidden = hidden.flatten(0, 1)  # (B * T, D)
    keep = labelled(batch)
    return hidden if len(keep) == len(hidden) else hidden.index_select(0, keep)


def labels_of(batch: Sample) -> Tensor:
    """The labels alone, (N,)."""
    return batch.labels.flatten().index_select(0, labelled(batch))


def _packed(model: Any, batch: Sample) -> Tensor:
    """litgpt's forward pass up to the last norm, with attention and positions kept per sample.

    litgpt's own `forward` takes a mask and positions only together with a KV cache, but its blocks
    take both.
    """
    assert batch.segments is not None
    at = positions(batch.segments)
    cos, sin = model.cos[at], model.sin[at]  # (B, T, rope_n_elem)
    x = model.transformer.wte(batch.input_ids)
    if model.config.scale_embeddings:
        x = x * torch.tensor(model.config.n_embd**0.5, dtype=x.dtype)
    mask = attention_mask(batch.segments, x.dtype)
    for number, block in enumerate(model.transformer.h):
        kinds = model.config.rope_indices
        part = (cos, sin) if kinds is None else (cos[..., kinds[number]], sin[..., kinds[number]])
        x = block(x, *part, mask, None, None)
    return model.transformer.ln_f(x)


def hidden_and_blocks(
    supernet: SuperNetwork,
    sub: SubNetwork,
    batch: Sample,
    *,
    blocks: bool,
    checkpoint_blocks: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """As `labelled_hidden`, with what the blocks put out where asked for."""
    run = partial(labelled_hidden, supernet, sub, batch, checkpoint_blocks=checkpoint_blocks)
    if not blocks:
        return run(), []
    model = supernet.subnet(sub, hidden=True, checkpoint_blocks=checkpoint_blocks)
    with outputs_of(model, labelled(batch)) as found:
        return run(), found
