"""`nas finetune-supernet`, alias `nas finetune`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from whittle_nas.data.options import TextData
from whittle_nas.errors import ConfigError
from whittle_nas.space import SubNetwork, check_supported
from whittle_nas.train.options import (
    LoraOptions,
    LossOptions,
    OptimizerOptions,
    SamplerOptions,
    SandwichOptions,
    TrainerOptions,
    ValidationOptions,
)

# No import for type checkers only: jsonargparse would run it to resolve the signature below.


def finetune(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    data: TextData,
    valid: TextData | None = None,
    search_space: str = "aligned",
    sampler: SamplerOptions = SamplerOptions(),
    sandwich: SandwichOptions = SandwichOptions(),
    loss: LossOptions = LossOptions(),
    lora: LoraOptions | None = LoraOptions(),
    optimizer: OptimizerOptions = OptimizerOptions(),
    trainer: TrainerOptions = TrainerOptions(),
    validation: ValidationOptions = ValidationOptions(),
    batch_size: int = 8,
    packing: bool = False,
    checkpoint_blocks: bool = False,
    require_importance: bool = False,
    untie_head: bool = False,
    num_workers: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 1337,
) -> None:
    """Train all sub-networks of a checkpoint at once.

    Every step runs the full network, sampled sub-networks and the smallest one, and updates
    adapters (or all weights) with the sum of their gradients. The result is an ordinary litgpt
    checkpoint with the adapters merged, whose sub-networks work without further training.

    Args:
        checkpoint_dir: A litgpt checkpoint, best sorted by `nas importance` before.
        out_dir: Directory to write; it must be new or empty, but for `resume` and `overwrite`.
        data: Text, or instruction data such as `data.module: Alpaca`.
        valid: Validation data, with the options of `data`; by default what `data.valid_fraction`
            holds out, or the module's own split.
        search_space: A preset, or a YAML file.
        sampler: Which sub-networks are trained.
        sandwich: Which networks run in a step.
        loss: Cross entropy and distillation from the full network.
        lora: Adapters: their rank `r`, scale `alpha / r`, dropout, and which weights have one, for
            instance `--lora.r 8`; `null` trains all weights.
        optimizer: AdamW and its schedule.
        trainer: Devices, lengths, precision, loggers.
        validation: The networks whose loss is logged.
        batch_size: Samples per device and micro-batch.
        packing: Join short instruction samples into full rows; each attends to itself only.
        checkpoint_blocks: Recompute activations in the backward pass: less memory, more time.
        require_importance: Refuse a checkpoint that `nas importance` has not sorted.
        untie_head: Give a checkpoint whose head is its token table a head of its own, which is
            trained, counted and stored apart; by default the two stay one table.
        num_workers: Processes that prepare batches.
        resume: Go on from the newest checkpoint in `out_dir`.
        overwrite: Replace an earlier run in `out_dir`, which is removed when the training starts.
        seed: Of everything random.
    """
    from whittle_nas.cli.common import (
        check_least,
        command_line,
        is_first_process,
        seed_everything,
    )
    from whittle_nas.space import load_space
    from whittle_nas.train.fit import fit, make_trainer, newest_checkpoint, num_steps
    from whittle_nas.train.module import SupernetTraining
    from whittle_nas.train.output import write_outputs
    from whittle_nas.train.prepare import load_trainable
    from whittle_nas.train.recipe import Recipe
    from whittle_nas.train.sampling import make_sampler, validation_networks
    from whittle_nas.train.sources import load_both
    from whittle_nas.weights.counting import parameter_counter
    from whittle_nas.weights.files import check_free

    check_least(1, batch_size=batch_size)
    check_least(0, num_workers=num_workers)
    first = is_first_process()
    dry = trainer.fast_dev_run and not (checkpoint_dir / "lit_model.pth").is_file()
    found = None if dry else _open(checkpoint_dir, untie_head=untie_head)
    if first:
        config = None if found is None else found.config
        estimate = partial(_show_memory, checkpoint_dir, config, data, lora, loss, trainer)
        estimate(batch_size=batch_size, checkpoint_blocks=checkpoint_blocks)
    if found is None:
        print(f"{checkpoint_dir} has no lit_model.pth: nothing was run")
        return
    if require_importance and found.info.importance is None:
        raise ConfigError(
            f"--checkpoint_dir {checkpoint_dir} is not sorted by importance: run `nas importance` "
            "on it first, or set require_importance to false"
        )
    space = load_space(search_space, found.config, head_channels=found.info.head_channels)
    if first and not trainer.fast_dev_run:
        check_free(out_dir, overwrite=resume or overwrite)
    seed_everything(seed)
    train, held_out = load_both(data, valid, checkpoint_dir, config=found.config, packing=packing)
    supernet = load_trainable(found, lora, precision=trainer.precision)
    drawn, grid = make_sampler(sampler, space, supernet, seed=seed, samples=train.samples)
    if first:
        _print_data(train, held_out, grid)
        _print_tie(found.tied, untied=untie_head)
    run = make_trainer(trainer, out_dir)
    length = {"num_samples": len(train.samples), "batch_size": batch_size}
    total = num_steps(trainer, **length, world_size=run.world_size)
    tenth = max(1, total // 10)
    recipe = Recipe(
        sandwich=sandwich,
        loss=loss,
        optimizer=optimizer.resolved(full=lora is None),
        total_steps=total,
        batch_size=batch_size,
        accumulate=trainer.accumulate_grad_batches,
        clip=trainer.gradient_clip_val,
        seed=seed,
        checkpoint_blocks=checkpoint_blocks,
        num_workers=num_workers,
        log_every_n_steps=trainer.log_every_n_steps,
        validate_every=min(validation.every_n_steps or tenth, total),
    )
    module = SupernetTraining(
        supernet,
        recipe,
        smallest=space.smallest,
        sampler=drawn,
        train=train.samples,
        valid=held_out.samples[: validation.num_samples],
        valid_networks=validation_networks(space, supernet, validation.num_networks),
    )
    if first and not trainer.fast_dev_run:
        _prepare_directory(out_dir, resume=resume)
    fit(
        run,
        module,
        out_dir,
        checkpoint_every=trainer.checkpoint_every_n_steps or tenth,
        resume_from=newest_checkpoint(out_dir) if resume else None,
    )
    if trainer.fast_dev_run or not run.is_global_zero:
        return
    write_outputs(
        out_dir,
        supernet,
        found,
        space=space,
        grid=grid,
        history=module.history,
        networks=module.valid_networks,
        training={
            "strategy": sandwich.strategy.value,
            "distillation": loss.distillation.value,
            "sampler": sampler.kind.value,
            "steps": total,
            "head_untied": untie_head,
            "valid_nats_per_token": module.history[max(module.history)],
        },
    )
    _report(module.history, module.valid_networks, parameter_counter(found.config))
    print(f"trained super-network: {out_dir}")
    search = ("nas", "search", "--checkpoint_dir", out_dir, "--out_dir", "<dir>")
    print(f"search it with: {command_line(*search, '--data.files', '<validation text>')}")


def _open(checkpoint_dir: Path, *, untie_head: bool) -> Any:
    """The checkpoint to train, with a head of its own where that is asked for."""
    from whittle_nas.weights.checkpoint import open_checkpoint
    from whittle_nas.weights.tying import untied

    found = open_checkpoint(checkpoint_dir)
    if not untie_head:
        return found
    if not found.tied:
        raise ConfigError(
            f"--untie_head true: head and token table of {checkpoint_dir} are two tables already"
        )
    return replace(found, config=untied(found.config))


def _show_memory(
    checkpoint_dir: Path,
    config: Any,
    data: TextData,
    lora: LoraOptions | None,
    loss: LossOptions,
    trainer: TrainerOptions,
    *,
    batch_size: int,
    checkpoint_blocks: bool,
) -> None:
    """Print what a dry run will need; warn where the device is smaller."""
    import torch

    from whittle_nas.cli.common import print_table
    from whittle_nas.train.memory import device_bytes, estimate_memory
    from whittle_nas.weights.checkpoint import read_model_config

    if config is None:
        if not (checkpoint_dir / "model_config.yaml").is_file():
            return  # open_checkpoint says what is missing
        config = read_model_config(checkpoint_dir / "model_config.yaml")
        check_supported(config)
    needed = estimate_memory(
        config,
        lora,
        batch=batch_size,
        tokens=data.check(config.block_size),
        precision=trainer.precision,
        loss=loss,
        checkpoint_blocks=checkpoint_blocks,
    )
    on_cuda = trainer.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    there = device_bytes(torch.device("cuda" if on_cuda else "cpu"))
    if trainer.fast_dev_run:
        rows = [(field.name, getattr(needed, field.name) / 2**30) for field in fields(needed)]
        print_table(("memory", "GiB"), [*rows, ("total", needed.total / 2**30)])
    if needed.total > there:
        print(
            f"nas: the training needs about {needed.total / 2**30:.1f} GiB per device and this "
            f"one has {there / 2**30:.1f}: lower batch_size or data.block_size, or set "
            "checkpoint_blocks to true",
            file=sys.stderr,
        )


def _print_data(train: Any, held_out: Any, grid: Any) -> None:
    """What is scored, and what else about the data and the grid a user may not expect."""
    print(f"validation data: {held_out.about}")
    for name, found in (("training", train), ("validation", held_out)):
        if found.num_cut or found.num_unlabelled:
            print(
                f"{name} data: {found.num_cut} samples reach the block size and were cut, "
                f"{found.num_unlabelled} had no label left and were dropped"
            )
    if grid is not None and grid.empty_bins:
        bins = ", ".join(map(str, grid.empty_bins))
        print(f"grid: no sub-network was found in bins {bins} (of {len(grid.edges) - 1})")


def _print_tie(tied: bool, *, untied: bool) -> None:
    if tied:
        print("head: it is the token table and stays so; --untie_head true trains it apart")
    if untied:
        print("head: untied from the token table; the result stores and counts both")


def _prepare_directory(out_dir: Path, *, resume: bool) -> None:
    """Make the directory, without what an earlier run left unless it goes on."""
    from whittle_nas.weights.files import remove_run

    if not resume:
        remove_run(out_dir, ("lit_model.pth", "checkpoints", "logs"))
    out_dir.mkdir(parents=True, exist_ok=True)


def _report(
    history: dict[int, dict[str, float]],
    networks: dict[str, SubNetwork],
    num_params: Callable[[SubNetwork], int],
) -> None:
    """Validation losses of the fixed set of networks, before and after."""
    from whittle_nas.cli.common import print_table

    before, after = history[min(history)], history[max(history)]
    by_size = sorted(networks.items(), key=lambda item: num_params(item[1]))
    rows = [(name, num_params(sub), before[name], after[name]) for name, sub in by_size]
    print_table(("network", "parameters", "before", "after"), rows, "validation, nats per token")
