"""What llama.cpp and vLLM ask of a model beyond what transformers asks.

Read in, and for llama.cpp tried with, their releases of October 2026. Everything here is advice:
neither refuses what transformers refuses, so it is told after the export and not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Architectures whose heads they take to be n_embd / n_head channels, whatever `head_dim` says.
_NO_HEAD_SIZE: Mapping[str, str] = {
    "olmo": "llama.cpp",
    "olmo2": "llama.cpp",
    "phi": "llama.cpp",
    "phi3": "llama.cpp",
    "qwen2": "llama.cpp and vLLM",
}
_FOUR_TIMES = ("falcon", "phi")  # llama.cpp takes their MLP to have 4 * n_embd neurons
_NO_HEAD: Mapping[str, str] = {
    "gemma": "llama.cpp",
    "gemma2": "llama.cpp and vLLM",
}


def engine_notes(model_type: str, config: Any, *, tied: bool) -> list[str]:
    """What will not work with an exported model, one sentence each.

    Args:
        model_type: Hugging Face's name of the architecture.
        config: litgpt config.
        tied: the head is the embedding.
    """
    notes = []
    if model_type in _NO_HEAD_SIZE and config.n_embd != config.n_head * config.head_size:
        notes.append(
            f"{_NO_HEAD_SIZE[model_type]} can't load it: there {model_type} needs "
            f"n_embd = n_head * head_size"
        )
    if model_type in _FOUR_TIMES and config.intermediate_size != 4 * config.n_embd:
        notes.append(
            f"llama.cpp can't load it: there {model_type} needs intermediate_size = 4 * n_embd"
        )
    if model_type in _NO_HEAD and not tied:
        notes.append(
            f"{_NO_HEAD[model_type]} would take the embedding for the head, which a rotation or a "
            "training has made a table of its own (`nas importance --basis permutation` keeps one)"
        )
    return notes
