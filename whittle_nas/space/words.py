"""Metrics in words and units, for the axes of pictures and pages."""

from __future__ import annotations

from collections.abc import Iterable

WORDS = {
    "val_loss": "validation loss, nats per token",
    "perplexity": "perplexity",
    "num_params": "parameters",
    "num_params_non_embedding": "parameters without embeddings",
    "flops": "FLOPs per sequence",
    "weight_bytes": "weights, bytes",
    "memory_bytes": "peak memory, bytes",
    "kv_cache_bytes": "cache, bytes",
    "latency_ms": "prefill latency, ms",
    "decode_ms_per_token": "decoding, ms per token",
}
_SCALES = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def words(metric: str) -> str:
    """The metric for people; a name that is not known, such as a task's, stays."""
    return WORDS.get(metric, metric)


def axis(metric: str, values: Iterable[float]) -> tuple[str, float]:
    """Label of an axis and what its values are divided by.

    Returns:
        For instance `("parameters, millions", 1e6)`.
    """
    name = words(metric)
    largest = max((abs(value) for value in values), default=0.0)
    counted = metric.startswith("num_params") or metric == "flops"
    if not counted and not name.endswith(", bytes"):
        return name, 1.0
    for unit, word in _SCALES if counted else _BYTES:
        if largest >= unit:
            return f"{name.removesuffix(', bytes')}, {word}", unit
    return name, 1.0
