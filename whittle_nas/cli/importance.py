"""`nas importance`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whittle_nas.cli.options import DType
from whittle_nas.data import TextData
from whittle_nas.errors import ConfigError
from whittle_nas.importance.options import Aggregation, LayerCriterion, NeuronActivation, Scope

if TYPE_CHECKING:
    from torch import Tensor

    from whittle_nas.data import TokenBlocks
    from whittle_nas.importance.pipeline import Measured
    from whittle_nas.importance.sorting import SortedFrom
    from whittle_nas.space import SubNetwork
    from whittle_nas.weights.checkpoint import Checkpoint
    from whittle_nas.weights.supernet import SuperNetwork


@dataclass(frozen=True)
class ReportOptions:
    """Proof that sorting helped: perplexity of random sub-networks before and after.

    Args:
        num_subnetworks: Random sub-networks to measure; 0 skips the report.
        space: Search space to draw them from: a preset or a YAML file.
        data: Text to measure on; by default what `data.valid_fraction` holds out.
        num_blocks: Use at most this many blocks of it.
    """

    num_subnetworks: int = 0
    space: str = "aligned"
    data: TextData | None = None
    num_blocks: int = 32


def importance(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    data: TextData = TextData(num_blocks=128, valid_fraction=0.1),
    aggregation: Aggregation = Aggregation.mean_mean,
    scope: Scope = Scope.layer,
    neuron_activation: NeuronActivation = NeuronActivation.down_input,
    layer_order: LayerCriterion = LayerCriterion.greedy,
    layer_blocks: int = 32,
    batch_size: int = 4,
    micro_batch_size: int | None = None,
    report: ReportOptions = ReportOptions(),
    device: str = "auto",
    dtype: DType = DType.stored,
    seed: int = 1337,
    overwrite: bool = False,
) -> None:
    """Sort the weights of a checkpoint by importance; its outputs stay the same.

    One pass over calibration text scores every embedding channel, head, query group, head channel,
    neuron and layer. The weights are then permuted so that the important entries come first, which
    is what sub-networks keep.

    Args:
        checkpoint_dir: A litgpt checkpoint.
        out_dir: Directory to write; it must be new or empty.
        data: Calibration text.
        aggregation: How activations become scores: the batch by the first word, the sequence by the
            second.
        scope: Order each layer for itself, or all layers alike (as the published code does).
        neuron_activation: Measure neurons at the input of the MLP's output projection, or after its
            first linear layer (as the published code does).
        layer_order: How layers are ordered.
        layer_blocks: Blocks of calibration text for `greedy` and `block_drop`.
        batch_size: Sequences per calibration batch, over which the aggregation reduces.
        micro_batch_size: Sequences per forward pass, where a batch does not fit into memory.
        report: Measure random sub-networks before and after.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        dtype: Number format of the forward passes; the sorted weights keep theirs.
        seed: Seed of the sub-networks of the report.
        overwrite: Replace what is in `out_dir`.
    """
    from whittle_nas.cli.common import resolve_device, resolve_dtype, seed_everything
    from whittle_nas.importance.pipeline import MeasureOptions, measure, write_sorted
    from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
    from whittle_nas.weights.files import atomic_directory, check_free

    check_free(out_dir, overwrite=overwrite)
    options = MeasureOptions(
        aggregation=aggregation,
        scope=scope,
        neuron_activation=neuron_activation,
        layer_order=layer_order,
        layer_blocks=_at_least_one("layer_blocks", layer_blocks),
        batch_size=_at_least_one("batch_size", batch_size),
        micro_batch_size=micro_batch_size and _at_least_one("micro_batch_size", micro_batch_size),
    )
    checkpoint = open_checkpoint(checkpoint_dir)
    _warn_if_sorted(checkpoint)
    seed_everything(seed)
    blocks = _calibration_text(data, checkpoint)
    trial = _plan_trial(report, data, checkpoint, seed=seed)
    where = {"device": resolve_device(device), "dtype": resolve_dtype(dtype)}
    supernet = load_supernet(checkpoint_dir, **where)
    measured = measure(supernet.model, blocks.tokens, options, progress=_progress)
    before = trial.run(supernet, "before sorting") if trial else []
    del supernet  # one model at a time
    with atomic_directory(out_dir, overwrite=overwrite) as partial:
        settings = {**options.to_dict(), "data": _describe(data, blocks)}
        found = write_sorted(partial, checkpoint, measured, scope=scope, settings=settings)
        _draw_scores(partial, measured, options.layer_order)
        if trial:
            after = trial.run(load_supernet(partial, **where), "after sorting")
            trial.write(partial, before, after)
    _summary(found, out_dir)


@dataclass(frozen=True)
class _Trial:
    """The sub-networks and the text of a report; the first sub-network is the whole model."""

    subnetworks: list[SubNetwork]
    tokens: Tensor
    config: Any
    conditions: dict[str, Any]

    def run(self, supernet: SuperNetwork, label: str) -> list[float]:
        from whittle_nas.evaluate.perplexity import nats_per_token
        from whittle_nas.importance.report import perplexities

        return perplexities(
            supernet,
            self.subnetworks,
            lambda model: nats_per_token(model, self.tokens),
            label=label,
            progress=_progress,
        )

    def write(self, out_dir: Path, before: list[float], after: list[float]) -> None:
        from whittle_nas.importance.report import make_report
        from whittle_nas.plots import plot_before_after

        report = make_report(self.subnetworks[1:], before, after, self.config)
        text = json.dumps({**self.conditions, **report.to_dict()}, indent=2)
        (out_dir / "rpd.json").write_text(text + "\n", encoding="utf-8")
        found = report.improvement
        plot_before_after(
            out_dir / "rpd.png",
            num_params=report.num_params,
            before=report.before,
            after=report.after,
            full_perplexity=report.full_before,
            title=f"{found.num_subnetworks} random sub-networks, RPD {found.mean:.2f}",
        )
        print(
            f"RPD {found.mean:.3f} (median {found.median:.3f}, 10 % to 90 %: "
            f"{found.quantile_10:.3f} to {found.quantile_90:.3f}), "
            f"{found.share_improved:.0%} of {found.num_subnetworks} sub-networks improved"
        )
        print(f"whole model: perplexity {report.full_before:.4f} -> {report.full_after:.4f}")


def _plan_trial(
    report: ReportOptions, data: TextData, checkpoint: Checkpoint, *, seed: int
) -> _Trial | None:
    """Find the sub-networks and the held-out text before the long part starts."""
    if report.num_subnetworks == 0:
        return None
    from whittle_nas.data import Part, load_blocks
    from whittle_nas.importance.report import draw_subnetworks
    from whittle_nas.space import SubNetwork, load_space

    _at_least_one("report.num_subnetworks", report.num_subnetworks)
    if report.data is None and data.valid_fraction == 0 and not data.module:
        raise ConfigError(
            "--report.num_subnetworks needs text that is not calibration data: give "
            "--report.data.files, or --data.valid_fraction 0.1"
        )
    config = checkpoint.config
    text = replace(report.data or data, num_blocks=report.num_blocks)
    part = Part.ALL if report.data else Part.VALID
    blocks = load_blocks(text, checkpoint.path, config=config, part=part)
    space = load_space(report.space, config, head_channels=checkpoint.info.head_channels)
    drawn = draw_subnetworks(space, report.num_subnetworks, seed=seed)
    conditions = {"space": space.to_dict(), "seed": seed, "data": _describe(text, blocks)}
    return _Trial([SubNetwork.from_config(config), *drawn], blocks.tokens, config, conditions)


def _calibration_text(data: TextData, checkpoint: Checkpoint) -> TokenBlocks:
    from whittle_nas.data import Part, load_blocks

    part = Part.TRAIN if data.valid_fraction else Part.ALL
    return load_blocks(data, checkpoint.path, config=checkpoint.config, part=part)


def _describe(data: TextData, blocks: TokenBlocks) -> dict[str, Any]:
    sources = [source.label for source in data.parts()]
    return {
        "sources": sources,
        "num_blocks": blocks.num_blocks,
        "block_size": blocks.block_size,
        "seed": data.seed,
    }


def _draw_scores(out_dir: Path, measured: Measured, criterion: LayerCriterion) -> None:
    from whittle_nas.plots import plot_importance

    labels = {
        LayerCriterion.greedy: "loss when it was dropped (nats/token)",
        LayerCriterion.block_drop: "loss without it (nats/token)",
        LayerCriterion.block_importance: "block importance",
    }
    by_angle = criterion is LayerCriterion.block_importance
    layers = measured.scores.block_importance.tolist() if by_angle else measured.layer_losses
    plot_importance(
        out_dir / "importance.png",
        layers=layers,
        layer_label=labels[criterion],
        layer_order=measured.layer_order,
        heads=measured.scores.heads.flatten(1).tolist(),
        neurons=measured.scores.neurons.tolist(),
    )


def _summary(found: SortedFrom, out_dir: Path) -> None:
    order = ", ".join(map(str, found.layer_order))
    print(f"layers, most important first: {order}")
    print(f"sorted checkpoint, scores and pictures: {out_dir}")


def _warn_if_sorted(checkpoint: Checkpoint) -> None:
    if checkpoint.info.importance is not None:
        print(
            f"nas: warning: {checkpoint.path} is sorted already; it is sorted again, and "
            "importance.safetensors composes both orders",
            file=sys.stderr,
        )


def _at_least_one(option: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"--{option} {value} must be at least 1")
    return value


def _progress(items: Iterable[Any], label: str, total: int) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc=label, total=total, file=sys.stderr, leave=False)
