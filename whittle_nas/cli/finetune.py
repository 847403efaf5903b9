"""`nas finetune-supernet`, alias `nas finetune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from whittle_nas.data.options import TextData
from whittle_nas.errors import ConfigError
from whittle_nas.search.options import ShrinkOptions
from whittle_nas.train.choices import SamplerOptions, SandwichOptions, Share, ValidationOptions
from whittle_nas.train.options import (
    LoraOptions,
    LossOptions,
    OptimizerOptions,
    TrainerOptions,
    Weights,
)

# No import for type checkers only: jsonargparse would run it to resolve the signature below.


def finetune(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    data: TextData,
    valid: TextData | None = None,
    search_space: str | None = None,
    sampler: SamplerOptions = SamplerOptions(),
    sandwich: SandwichOptions = SandwichOptions(),
    loss: LossOptions = LossOptions(),
    weights: Weights = Weights.auto,
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
    subnetworks: Path | None = None,
    budgets: dict[str, str] | list[str] | str | None = None,
    shrink: ShrinkOptions = ShrinkOptions(),
    share: Share = Share.cascade,
    repair: bool = False,
    keep_zeros: bool = False,
    seed: int = 1337,
) -> None:
    """Train all sub-networks of a checkpoint at once, or some of them alone.

    Every step runs the full network, sampled sub-networks and the smallest one, and updates
    adapters (or all weights) with the sum of their gradients. They learn what the checkpoint, as it
    came in, says about the text. The result is an ordinary litgpt checkpoint with the adapters
    merged, whose sub-networks work without further training. With `subnetworks`, each of these is
    cut out and trained one after the other, and becomes an ordinary checkpoint of its own; with
    `budgets` they are searched for meanwhile.

    Args:
        checkpoint_dir: A litgpt checkpoint, best sorted by `nas importance` before.
        out_dir: Directory to write; it must be new or empty, but for `resume` and `overwrite`.
        data: Text, or instruction data such as `data.module: Alpaca`.
        valid: Validation data, with the options of `data`; by default what `data.valid_fraction`
            holds out, or the module's own split.
        search_space: A preset, a YAML file, or `fitted`, the sizes that live, as `nas importance`
            has measured them: the default where it has, else `aligned`.
        sampler: Which sub-networks are trained.
        sandwich: Which networks run in a step.
        loss: What the networks learn: who teaches, distillation and cross entropy.
        weights: What is trained: `all`, `adapters`, or, by `auto`, all weights of models of up to
            50 million parameters where there is memory for it, unless adapters are described: by
            any `--lora.` option of the command line, or in a file by numbers that are not the
            default ones.
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
        subnetworks: File with sub-networks to train alone: a front.json, or a YAML list of sizes,
            each with a `name` if you like.
        budgets: Instead of `subnetworks`, train one network under each of these limits, such as
            "80%, 60%" of the parameters or as in `nas search --budgets`, the largest first. Each is
            searched for inside the trained one before it, and starts from its weights.
        shrink: How these are searched for, and what budgets on FLOPs, memory and time are about.
        share: `cascade` trains the `subnetworks` one after another, largest first, and each starts
            from the smallest trained one that it is a part of; `none`: each starts from the
            checkpoint; `all`: together in one set of weights, with one network's worth of steps for
            all of them, and worse networks.
        repair: Repair these networks before they are trained, as `nas export --repair` does, on
            the training text.
        keep_zeros: Weights of zero stay zero, also where adapters are merged (Shears): for
            checkpoints of `nas prune`.
        seed: Of everything random.
    """
    from whittle_nas.cli import training
    from whittle_nas.cli.candidates import library_of
    from whittle_nas.cli.common import check_least, is_first_process, seed_everything
    from whittle_nas.cli.one_by_one import Chosen, train_one_by_one
    from whittle_nas.cli.repairing import check_plain
    from whittle_nas.cli.shrinking import Inside, shrinking_of
    from whittle_nas.cli.training_report import Memory, print_start, warn_of_zeros
    from whittle_nas.train.run import TrainingOptions
    from whittle_nas.train.sources import load_both

    check_least(1, batch_size=batch_size)
    check_least(0, num_workers=num_workers)
    options = TrainingOptions(
        loss=loss,
        lora=lora,
        optimizer=optimizer,
        trainer=trainer,
        validation=validation,
        sandwich=sandwich,
        sampler=sampler,
        batch_size=batch_size,
        checkpoint_blocks=checkpoint_blocks,
        num_workers=num_workers,
        keep_zeros=keep_zeros,
        seed=seed,
    )
    first = is_first_process()
    dry = trainer.fast_dev_run and not (checkpoint_dir / "lit_model.pth").is_file()
    found = None if dry else _open(checkpoint_dir, untie_head=untie_head)
    config = None if found is None else found.config
    apart = share is not Share.all and not (subnetworks is None and budgets is None)
    options = training.by_labels_alone(options, apart=apart)
    memory = Memory.of(checkpoint_dir, config, data, apart=apart)
    if memory is not None:
        options = memory.with_adapters(options, weights)
        if first:
            memory.show(options)
    if found is None:
        print(f"{checkpoint_dir} has no lit_model.pth: nothing was run")
        return
    if require_importance and found.info.importance is None:
        raise ConfigError(
            f"--checkpoint_dir {checkpoint_dir} is not sorted by importance: run `nas importance` "
            "on it first, or set require_importance to false"
        )
    if first and not trainer.fast_dev_run:
        _check_directory(out_dir, resume=resume, overwrite=overwrite)
    if repair:
        _check_repair(alone=apart, keep_zeros=keep_zeros)
    space = training.space_to_train(found, search_space, sampler.num_params)
    shrinking = shrinking_of(
        budgets, found, space, shrink, options, subnetworks=subnetworks, share=share
    )
    chosen = training.named(found, subnetworks, share=share, options=options)
    library = library_of(found, subnetworks=subnetworks)
    check_plain(repair, library, subnetworks=subnetworks)
    training.check_members(found, sampler)
    seed_everything(seed)
    train, held_out = load_both(data, valid, checkpoint_dir, config=found.config, packing=packing)
    if first:
        warn_of_zeros(checkpoint_dir, kept=keep_zeros)
        print_start(options, loss, (train, held_out), tied=found.tied, untied=untie_head)
    task = training.Task(
        options,
        found,
        train.samples,
        held_out.samples[: validation.num_samples],
        out_dir,
        resume=resume,
        untied=untie_head,
        repair=repair,
        cascade=share is Share.cascade,
        library=library,
    )
    if shrinking is not None:
        train_one_by_one(task, Inside(task, shrinking, shrink))
    elif chosen and share is not Share.all:
        train_one_by_one(task, Chosen(chosen, found.config))
    else:
        training.train_together(task, space, chosen)


def _check_repair(*, alone: bool, keep_zeros: bool) -> None:
    if not alone:
        raise ConfigError(
            "--repair true changes the weights of one sub-network: give --subnetworks, "
            "or --budgets, which are trained one by one (--share cascade or none)"
        )
    if keep_zeros:
        raise ConfigError(
            "--keep_zeros true keeps what nas prune has set to 0 and --repair true fits these "
            "matrices again, without zeros: leave one of the two out"
        )


def _check_directory(out_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse what is in the way; of an interrupted training say how it goes on."""
    from whittle_nas.weights.checkpoint import is_unfinished
    from whittle_nas.weights.files import check_free

    if not (resume or overwrite) and is_unfinished(out_dir):
        raise ConfigError(
            f"--out_dir {out_dir} holds a training that was interrupted; go on with --resume true, "
            "or begin anew with --overwrite true"
        )
    check_free(out_dir, overwrite=resume or overwrite)


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
