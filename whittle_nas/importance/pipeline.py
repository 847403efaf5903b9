"""The steps of `nas importance`: measure a model, write it sorted, settle its layers, record."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whittle_nas.importance import layers
from whittle_nas.importance.bases import Covariances, choose_rotation, with_matrices
from whittle_nas.importance.magnitude import by_magnitude
from whittle_nas.importance.narrowing import narrowed_sizes, narrowed_stream
from whittle_nas.importance.options import (
    Aggregation,
    Basis,
    Criterion,
    HeadActivation,
    LayerCriterion,
    NeuronActivation,
    NormFactors,
    Scope,
)
from whittle_nas.importance.scores import Scores, rank
from whittle_nas.importance.sorting import (
    FILE_NAME,
    SortedFrom,
    SortedTensors,
    original_scores,
    read_importance,
    write_importance,
)
from whittle_nas.importance.statistics import collect, norm_shares
from whittle_nas.progress import Progress, no_progress
from whittle_nas.reading import read_json
from whittle_nas.weights import axes
from whittle_nas.weights.bases import Bases, compose
from whittle_nas.weights.checkpoint import Checkpoint, write_checkpoint
from whittle_nas.weights.info import FILE_NAME as INFO
from whittle_nas.weights.norms import NormTable, scales_norms
from whittle_nas.weights.supernet import SuperNetwork
from whittle_nas.weights.tying import untied

# Widths of the networks that say whether norm factors help.
_JUDGED = (0.875, 0.75, 0.5)


@dataclass(frozen=True)
class MeasureOptions:
    """How a model is measured; the meaning of each is in `nas importance --help`."""

    criterion: Criterion = Criterion.activation
    basis: Basis = Basis.auto
    aggregation: Aggregation = Aggregation.mean_mean
    scope: Scope = Scope.layer
    neuron_activation: NeuronActivation = NeuronActivation.down_input
    head_activation: HeadActivation = HeadActivation.contribution
    layer_order: LayerCriterion = LayerCriterion.greedy
    layer_width: float = 0.75
    layer_blocks: int = 16
    min_layers: int | None = None
    norm_factors: NormFactors = NormFactors.auto
    batch_size: int = 4
    micro_batch_size: int | None = None

    @property
    def turns_values(self) -> bool:
        """Whether value channels get matrices; the baselines are about orders."""
        activations = self.criterion is Criterion.activation and self.scope is Scope.layer
        return activations and self.basis is not Basis.permutation

    def to_dict(self) -> dict[str, Any]:
        """What the result depends on, as plain values."""
        return {
            "criterion": self.criterion.value,
            "basis": self.basis.value,
            "aggregation": self.aggregation.value,
            "scope": self.scope.value,
            "neuron_activation": self.neuron_activation.value,
            "head_activation": self.head_activation.value,
            "layer_order": self.layer_order.value,
            "layer_width": self.layer_width,
            "layer_blocks": self.layer_blocks,
            "min_layers": self.min_layers,
            "norm_factors": self.norm_factors.value,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True)
class Measured:
    """What calibration text says about a model.

    Attributes:
        scores: of all entries by the model's own ids; of channels that a matrix makes, by the new
            channels.
        bases: the new basis.
        orders: the same without matrices; the same value where there are none.
        notes: sentences for the user.
    """

    scores: Scores
    bases: Bases
    orders: Bases
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settled:
    """What narrow networks of the sorted model say.

    Attributes:
        layer_order: layer ids, most important first.
        layer_losses: (L,) nats per token that order the layers; NaN with block importance.
        norm_shares: the table of `norm_shares`, None if norms were not looked at.
        norms_scaled: whether norms get factors.
        note: a sentence for the user about that.
    """

    layer_order: tuple[int, ...]
    layer_losses: tuple[float, ...]
    norm_shares: Tensor | None = None
    norms_scaled: bool = False
    note: str = ""


def measure(
    model: Any, tokens: Tensor, options: MeasureOptions, *, progress: Progress = no_progress
) -> Measured:
    """Score a model on calibration text, and choose its new basis.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        options: what is measured.
        progress: shows the passes.

    Raises:
        ConfigError: if an activation is not finite, or if a rotation was asked for that is not
            exact or that so little text can't find.
    """
    config, inputs = model.config, tokens[:, :-1]
    rotate, note = choose_rotation(
        options.basis,
        config,
        tied=axes.is_tied(config),
        num_tokens=inputs.numel(),
        criterion=options.criterion,
    )
    covariances = None
    if rotate or options.turns_values:
        covariances = Covariances(config, stream=rotate, device=model.cos.device)
    scores = collect(
        model,
        inputs,
        aggregation=options.aggregation,
        neuron_activation=options.neuron_activation,
        head_activation=options.head_activation,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        covariances=covariances,
        progress=progress,
    )
    if options.criterion is Criterion.magnitude:
        scores = by_magnitude(scores, model)
    bases = orders = rank(scores, config, scope=options.scope)
    if covariances is not None:
        scores, bases = with_matrices(
            scores, bases, covariances, model, values=options.turns_values
        )
    return Measured(scores, bases, orders, (note,) if note else ())


def settle(
    supernet: SuperNetwork,
    tokens: Tensor,
    scores: Scores,
    options: MeasureOptions,
    *,
    progress: Progress = no_progress,
) -> Settled:
    """Decide by narrow networks of a sorted model how its norms and layers are treated.

    Args:
        supernet: the sorted model.
        tokens: (N, T + 1) token ids; the first `layer_blocks` judge, factors come from the next.
        scores: of the model.
        options: what is measured.
        progress: shows what is done.

    Raises:
        ConfigError: if factors were asked for norms that have none.
    """
    model, config = supernet.model, supernet.config
    sample = tokens[: options.layer_blocks]
    shares, used, note = None, False, ""
    if options.norm_factors is not NormFactors.off and scales_norms(config):
        size = options.micro_batch_size or options.batch_size
        others = tokens[len(sample) : 3 * len(sample)]
        found = others if len(others) else sample
        shares = norm_shares(model, found[:, :-1], batch_size=size, progress=progress)
        scaled = SuperNetwork(model, replace(supernet.info, norms=NormTable.of(shares, config)))
        used, note = _judge_factors(supernet, scaled, sample, options, progress)
        supernet = scaled if used else supernet
    order, losses = _layer_order(supernet, sample, scores, options, progress)
    return Settled(tuple(order), tuple(losses), shares, used, note)


def _judge_factors(
    plain: SuperNetwork,
    scaled: SuperNetwork,
    sample: Tensor,
    options: MeasureOptions,
    progress: Progress,
) -> tuple[bool, str]:
    """Whether narrow networks are better with norm factors, and a sentence about it."""
    if options.norm_factors is NormFactors.on:
        return True, "norms of narrower networks are scaled for the channels that they lack"
    config, kept = plain.config, range(plain.config.n_layer)
    size = options.micro_batch_size or options.batch_size
    subs = [make(config, w) for w in _JUDGED for make in (narrowed_stream, narrowed_sizes)]
    losses = {True: 0.0, False: 0.0}
    for sub in progress(subs, "comparing norms", len(subs)):
        for with_factors, supernet in ((False, plain), (True, scaled)):
            with torch.inference_mode():
                model = supernet.subnet(sub)
            loss = layers.loss_of(model, sample, kept=kept, batch_size=size)
            losses[with_factors] += loss / len(subs)
    better = losses[True] < losses[False]
    return better, (
        f"norms of narrower networks are {'scaled' if better else 'left alone'}: with factors "
        f"they have {losses[True]:.3f} nats per token, without {losses[False]:.3f} (calibration "
        "text)"
    )


def _layer_order(
    supernet: SuperNetwork,
    sample: Tensor,
    scores: Scores,
    options: MeasureOptions,
    progress: Progress,
) -> tuple[list[int], list[float]]:
    """Layer ids, most important first, and the losses that say so."""
    config = supernet.config
    if options.layer_order is LayerCriterion.block_importance:
        order = layers.falling_order(scores.block_importance.tolist())
        return order, [math.nan] * config.n_layer
    way: Any = {
        "batch_size": options.micro_batch_size or options.batch_size,
        "progress": progress,
    }
    with torch.inference_mode():
        narrow = supernet.subnet(narrowed_sizes(config, options.layer_width))
    if options.layer_order is LayerCriterion.greedy:
        least = options.min_layers or config.n_layer // 2
        return layers.greedy_order(narrow, sample, min_layers=least, **way)
    kept = range(config.n_layer)
    found = layers.losses_without(narrow, sample, kept, kept=kept, **way)
    losses = [found[layer] for layer in kept]
    return layers.falling_order(losses), losses


def write_sorted(
    out_dir: Path, checkpoint: Checkpoint, bases: Bases, *, progress: Progress = no_progress
) -> None:
    """Write a checkpoint with its weights in a new basis; `record` completes the directory.

    Args:
        out_dir: existing, empty directory.
        checkpoint: what is sorted.
        bases: how.
        progress: shows the tensors that are written.
    """
    rotated = isinstance(bases.embd, Tensor)
    tensors = SortedTensors(checkpoint.state_dict, bases, checkpoint.config)
    write_checkpoint(
        out_dir,
        tensors,
        config=untied(checkpoint.config) if rotated else checkpoint.config,
        source=checkpoint.path,
        info=replace(checkpoint.info, importance=None, norms=None),  # `record` writes them
        progress=progress,
    )
    described = checkpoint.path / "config.json"
    if described.is_file():  # all sizes stay, so it stays true but for a head that was untied
        content = read_json(described)
        if rotated and content.get("tie_word_embeddings", True):
            content["tie_word_embeddings"] = False
        text = json.dumps(content, indent=2)
        (out_dir / described.name).write_text(f"{text}\n", encoding="utf-8")


def record(
    out_dir: Path,
    checkpoint: Checkpoint,
    measured: Measured,
    settled: Settled,
    *,
    settings: dict[str, Any],
) -> SortedFrom:
    """Write `importance.safetensors` and `supernet.yaml` of a sorted checkpoint.

    A checkpoint that was sorted before is sorted again; the file then still speaks of the ids that
    the model had in the beginning.

    Args:
        out_dir: where `write_sorted` wrote.
        checkpoint: what was sorted.
        measured: by the checkpoint's own ids.
        settled: of the sorted model.
        settings: how it was measured, kept in both files.
    """
    found = _since_the_beginning(checkpoint, measured, settled, settings)
    info = replace(checkpoint.info, layer_order=found.layer_order, importance=found.settings)
    (out_dir / INFO).write_text(info.dump(), encoding="utf-8")
    write_importance(out_dir / FILE_NAME, found)
    return found


def _since_the_beginning(
    checkpoint: Checkpoint, measured: Measured, settled: Settled, settings: dict[str, Any]
) -> SortedFrom:
    scores, bases, times = measured.scores, measured.bases, 1
    before = checkpoint.info.importance
    earlier = checkpoint.path / FILE_NAME
    if before is not None:
        times += int(before.get("times_sorted", 1))
        if earlier.is_file():
            first = read_importance(earlier).bases
            scores = original_scores(scores, first, bases, checkpoint.config)
            bases = compose(first, bases)
    settings = {
        **settings,
        "rotated": isinstance(bases.embd, Tensor),
        "norms_scaled": settled.norms_scaled,
        "times_sorted": times,
    }
    return SortedFrom(
        scores,
        bases,
        settled.layer_order,
        settled.layer_losses,
        settings,
        settled.norm_shares if settled.norms_scaled else None,
    )
