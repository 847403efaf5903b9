"""Measure a model and write it sorted: the two steps of `nas importance`."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from whittle_nas.importance import layers
from whittle_nas.importance.magnitude import by_magnitude
from whittle_nas.importance.narrowing import narrowed
from whittle_nas.importance.options import (
    Aggregation,
    Criterion,
    HeadActivation,
    LayerCriterion,
    NeuronActivation,
    Scope,
)
from whittle_nas.importance.scores import Scores, rank
from whittle_nas.importance.sorting import (
    FILE_NAME,
    PermutedTensors,
    SortedFrom,
    compose,
    original_scores,
    read_importance,
    write_importance,
)
from whittle_nas.importance.statistics import collect
from whittle_nas.progress import Progress, no_progress
from whittle_nas.weights.checkpoint import Checkpoint, write_checkpoint
from whittle_nas.weights.orders import Orders


@dataclass(frozen=True)
class MeasureOptions:
    """How a model is measured; the meaning of each is in `nas importance --help`."""

    criterion: Criterion = Criterion.activation
    aggregation: Aggregation = Aggregation.mean_mean
    scope: Scope = Scope.layer
    neuron_activation: NeuronActivation = NeuronActivation.down_input
    head_activation: HeadActivation = HeadActivation.contribution
    layer_order: LayerCriterion = LayerCriterion.greedy
    layer_width: float = 0.75
    layer_blocks: int = 16
    batch_size: int = 4
    micro_batch_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the result depends on, as plain values."""
        return {
            "criterion": self.criterion.value,
            "aggregation": self.aggregation.value,
            "scope": self.scope.value,
            "neuron_activation": self.neuron_activation.value,
            "head_activation": self.head_activation.value,
            "layer_order": self.layer_order.value,
            "layer_width": self.layer_width,
            "layer_blocks": self.layer_blocks,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True)
class Measured:
    """Scores of a model by its own ids.

    Attributes:
        scores: of all entries.
        orders: entries by falling score.
        layer_order: layer ids, most important first.
        layer_losses: (L,) nats per token that order the layers; NaN with block importance.
    """

    scores: Scores
    orders: Orders
    layer_order: tuple[int, ...]
    layer_losses: tuple[float, ...]


def measure(
    model: Any, tokens: Tensor, options: MeasureOptions, *, progress: Progress = no_progress
) -> Measured:
    """Score a model on calibration text.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        options: what is measured.
        progress: shows the passes.

    Raises:
        ConfigError: if an activation is not finite.
    """
    scores = collect(
        model,
        tokens[:, :-1],
        aggregation=options.aggregation,
        neuron_activation=options.neuron_activation,
        head_activation=options.head_activation,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        progress=progress,
    )
    if options.criterion is Criterion.magnitude:
        scores = by_magnitude(scores, model)
    orders = rank(scores, model.config, scope=options.scope)
    order, losses = _layer_order(model, tokens, scores, orders, options, progress)
    return Measured(scores, orders, tuple(order), tuple(losses))


def _layer_order(
    model: Any,
    tokens: Tensor,
    scores: Scores,
    orders: Orders,
    options: MeasureOptions,
    progress: Progress,
) -> tuple[list[int], list[float]]:
    """Layer ids, most important first, and the losses that say so."""
    if options.layer_order is LayerCriterion.block_importance:
        order = layers.falling_order(scores.block_importance.tolist())
        return order, [math.nan] * model.config.n_layer
    sample, size = tokens[: options.layer_blocks], options.micro_batch_size or options.batch_size
    narrow = narrowed(model, orders, options.layer_width)
    if options.layer_order is LayerCriterion.greedy:
        return layers.greedy_order(narrow, sample, batch_size=size, progress=progress)
    kept = range(model.config.n_layer)
    losses = layers.losses_without_each(narrow, sample, kept=kept, batch_size=size)
    return layers.falling_order(losses), losses


def write_sorted(
    out_dir: Path,
    checkpoint: Checkpoint,
    measured: Measured,
    *,
    settings: dict[str, Any],
    progress: Progress = no_progress,
) -> SortedFrom:
    """Write a checkpoint with its weights sorted, `importance.safetensors` and `supernet.yaml`.

    A checkpoint that was sorted before is sorted again; the file then still speaks of the ids that
    the model had in the beginning.

    Args:
        out_dir: existing, empty directory.
        checkpoint: what is sorted.
        measured: by the checkpoint's own ids.
        settings: how it was measured, kept in both files.
        progress: shows the tensors that are written.
    """
    config = checkpoint.config
    found = _since_the_beginning(checkpoint, measured, settings)
    write_checkpoint(
        out_dir,
        PermutedTensors(checkpoint.state_dict, measured.orders, config),
        config=config,
        source=checkpoint.path,
        info=replace(checkpoint.info, layer_order=measured.layer_order, importance=found.settings),
        progress=progress,
    )
    write_importance(out_dir / FILE_NAME, found)
    # All sizes stay, so the Hugging Face config stays true.
    if (checkpoint.path / "config.json").is_file():
        shutil.copyfile(checkpoint.path / "config.json", out_dir / "config.json")
    return found


def _since_the_beginning(
    checkpoint: Checkpoint, measured: Measured, settings: dict[str, Any]
) -> SortedFrom:
    scores, orders, times = measured.scores, measured.orders, 1
    before = checkpoint.info.importance
    earlier = checkpoint.path / FILE_NAME
    if before is not None:
        times += int(before.get("times_sorted", 1))
        if earlier.is_file():
            first = read_importance(earlier).orders
            scores = original_scores(scores, first, checkpoint.config)
            orders = compose(first, orders)
    settings = {**settings, "times_sorted": times}
    return SortedFrom(scores, orders, measured.layer_order, measured.layer_losses, settings)
