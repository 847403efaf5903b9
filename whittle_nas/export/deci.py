"""Layers of different sizes for transformers, vLLM and llama.cpp: `DeciLMForCausalLM`.

Its `config.json` has one entry per layer: query heads per key-value head and neurons, or no
attention, or no MLP. The number of query heads and their size are the same in all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.export.hf_architectures import ARCHITECTURES, differences, settings_of
from whittle_nas.space.subnetwork import Block

CLASS, MODEL_TYPE, CODE = "DeciLMForCausalLM", "nemotron-nas", "modeling_deci.py"
_STEP = 256  # llama.cpp's converter rounds numbers of neurons up to multiples of it


def check_deci(config: Any) -> None:
    """Refuse a model with layers of different sizes that the architecture does not compute.

    Raises:
        ConfigError: saying why, and what is nearest.
    """
    lacking = differences(ARCHITECTURES["llama"], config)
    if lacking:
        listed = ", ".join(f"{name}={value!r}" for name, value in lacking.items())
        raise ConfigError(
            f"--format hf: for layers of different sizes there is {CLASS} only, a Llama, and "
            f"{config.name} has {listed}; nearest: --pad true, or --format litgpt"
        )
    with_heads = [block for block in config.blocks if block.n_head]
    for at, name in ((0, "n_head"), (2, "head_size")):
        found = sorted({block[at] for block in with_heads})
        if len(found) > 1:
            raise ConfigError(
                f"--format hf: {CLASS} has one {name} for all layers that have attention, and "
                f"here they have {', '.join(map(str, found))}; nearest: {name}={found[-1]} in each "
                "of them, or --pad true, or --format litgpt"
            )
    if not with_heads:
        raise ConfigError(
            f"--format hf: {CLASS} needs a layer with attention, and here none has one; nearest: "
            "--pad true, or --format litgpt"
        )
    if with_heads[0].head_size % 2:
        raise ConfigError(
            f"--format hf: head_size={with_heads[0].head_size} must be even; use --format litgpt"
        )


def deci_settings(config: Any) -> dict[str, Any]:
    """`config.json` of a model for which `check_deci` passes."""
    block = next(block for block in config.blocks if block.n_head)
    return {
        **settings_of("llama", config),
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{CODE.removesuffix('.py')}.DeciLMConfig",
            "AutoModelForCausalLM": f"{CODE.removesuffix('.py')}.{CLASS}",
        },
        "num_attention_heads": block.n_head,
        "num_key_value_heads": max(block.n_query_groups for block in config.blocks),
        "head_dim": block.head_size,
        "intermediate_size": max(block.intermediate_size for block in config.blocks),
        "sliding_window": None,
        "block_configs": [_entry(block, config.n_embd) for block in config.blocks],
    }


def _entry(block: Block, n_embd: int) -> dict[str, Any]:
    heads, neurons = block.n_head, block.intermediate_size
    ffn: dict[str, Any] = {"no_op": not neurons, "replace_with_linear": False}
    if neurons:
        ffn["intermediate_size"] = neurons
        if neurons % _STEP == 0:
            # llama.cpp's converter reads the width from this alone. Without it it stops, which is
            # better than a file that can't be read.
            ffn["ffn_mult"] = 1.5 * neurons / n_embd
    return {
        "attention": {
            "no_op": not heads,
            "replace_with_linear": False,
            "n_heads_in_group": heads // block.n_query_groups if heads else None,
        },
        "ffn": ffn,
    }


def deci_notes(blocks: Sequence[Block], n_embd: int) -> list[str]:
    """What vLLM and llama.cpp do not take of it, one sentence each."""
    notes = []
    if not blocks[0].n_head:
        notes.append("vLLM can't run it: its first layer must have attention")
    reasons = []
    block = next(block for block in blocks if block.n_head)
    if n_embd // block.n_head != block.head_size:
        reasons.append(f"head_size = n_embd / n_head, here {n_embd // block.n_head}")
    if any(b.intermediate_size % _STEP for b in blocks):
        reasons.append(f"numbers of neurons that are multiples of {_STEP}")
    if any(b.n_head and not b.intermediate_size for b in blocks):
        reasons.append("an MLP in every layer with attention")
    if reasons:
        notes.append(
            f"llama.cpp can't load it: there layers of different sizes need {_and(reasons)}"
        )
    return notes


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
