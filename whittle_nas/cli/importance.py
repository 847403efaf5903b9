"""`nas importance`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whittle_nas.cli.options import DType
from whittle_nas.data import TextData
from whittle_nas.errors import ConfigError
from whittle_nas.importance.options import (
    Aggregation,
    Basis,
    Criterion,
    HeadActivation,
    LayerCriterion,
    NeuronActivation,
    NormFactors,
    Scope,
    SweepOptions,
)


@dataclass(frozen=True)
class ReportOptions:
    """Proof that sorting helped: perplexity of random sub-networks before and after.

    Args:
        num_subnetworks: Random sub-networks to measure; 0 skips the report.
        search_space: Search space to draw them from: a preset or a YAML file.
        data: Text to measure on, with the options of `data`; by default what `data.valid_fraction`
            holds out.
        num_blocks: Use at most this many blocks of it.
        repair: Measure each of them once more, repaired on the calibration text as
            `nas export --repair true` does; takes seconds to minutes per sub-network.
    """

    num_subnetworks: int = 0
    search_space: str = "aligned"
    data: TextData | None = None
    num_blocks: int = 32
    repair: bool = False


def importance(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    data: TextData = TextData(num_blocks=128, valid_fraction=0.1),
    criterion: Criterion = Criterion.activation,
    basis: Basis = Basis.auto,
    aggregation: Aggregation = Aggregation.mean_mean,
    scope: Scope = Scope.layer,
    neuron_activation: NeuronActivation = NeuronActivation.down_input,
    head_activation: HeadActivation = HeadActivation.contribution,
    layer_order: LayerCriterion = LayerCriterion.greedy,
    layer_width: float = 0.75,
    layer_blocks: int = 16,
    min_layers: int | None = None,
    norm_factors: NormFactors = NormFactors.auto,
    batch_size: int = 4,
    micro_batch_size: int | None = None,
    report: ReportOptions = ReportOptions(),
    sweep: SweepOptions = SweepOptions(),
    device: str = "auto",
    dtype: DType = DType.stored,
    seed: int = 1337,
    overwrite: bool = False,
) -> None:
    """Sort the weights of a checkpoint by importance; its outputs stay the same.

    One pass over calibration text scores every embedding channel, head, query group, head channel,
    neuron and layer. The weights then get a new basis in which the important entries come first,
    which is what sub-networks keep: heads and neurons change places, the residual stream is rotated
    to its principal directions where that is exact, and so are the value channels of every group.

    Args:
        checkpoint_dir: A litgpt checkpoint.
        out_dir: Directory to write; it must be new or empty.
        data: Calibration text.
        criterion: Rank channels, heads and neurons by what they do on the text, or by the size of
            their weights, a baseline.
        basis: What becomes of the residual stream: `rotation` to its principal directions, which
            folds the scales of all norms and gives a tied head a table of its own; `permutation` of
            its channels, and of value channels; `auto` rotates where the outputs stay the same
            (RMSNorms before each part of a layer) and where a second table costs little.
        aggregation: How activations become scores: the first word reduces the sequences of a
            batch, the second the tokens of a sequence.
        scope: Order each layer for itself, or all layers alike (as the published code does).
        neuron_activation: Measure neurons at the input of the MLP's output projection, or after its
            first linear layer (as the published code does).
        head_activation: Measure heads by what they add to the residual stream, or by their output
            alone (as the published code does).
        layer_order: How layers are ordered: `greedy` drops the layer whose loss hurts least, again
            and again; `block_drop` ranks by the loss without one layer; `block_importance` by how
            much a layer turns the residual stream.
        layer_width: Width of the network, sorted, in which layers are dropped for `greedy` and
            `block_drop`: 1 is the whole model.
        layer_blocks: Blocks of calibration text for `greedy` and `block_drop`.
        min_layers: Layers that are left when `greedy` stops; they are ranked by what they cost
            last. Half of them by default.
        norm_factors: Multiply the RMSNorms of narrower networks by what the channels that they lack
            held on average; `auto` where that helps on the first `layer_blocks` blocks.
        batch_size: Sequences per calibration batch, over which the aggregation reduces.
        micro_batch_size: Sequences per forward pass, where a batch does not fit into memory.
        report: Measure random sub-networks before and after.
        sweep: Shrink each dimension alone: the search space `fitted`, and a picture.
        device: `auto`, `cpu`, `cuda`, `cuda:1`; `cuda:0,cuda:1` shares the blocks of the model out
            between several, also `cuda:0,cpu`.
        dtype: Number format of the forward passes, `stored` that of the checkpoint; the sorted
            weights keep theirs.
        seed: Seed of the sub-networks of the report.
        overwrite: Replace what is in `out_dir`.
    """
    from whittle_nas.cli.common import (
        check_least,
        progress_bar,
        resolve_devices,
        resolve_dtype,
        seed_everything,
    )
    from whittle_nas.cli.importance_report import draw_scores, sweep_sizes
    from whittle_nas.data import load_blocks
    from whittle_nas.importance.pipeline import (
        MeasureOptions,
        measure,
        record,
        settle,
        write_sorted,
    )
    from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
    from whittle_nas.weights.files import atomic_directory, check_free
    from whittle_nas.weights.norms import scales_norms

    counts = {"layer_blocks": layer_blocks, "batch_size": batch_size}
    check_least(1, **counts, micro_batch_size=micro_batch_size, min_layers=min_layers)
    check_free(out_dir, overwrite=overwrite)
    options = MeasureOptions(
        criterion=criterion,
        basis=basis,
        aggregation=aggregation,
        scope=scope,
        neuron_activation=neuron_activation,
        head_activation=head_activation,
        layer_order=layer_order,
        layer_width=_share("layer_width", layer_width),
        layer_blocks=layer_blocks,
        min_layers=min_layers,
        norm_factors=norm_factors,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
    )
    sweep.check()
    checkpoint = open_checkpoint(checkpoint_dir)
    if norm_factors is NormFactors.on and not scales_norms(checkpoint.config):
        raise ConfigError(
            f"--norm_factors on: {checkpoint.config.name} has LayerNorms, and the factors are for "
            "RMSNorms; use --norm_factors auto or off"
        )
    _warn_if_sorted(checkpoint)
    seed_everything(seed)
    blocks = load_blocks(data, checkpoint_dir, config=checkpoint.config)
    trial = _plan_trial(report, data, checkpoint, seed=seed)
    where = {"device": resolve_devices(device), "dtype": resolve_dtype(dtype)}
    supernet = load_supernet(checkpoint_dir, **where)
    measured = measure(supernet.model, blocks.tokens, options, progress=progress_bar)
    before = trial.run(supernet, "before sorting") if trial else []
    del supernet  # one model at a time
    with atomic_directory(out_dir, overwrite=overwrite) as partial:
        write_sorted(partial, checkpoint, measured.bases, progress=progress_bar)
        supernet = load_supernet(partial, **where)
        settled = settle(supernet, blocks.tokens, measured.scores, options, progress=progress_bar)
        del supernet
        settings = {**options.to_dict(), "data": dict(blocks.about)}
        found = record(partial, checkpoint, measured, settled, settings=settings)
        draw_scores(partial, measured, settled, options.layer_order)
        if sweep.num_tokens:
            sweep_sizes(partial, load_supernet(partial, **where), blocks, sweep)
        if trial:
            supernet = load_supernet(partial, **where)
            after = trial.run(supernet, "after sorting")
            steps = trial.other_norms(settled, supernet)
            if report.repair:
                steps["repaired"] = trial.run(supernet, "repaired", blocks.tokens)
            config, info = supernet.config, supernet.info
            del supernet
            steps |= trial.permuted(checkpoint, measured, info, **where)
            trial.write(partial, before, after, steps, config)
    print(f"calibrated on {blocks}")
    _summary(found, [*measured.notes, settled.note], out_dir)


def _plan_trial(report: ReportOptions, data: TextData, checkpoint: Any, *, seed: int) -> Any:
    """What the report will measure; None without a report."""
    from whittle_nas.cli.common import check_least

    check_least(0, **{"report.num_subnetworks": report.num_subnetworks})
    if report.num_subnetworks == 0:
        if report.repair:
            raise ConfigError(
                "--report.repair true is about random sub-networks: give --report.num_subnetworks"
            )
        return None
    from whittle_nas.cli.importance_report import plan_trial

    if report.data is None and not data.holds_out():
        raise ConfigError(
            "--report.num_subnetworks needs text that is not calibration data: give "
            "--report.data.files, or --data.valid_fraction 0.1"
        )
    return plan_trial(
        checkpoint,
        space=report.search_space,
        count=report.num_subnetworks,
        text=replace(report.data or data, num_blocks=report.num_blocks),
        seed=seed,
    )


def _summary(found: Any, notes: Sequence[str], out_dir: Path) -> None:
    from whittle_nas.cli.common import command_line

    for note in filter(None, notes):
        print(note)
    order = ", ".join(map(str, found.layer_order))
    print(f"layers, most important first: {order}")
    print(f"sorted checkpoint, scores and pictures: {out_dir}")
    search = ("nas", "search", "--checkpoint_dir", out_dir, "--out_dir", "<dir>")
    budgets = ("--data.files", "<validation text>", "--budgets", "80%, 60%")
    print(f"find smaller models in it with: {command_line(*search, *budgets)}")
    train = ("nas", "finetune", "--checkpoint_dir", out_dir, "--out_dir", "<dir>", "--repair")
    text = ("true", "--data.files", "<text>", "--data.valid_fraction", 0.1)
    print(f"or find and train them with: {command_line(*train, *text, *budgets[2:])}")


def _warn_if_sorted(checkpoint: Any) -> None:
    from whittle_nas.importance.sorting import FILE_NAME, read_importance

    if checkpoint.info.importance is None:
        return
    known = (checkpoint.path / FILE_NAME).is_file()
    if known:
        read_importance(checkpoint.path / FILE_NAME)  # needed at the end: better refused now
    ids = "still speaks of the original ids" if known else "speaks of the ids of this checkpoint"
    print(
        f"nas: warning: {checkpoint.path} is sorted already; it is sorted again, and {FILE_NAME} "
        f"{ids}",
        file=sys.stderr,
    )


def _share(option: str, value: float) -> float:
    if not 0 < value <= 1:
        raise ConfigError(f"--{option} {value} must be above 0 and at most 1")
    return value
