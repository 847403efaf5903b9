"""LaCo: collapse runs of layers into their first one if outputs stay alike (Yang et al. 2024)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whittle_nas.calibration import first_overflow, overflow
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.forward import hidden_states
from whittle_nas.progress import Progress, no_progress
from whittle_nas.prune.options import LaCoOptions


@dataclass(frozen=True)
class Collapsed:
    """A model with fewer layers.

    Attributes:
        blocks: the blocks that stay, some of them merged.
        layers: the numbers that they had.
        tried: (layer, layers merged into it, cosine, whether it stayed), in order.
    """

    blocks: list[Any]
    layers: list[int]
    tried: list[tuple[int, int, float, bool]]


def check_range(options: LaCoOptions, n_layer: int) -> None:
    """Refuse constants with which no layers could be merged.

    Args:
        options: see there.
        n_layer: of the model.

    Raises:
        ConfigError: naming the option, its value and what would be right.
    """
    highest = n_layer if options.highest is None else options.highest
    _between("highest", highest, 2, n_layer)
    _between("lowest", options.lowest, 0, highest - 2)
    _between("merge_layers", options.merge_layers, 2, highest - options.lowest)
    for option, value in (("interval", options.interval), ("sentences", options.sentences)):
        if value < 1:
            raise ConfigError(f"--laco.{option} {value} must be at least 1")


def _between(option: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(
            f"--laco.{option} {value} must be from {least} to {most}: layers from --laco.lowest "
            "up to, and without, --laco.highest (all of them by default) become one"
        )


def laco(
    model: Any,
    tokens: Tensor,
    options: LaCoOptions,
    *,
    drop: int | None = None,
    like_notebook: bool = False,
    progress: Progress = no_progress,
) -> Collapsed:
    """Merge layers from the top down.

    The paper's rule: theta_l + sum_k (theta_{l+k} - theta_l). The published notebook subtracts the
    merged weights instead of the old ones, and so ends with those of the last layer of the run.

    Args:
        model: `litgpt.GPT`, in evaluation mode; it stays as it is.
        tokens: (N, T) token ids.
        options: see there.
        drop: stop when so many layers are gone; by default when the range is used up.
        like_notebook: compute what the notebook computes.
        progress: shows the first layers that are tried.

    Raises:
        ConfigError: if last hidden states are not finite, also of a merge that is tried.
    """
    text = tokens[: options.sentences].to(model.lm_head.weight.device)
    blocks, layers = list(model.transformer.h), list(range(model.config.n_layer))
    original = _last_states(model, blocks, layers, text)
    if not original.isfinite().all():
        raise first_overflow(model, text, otherwise="what transformer.ln_f gives is")
    tried: list[tuple[int, int, float, bool]] = []
    at = (options.highest or len(blocks)) - options.merge_layers
    for _ in progress(range(at + 1), "merging layers", at + 1):
        most = len(blocks) if drop is None else drop - len(model.transformer.h) + len(blocks)
        run = min(options.merge_layers - 1, len(blocks) - 1 - at, most)
        if at < options.lowest or run < 1:
            break
        merged = _merge(blocks[at : at + run + 1], like_notebook)
        fewer = [*blocks[:at], merged, *blocks[at + run + 1 :]]
        left = layers[: at + 1] + layers[at + run + 1 :]
        states = _last_states(model, fewer, left, text)
        if not states.isfinite().all():
            merging = f"the {run} layers behind transformer.h.{layers[at]} merged into it"
            raise overflow(f"with {merging}, what the model gives is")
        cosine = _similarity(states, original)
        stays = cosine > options.threshold
        tried.append((layers[at], run, cosine, stays))
        if stays:
            blocks, layers = fewer, left
            at = min(at - options.interval, len(blocks) - options.merge_layers)
        else:
            at -= 1
    return Collapsed(blocks, layers, tried)


def _merge(run: list[Any], like_notebook: bool) -> Any:
    """The first block with the differences of the others added to its weights."""
    merged = copy.deepcopy(run[0])
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            base = weight.clone()
            for block in run[1:]:
                weight += block.get_parameter(name) - (weight if like_notebook else base)
    return merged


def _last_states(model: Any, blocks: list[Any], layers: list[int], text: Tensor) -> Tensor:
    """Output of the last norm (N, T * D) of a model with other blocks."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "transformer": copy.copy(model.transformer)}
    twin.transformer._modules = {
        **model.transformer._modules,
        "h": torch.nn.ModuleList(blocks),
    }
    twin.config = copy.copy(model.config)
    if model.config.rope_indices is not None:
        twin.config.rope_indices = [model.config.rope_indices[layer] for layer in layers]
    with torch.inference_mode():
        return hidden_states(twin, text).float().flatten(1)


def _similarity(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=1).mean())
