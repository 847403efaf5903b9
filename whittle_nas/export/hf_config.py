"""The Hugging Face architecture of a litgpt model, its `config.json`, and sizes it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.export import deci
from whittle_nas.export.hf_architectures import ARCHITECTURES, Sizes, differences, settings_of
from whittle_nas.space.rules import check_supported


@dataclass(frozen=True)
class HFTarget:
    """How one litgpt model is written for Hugging Face.

    Attributes:
        architecture: class name in transformers.
        model_type: its key in `config.json`.
        config_json: `config.json` without what depends on the weights and the tokenizer.
        query_scale: root of what the architecture divides attention scores by the root of, over
            litgpt's `attention_scores_scalar`; folded into the weights that make the queries.
        notes: what a user may want to know, one sentence each.
        code: file of `assets/deci` that goes along, where transformers has no such model.
    """

    architecture: str
    model_type: str
    config_json: Mapping[str, Any]
    query_scale: float = 1.0
    notes: tuple[str, ...] = ()
    code: str | None = None


def hf_target(config: Any) -> HFTarget:
    """Choose the architecture for a litgpt model, from its config alone.

    Args:
        config: litgpt config, also of a sub-network.

    Raises:
        ConfigError: if no architecture computes the same, or none has such sizes; it says what
            stands in the way and which sizes are nearest.
    """
    check_supported(config)
    if getattr(config, "blocks", None) is not None:
        return _deci_target(config)
    candidates = _candidates(config)
    problems = {model_type: _size_problem(model_type, config) for model_type in candidates}
    fitting = [model_type for model_type in candidates if problems[model_type] is None]
    if not fitting:
        raise ConfigError(f"{problems[candidates[0]]}, or use --format litgpt")
    chosen = fitting[0]
    divisor = ARCHITECTURES[chosen].divisor(config)
    scalar = config.attention_scores_scalar or config.head_size
    scale = sqrt(divisor / scalar)
    notes = []
    if chosen != candidates[0]:
        notes.append(f"written as {chosen}, because {problems[candidates[0]]}")
    notes += _scale_note(chosen, divisor, scalar)
    return HFTarget(
        architecture=ARCHITECTURES[chosen].class_name,
        model_type=chosen,
        config_json=settings_of(chosen, config),
        query_scale=scale,
        notes=tuple(notes),
    )


def _candidates(config: Any) -> list[str]:
    """Architectures that compute the model, best first."""
    unable = {key: differences(row, config) for key, row in ARCHITECTURES.items()}
    able = [key for key, differing in unable.items() if not differing]
    if not able:
        nearest = min(unable, key=lambda key: len(unable[key]))
        listed = ", ".join(f"{name}={value!r}" for name, value in unable[nearest].items())
        raise ConfigError(
            f"no Hugging Face architecture computes model {config.name!r}: the nearest, {nearest}, "
            f"has no {listed}; use --format litgpt"
        )
    preferred = [key for key in able if config.name.lower().startswith(ARCHITECTURES[key].prefixes)]
    return preferred + [key for key in able if key not in preferred]


def _size_problem(model_type: str, config: Any) -> str | None:
    """Why an architecture can't have the sizes, and the nearest ones that it can have."""
    embd, heads, size = config.n_embd, config.n_head, config.head_size
    if config.rope_n_elem % 2:
        return f"head_size={size} has {config.rope_n_elem} rotary channels, which must be even"
    if config.n_query_groups != heads and not ARCHITECTURES[model_type].grouped:
        return (
            f"n_query_groups={config.n_query_groups} with n_head={heads}: {model_type} has no "
            f"grouped queries; nearest: n_query_groups={heads} or n_head={config.n_query_groups}"
        )
    sizes = ARCHITECTURES[model_type].sizes
    if sizes is Sizes.DIVIDES and embd % heads:
        below = embd - embd % heads
        nearest = f"{below} or {below + heads}" if below else f"{heads}"
        return (
            f"n_embd={embd} with n_head={heads}: {model_type} needs n_embd divisible by n_head; "
            f"nearest n_embd: {nearest}"
        )
    if sizes is Sizes.PRODUCT and embd != heads * size:
        other = max(1, round(embd / size))
        nearest = [f"n_embd={heads * size}"]
        if other != heads:
            nearest.append(
                f"n_head={other}" + (f" with n_embd={other * size}" if other * size != embd else "")
            )
        return (
            f"n_embd={embd} with n_head={heads} and head_size={size}: {model_type} needs "
            f"n_embd = n_head * head_size; nearest: {' or '.join(nearest)}"
        )
    return None


def _deci_target(config: Any) -> HFTarget:
    """For a model whose layers have sizes of their own."""
    deci.check_deci(config)
    settings = deci.deci_settings(config)
    divisor, scalar = settings["head_dim"], config.attention_scores_scalar or config.head_size
    notes = deci.deci_notes(config.blocks, config.n_embd)
    return HFTarget(
        architecture=deci.CLASS,
        model_type=deci.MODEL_TYPE,
        config_json=settings,
        query_scale=sqrt(divisor / scalar),
        notes=(*_scale_note(deci.CLASS, divisor, scalar), *notes.values()),
        code=deci.CODE,
    )


def _scale_note(name: str, divisor: int, scalar: int) -> list[str]:
    if divisor == scalar:
        return []
    return [
        f"query weights are multiplied by sqrt({divisor}/{scalar}), because {name} divides "
        f"attention scores by sqrt({divisor})"
    ]
