"""Layers of different sizes for transformers, vLLM and llama.cpp: `DeciLMForCausalLM`.

Its `config.json` has one entry per layer: query heads per key-value head and neurons, or no
attention, or no MLP, or a matrix in place of one. The number of query heads and their size are
the same in all layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.export.hf_architectures import ARCHITECTURES, differences, settings_of
from whittle_nas.space.subnetwork import LINEAR, Block

CLASS, MODEL_TYPE, CODE = "DeciLMForCausalLM", "nemotron-nas", "modeling_deci.py"
_STEP = 256  # llama.cpp's converter rounds numbers of neurons up to multiples of it


class Engine(str, Enum):
    """A program that has the architecture built in."""

    vllm = "vllm"
    llama_cpp = "llama.cpp"


def parse_engines(targets: str | None) -> frozenset[Engine]:
    """The engines of a list with commas.

    Raises:
        ConfigError: for an unknown name.
    """
    names = [name.strip() for name in (targets or "").split(",") if name.strip()]
    known = {engine.value: engine for engine in Engine}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--targets {unknown[0]}: choose from {', '.join(known)}")
    return frozenset(known[name] for name in names)


def is_llama(config: Any) -> bool:
    """Whether a model computes what the architecture does, whatever its sizes."""
    return not differences(ARCHITECTURES["llama"], config)


def with_equal_heads(
    blocks: Sequence[Block], head_size: int, *, n_embd: int, engines: Collection[Engine] = ()
) -> list[Block]:
    """The smallest layers of the architecture that hold some layers.

    All have the least number of query heads that every layer's key-value heads divide, if need be
    with some more of these.

    Args:
        blocks: layers to hold.
        head_size: channels of every head.
        n_embd: channels of the residual stream.
        engines: what must run it.
    """
    cpp, first = Engine.llama_cpp in engines, Engine.vllm in engines
    with_heads = [block for block in blocks if block.n_head]
    # At the latest the product of the most groups and the most heads of one holds all.
    least = max((block.n_head for block in with_heads), default=1)
    numbers = range(least, max(least**2, n_embd) + 1)
    holding = [n for n in numbers if all(_groups(block, n) for block in with_heads)]
    wanted = (n for n in holding if cpp and n_embd // n == head_size)
    heads = next(wanted, holding[0])
    made = []
    for at, block in enumerate(blocks):
        needed = block.n_head or (first and at == 0)
        groups = _groups(block, heads) if block.n_head else 1
        neurons = block.intermediate_size
        if cpp:
            neurons = -(-max(neurons, 1 if needed or block.attn else 0) // _STEP) * _STEP
        made.append(Block(heads if needed else 0, groups, head_size, neurons, *block.forms))
    if not with_heads and not first:
        made[0] = made[0]._replace(n_head=1, n_query_groups=1, head_size=head_size)
    return made


def _groups(block: Block, heads: int) -> int:
    """The fewest key-value heads that divide `heads` and hold a block's; 0 if none do."""
    ratio = block.n_head // block.n_query_groups
    fitting = (g for g in range(block.n_query_groups, heads + 1) if heads % g == 0)
    return next((groups for groups in fitting if heads // groups >= ratio), 0)


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
    maps = [form == LINEAR for form in block.forms]
    ffn: dict[str, Any] = {"no_op": not neurons and not maps[1], "replace_with_linear": maps[1]}
    if neurons:
        ffn["intermediate_size"] = neurons
        if neurons % _STEP == 0:
            # llama.cpp's converter reads the width from this alone. Without it it stops, which is
            # better than a file that can't be read.
            ffn["ffn_mult"] = 1.5 * neurons / n_embd
    return {
        "attention": {
            "no_op": not heads and not maps[0],
            "replace_with_linear": maps[0],
            "n_heads_in_group": heads // block.n_query_groups if heads else None,
        },
        "ffn": ffn,
    }


def deci_notes(blocks: Sequence[Block], n_embd: int) -> dict[Engine, str]:
    """Why vLLM or llama.cpp can't run it, one sentence each."""
    notes = {}
    if any(any(block.forms) for block in blocks):
        notes[Engine.vllm] = "vLLM can't run it: there no matrix stands in place of a part"
    elif not blocks[0].n_head:
        notes[Engine.vllm] = "vLLM can't run it: its first layer must have attention"
    reasons = []
    block = next(block for block in blocks if block.n_head)
    if n_embd // block.n_head != block.head_size:
        reasons.append(f"head_size = n_embd / n_head, here {n_embd // block.n_head}")
    if any(b.intermediate_size % _STEP for b in blocks):
        reasons.append(f"numbers of neurons that are multiples of {_STEP}")
    if any(block.mlp for block in blocks):
        reasons.append("no matrix in place of an MLP")
    elif any((b.n_head or b.attn) and not b.intermediate_size for b in blocks):
        reasons.append("an MLP in every layer with attention")
    if reasons:
        notes[Engine.llama_cpp] = (
            f"llama.cpp can't load it: there layers of different sizes need {_and(reasons)}"
        )
    return notes


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def check_engines(config: Any, targets: Collection[Engine], *, padded: bool) -> None:
    """Refuse layers of different sizes that an engine can't run.

    Args:
        config: of the model.
        targets: engines that must run it.
        padded: whether it is filled up with zeros already.

    Raises:
        ConfigError: naming the engine and what it needs.
    """
    if getattr(config, "blocks", None) is None:
        return
    forms = any(any(block.forms) for block in config.blocks)  # zeros don't help against these
    for engine, why in deci_notes(config.blocks, config.n_embd).items():
        if engine in targets:
            nearest = "--format hf without it" if padded or forms else "--pad true"
            raise ConfigError(f"--targets {engine.value}: {why}; nearest: {nearest}")
