"""What candidates change of a cost: parameters, FLOPs, memory, or any that is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from whittle_nas.candidates.library import Library
from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.space.subnetwork import SubNetwork


def changes(library: Library, cost: Callable[[SubNetwork], float]) -> list[list[float]]:
    """By how much every candidate changes a cost of the whole model, for every part.

    Args:
        library: the candidates.
        cost: of a network.
    """
    whole = cost(library.subnetwork(library.original))
    found = []
    for at, choices in enumerate(library.candidates):
        original = library.original
        subs = (
            library.subnetwork((*original[:at], j, *original[at + 1 :]))
            for j in range(len(choices))
        )
        found.append([cost(sub) - whole for sub in subs])
    return found


def analytic(
    library: Library, config: Any, *, batch: int, tokens: int, dtype: torch.dtype
) -> dict[str, list[list[float]]]:
    """`changes` of what can be computed from sizes.

    Args:
        library: the candidates.
        config: litgpt config of the whole model.
        batch: sequences at a time.
        tokens: of each, in the key-value cache.
        dtype: number format of weights and cache.
    """
    costs = AnalyticCosts(config)
    cache = partial(costs.kv_cache_bytes, batch=batch, length=tokens, dtype=dtype)
    return {
        "num_params": changes(library, costs.num_params),
        "flops": changes(library, partial(costs.flops, tokens=tokens)),
        "memory_bytes": changes(library, lambda s: costs.weight_bytes(s, dtype) + cache(s)),
    }
