"""What `nas finetune` prints."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from whittle_nas.data.options import TextData
from whittle_nas.space import check_supported
from whittle_nas.train.choices import Strategy
from whittle_nas.train.options import LossOptions, Weights

MAX_RISE = 0.03  # share of its validation loss that the whole model may lose without a word
Row = tuple[str, int | None, float, float]  # network, parameters, nats before and after


@dataclass(frozen=True)
class Memory:
    """What trainings of a checkpoint need, and what its device has.

    Attributes:
        checkpoint_dir: the checkpoint.
        config: of its model.
        data: gives the tokens per sample.
        apart: whether sub-networks are trained alone, beside the model that teaches them.
    """

    checkpoint_dir: Path
    config: Any
    data: TextData
    apart: bool = False

    @classmethod
    def of(
        cls, checkpoint_dir: Path, config: Any, data: TextData, *, apart: bool = False
    ) -> Memory | None:
        """For a model without weights the file has to say the config; None if it can't."""
        from whittle_nas.weights.checkpoint import read_model_config

        if config is None:
            if not (checkpoint_dir / "model_config.yaml").is_file():
                return None  # open_checkpoint says what is missing
            config = read_model_config(checkpoint_dir / "model_config.yaml")
            check_supported(config)
        return cls(checkpoint_dir, config, data, apart)

    def needed(self, options: Any) -> Any:
        """`MemoryEstimate` of a training; `options` are `train.run.TrainingOptions`."""
        from whittle_nas.train.fit import num_devices
        from whittle_nas.train.memory import estimate_memory, stored_format

        return estimate_memory(
            self.config,
            options.lora,
            batch=options.batch_size,
            tokens=self.data.check(self.config.block_size),
            precision=options.trainer.precision,
            loss=options.loss,
            checkpoint_blocks=options.checkpoint_blocks,
            stored=stored_format(self.checkpoint_dir),
            shards=num_devices(options.trainer) if options.trainer.is_sharded else 1,
            apart=self.apart,
            keep_zeros=options.keep_zeros,
        )

    def there(self, options: Any) -> int:
        """Bytes of the device."""
        import torch

        from whittle_nas.train.memory import device_bytes

        wanted = options.trainer.accelerator in ("auto", "cuda", "gpu")
        return device_bytes(torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu"))

    def with_adapters(self, options: Any, weights: Weights) -> Any:
        """The options with the adapters that are trained, None for all weights."""
        from whittle_nas.train.memory import choose_adapters

        everything = replace(options, lora=None)
        if weights is Weights.auto and options.trainer.precision == "bf16-true":
            weights = Weights.adapters  # all weights lose their steps in that format
        adapters = choose_adapters(
            options.lora,
            weights,
            lambda: self.needed(everything).total,
            self.there(options),
            self.config,
        )
        return replace(options, lora=adapters)

    def show(self, options: Any) -> None:
        """Print what a dry run will need; warn where the device is smaller."""
        from whittle_nas.cli.common import print_table

        needed, there = self.needed(options), self.there(options)
        if options.trainer.fast_dev_run:
            rows = [(field.name, getattr(needed, field.name) / 2**30) for field in fields(needed)]
            print_table(("memory", "GiB"), [*rows, ("total", needed.total / 2**30)])
        if needed.total > there:
            print(
                f"nas: the training needs about {needed.total / 2**30:.1f} GiB per device and this "
                f"one has {there / 2**30:.1f}: lower batch_size or data.block_size, or set "
                "checkpoint_blocks to true",
                file=sys.stderr,
            )


def print_start(
    options: Any, asked: LossOptions, data: tuple[Any, Any], *, tied: bool, untied: bool
) -> None:
    """What is trained, by whom and on what.

    Args:
        options: `train.run.TrainingOptions`.
        asked: the losses of the command line, whose teacher may have nobody to teach.
        data: for training and for validation.
        tied: whether the head is the token table.
        untied: whether it gets a table of its own.
    """
    print(f"trained are {'all weights' if options.lora is None else 'adapters'}")
    if options.loss.distillation is not asked.distillation:
        print("the labels alone teach: the whole model has no teacher in itself")
    _print_data(*data)
    if tied:
        print("head: it is the token table and stays so; --untie_head true trains it apart")
    if untied:
        print("head: untied from the token table; the result stores and counts both")


def _print_data(train: Any, held_out: Any) -> None:
    """What is scored, and what else about the data a user may not expect."""
    print(f"validation data: {held_out.about}")
    for name, found in (("training", train), ("validation", held_out)):
        if found.num_cut or found.num_unlabelled:
            print(
                f"{name} data: {found.num_cut} samples reach the block size and were cut, "
                f"{found.num_unlabelled} had no label left and were dropped"
            )


def warn_of_zeros(checkpoint_dir: Path, *, kept: bool) -> None:
    """Say it where a training fills the zeros that `nas prune` has made: they are not kept."""
    if kept:
        return
    from whittle_nas.prune.options import MASKS
    from whittle_nas.reading import read_json
    from whittle_nas.weights.files import PRUNE_REPORT

    path = checkpoint_dir / PRUNE_REPORT
    report = read_json(path) if path.is_file() else {}
    if isinstance(report, dict) and report.get("method") in [method.value for method in MASKS]:
        print(
            f"nas: {checkpoint_dir} has the zeros of nas prune --method {report['method']}, and "
            "training fills them; --keep_zeros true keeps them",
            file=sys.stderr,
        )


def print_grid(grid: Any) -> None:
    """Bins of a grid in which nothing was found."""
    if grid is not None and grid.empty_bins:
        bins = ", ".join(map(str, grid.empty_bins))
        print(f"grid: no sub-network was found in bins {bins} (of {len(grid.edges) - 1})")


def print_losses(rows: Sequence[Row]) -> None:
    """Validation losses before and after, by size."""
    from whittle_nas.cli.common import print_table

    by_size = sorted(rows, key=lambda row: (row[1] or 0, row[0] == "untouched model"))
    print_table(("network", "parameters", "before", "after"), by_size, "validation, nats per token")


def print_ranks(by_rank: Mapping[int, Mapping[str, float]]) -> None:
    """Validation losses with adapters of every rank, if they are elastic."""
    from whittle_nas.cli.common import print_table

    if by_rank:
        names = list(next(iter(by_rank.values())))
        rows = [(f"rank {rank}", *losses.values()) for rank, losses in by_rank.items()]
        print_table(("adapters", *names), rows, "validation, nats per token")
        print(f"rank {max(by_rank)} is merged; take another one with nas export --lora_r")


def report(trained: Any) -> None:
    """Losses of the validated networks, and a warning where the whole model lost too much.

    Args:
        trained: `train.run.Trained` of a whole checkpoint.
    """
    from whittle_nas.weights.counting import parameter_counter

    history, networks = trained.history, trained.networks.validated
    before, after = history[min(history)], history[max(history)]
    count = parameter_counter(trained.checkpoint.config)
    rows: list[Row] = [
        (name, count(sub), before[name], after[name]) for name, sub in networks.items()
    ]
    rows.append(("untouched model", count(networks["full"]), before["full"], before["full"]))
    print_losses(rows)
    if trained.module.stopped:
        print(f"nas: stopped early: {trained.module.stopped}", file=sys.stderr)
    warn_of_rise("the whole model", before["full"], after["full"])


def warn_of_rise(what: str, before: float, after: float) -> None:
    """Say it where a training made a model worse."""
    rise = after / before - 1
    if rise > MAX_RISE:
        print(
            f"nas: {what} got worse: its validation loss rose by {100 * rise:.1f} %, from "
            f"{before:.4f} to {after:.4f} nats per token; lower optimizer.lr, train on more text, "
            "or stop with validation.max_full_loss",
            file=sys.stderr,
        )


def print_next(out_dir: Path, strategy: Strategy, chosen: Iterable[str]) -> None:
    """Where the result is, and the command that reads it."""
    from whittle_nas.cli.common import command_line

    evaluate = ("nas", "evaluate", "--out_dir", "<dir>", "--data.files", "<test text>")
    parts = [out_dir / name for name in chosen]
    if parts or strategy is Strategy.standard:
        paths = parts or [out_dir]
        print(f"trained {'networks' if parts else 'model'}: {', '.join(map(str, paths))}")
        print(f"evaluate it with: {command_line(*evaluate, '--checkpoint_dir', paths[0])}")
        return
    print(f"trained super-network: {out_dir}")
    search = ("nas", "search", "--checkpoint_dir", out_dir, "--out_dir", "<dir>")
    print(f"search it with: {command_line(*search, '--data.files', '<validation text>')}")
