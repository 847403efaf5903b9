"""`nas finetune-supernet`, alias `nas finetune`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whittle_nas.data.options import TextData
from whittle_nas.errors import ConfigError
from whittle_nas.train.options import (
    LoraOptions,
    LossOptions,
    OptimizerOptions,
    SamplerOptions,
    SandwichOptions,
    TrainerOptions,
    ValidationOptions,
)

if TYPE_CHECKING:
    from whittle_nas.train.module import SupernetTraining


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
        out_dir: Directory to write; it must be new or empty.
        data: Text, or instruction data such as `data.module: Alpaca`.
        valid: Validation data; by default a share of `data` is held out.
        search_space: A preset, or a YAML file.
        sampler: Which sub-networks are trained.
        sandwich: Which networks run in a step.
        loss: Cross entropy and distillation from the full network.
        lora: Adapters; `null` trains all weights.
        optimizer: AdamW and its schedule.
        trainer: Devices, lengths, precision, loggers.
        validation: The networks whose loss is logged.
        batch_size: Samples per device and micro-batch.
        packing: Join short instruction samples into full rows; each attends to itself only.
        checkpoint_blocks: Recompute activations in the backward pass: less memory, more time.
        require_importance: Refuse a checkpoint that `nas importance` has not sorted.
        num_workers: Processes that prepare batches.
        resume: Go on from the newest checkpoint in `out_dir`.
        overwrite: Replace an earlier run in `out_dir`.
        seed: Of everything random.
    """
    from whittle_nas.cli.common import seed_everything
    from whittle_nas.space import load_space
    from whittle_nas.train.fit import fit, make_trainer, newest_checkpoint, num_steps
    from whittle_nas.train.module import Recipe, SupernetTraining
    from whittle_nas.train.output import write_outputs
    from whittle_nas.train.prepare import load_trainable
    from whittle_nas.train.sampling import make_sampler, validation_networks
    from whittle_nas.train.sources import load_both
    from whittle_nas.weights.checkpoint import open_checkpoint

    if batch_size < 1:
        raise ConfigError(f"--batch_size {batch_size} must be at least 1")
    found = open_checkpoint(checkpoint_dir)
    if require_importance and found.info.importance is None:
        raise ConfigError(
            f"--checkpoint_dir {checkpoint_dir} is not sorted by importance: run `nas importance` "
            "on it first, or set require_importance to false"
        )
    head_channels = found.info.head_channels
    space = load_space(search_space, found.config, head_channels=head_channels)
    first = _is_first_process()
    if first:
        _prepare_directory(out_dir, checkpoint_dir, resume=resume, overwrite=overwrite)
    seed_everything(seed)
    train, held_out = load_both(data, valid, checkpoint_dir, config=found.config, packing=packing)
    supernet = load_trainable(found, lora, precision=trainer.precision)
    drawn, grid = make_sampler(sampler, space, supernet, seed=seed, samples=train.samples)
    if first and grid is not None and grid.empty_bins:
        print(f"grid: no sub-network falls into bins {list(grid.empty_bins)} of {sampler.num_bins}")
    run = make_trainer(trainer, out_dir)
    total = num_steps(
        trainer,
        num_samples=len(train.samples),
        batch_size=batch_size,
        world_size=run.world_size,
    )
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
        training=_summary(module),
    )
    _report(module, out_dir)


def _is_first_process() -> bool:
    """Whether this process writes; Lightning starts the others with the same command line."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


def _prepare_directory(
    out_dir: Path, checkpoint_dir: Path, *, resume: bool, overwrite: bool
) -> None:
    from whittle_nas.weights.files import check_free

    if out_dir.resolve() == checkpoint_dir.resolve():
        raise ConfigError(f"--out_dir {out_dir} is the checkpoint that is read; give another one")
    if not resume:
        check_free(out_dir, overwrite=overwrite)
        for name in ("checkpoints", "logs"):
            shutil.rmtree(out_dir / name, ignore_errors=True)
        (out_dir / "lit_model.pth").unlink(missing_ok=True)
    out_dir.mkdir(parents=True, exist_ok=True)


def _summary(module: SupernetTraining) -> dict[str, Any]:
    """What `supernet.yaml` keeps about the training."""
    return {
        "strategy": module.recipe.sandwich.strategy.value,
        "distillation": module.recipe.loss.distillation.value,
        "steps": module.recipe.total_steps,
        "valid_nats_per_token": module.history[max(module.history)],
    }


def _report(module: SupernetTraining, out_dir: Path) -> None:
    from whittle_nas.cli.common import print_table
    from whittle_nas.weights.counting import parameter_counter

    count = parameter_counter(module.supernet.config)
    before, after = module.history[min(module.history)], module.history[max(module.history)]
    rows = [
        (name, count(sub), before[name], after[name])
        for name, sub in sorted(module.valid_networks.items(), key=lambda item: count(item[1]))
    ]
    print_table(("network", "parameters", "before", "after"), rows, "validation, nats per token")
    print(f"trained super-network: {out_dir}")
