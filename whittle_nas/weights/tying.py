"""A head that is the token table: found in the weights, carried by the config, one parameter.

litgpt builds and names both tables of a tied model and its config has no word for the tie. Here
the weights say it: a checkpoint is tied if both names hold the same table. So whatever makes the
two differ unties the model, and nothing else has to be told. V vocabulary, D `n_embd`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from whittle_nas.weights import axes
from whittle_nas.weights.config import extended

HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"
_ROWS = 4096  # compared at a time: two tables that differ do so in their first rows


def found_in(config: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The config, which says so if the weights are tied."""
    return tied(config) if same_table(tensors[HEAD], tensors[TABLE]) else config


def tied(config: Any) -> Any:
    """The config of the same model with its token table as the head."""
    return extended(config, tie_word_embeddings=True)


def untied(config: Any) -> Any:
    """The config of the same model with a head of its own."""
    return extended(config, tie_word_embeddings=False)


def same_table(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two (V, D) tables hold the same values; fast if they share memory, or differ."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return all(map(torch.equal, one.split(_ROWS), other.split(_ROWS)))


def tie_head(model: Any) -> None:
    """Make head and token table one parameter, and so their adapters, if the config is tied.

    Their gradients add up then and an optimiser sees one tensor. To be called after weights were
    assigned, which takes the tie apart.

    Args:
        model: `litgpt.GPT`, or an adapted one whose head and table have adapters of equal shapes.
    """
    if not axes.is_tied(model.config):
        return
    head, table = model.lm_head, model.transformer.wte
    table.weight = getattr(head, "linear", head).weight  # LoRALinear keeps it one level deeper
    for adapter in ("lora_A", "lora_B"):
        if hasattr(table, adapter):
            setattr(table, adapter, getattr(head, adapter))
