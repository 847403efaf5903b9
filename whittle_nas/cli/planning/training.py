"""Plans of trainings."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import torch

from whittle_nas.cli.candidates import choose_candidates
from whittle_nas.cli.planning.source import BYTES_PER_TOKEN, Source, blocks_of
from whittle_nas.cli.selection import default_space, space_for
from whittle_nas.cli.shrinking import shrinking_of
from whittle_nas.cli.training_report import Memory
from whittle_nas.metrics.plan import Plan, training_flops
from whittle_nas.space import SearchSpace, SubNetwork
from whittle_nas.train.choices import Share
from whittle_nas.train.run import TrainingOptions
from whittle_nas.weights.counting import parameter_counter


def finetune(source: Source, options: Any) -> Plan:
    """What a training takes; see `plan_of`."""
    from whittle_nas.cli.training import batch_networks, by_labels_alone
    from whittle_nas.train.fit import MOST_STEPS, num_devices, num_steps

    config = source.config
    training = TrainingOptions(
        **{f.name: getattr(options, f.name) for f in fields(TrainingOptions)}
    )
    space = space_for(source.checkpoint, default_space(source.checkpoint, options.search_space))
    alone = _trained_alone(source, space, options, training)
    training = by_labels_alone(training, apart=bool(alone))
    needs = Memory(source.checkpoint.path, config, options.data, apart=bool(alone))
    training = needs.with_adapters(training, options.weights)
    trainer, devices = training.trainer, num_devices(training.trainer)
    blocks, length, notes = blocks_of(options.data, source)
    steps = num_steps(
        trainer, num_samples=blocks, batch_size=training.batch_size, world_size=devices
    )
    if trainer.max_steps is None and notes:
        steps = MOST_STEPS
        notes = [f"{steps} steps are assumed: the length follows from the data, which is not read"]
        if trainer.max_epochs is not None:
            notes[0] += f", and --trainer.max_epochs {trainer.max_epochs} may be many more"
    rows = training.batch_size * length
    tokens = steps * trainer.accumulate_grad_batches * rows * devices
    per_token: Counter[str] = Counter()
    together = batch_networks(training.sandwich, source.full, space)
    for networks in [{sub: 1.0} for sub in alone] or [together]:
        per_token.update(
            training_flops(
                config,
                networks,
                length=length,
                adapters=training.lora is not None,
                recomputes=training.checkpoint_blocks,
                teacher=training.loss.has_frozen_teacher,
            )
        )
    needed = needs.needed(training)
    of_step = {f.name: getattr(needed, f.name) for f in fields(needed)}
    written = {"checkpoint": source.weight_bytes()}
    if alone:
        count = parameter_counter(config)
        written = {"checkpoints": sum(written["checkpoint"] * count(s) for s in alone)}
        written["checkpoints"] //= count(source.full)
        what = f"{len(alone)} trained one by one" if len(alone) > 1 else "trained alone"
        notes = (*notes, f"networks of {options.subnetworks or '--budgets'}: {what}")
    if options.budgets is not None:
        notes = (*notes, f"{options.shrink.candidates} networks tried for each are not in it")
    if training.lora is not None:
        written["adapters"] = of_step["adapters"] * (devices if trainer.is_sharded else 1)
    return Plan(
        config,
        {"checkpoint": source.weight_bytes(), "text": tokens * BYTES_PER_TOKEN},
        written,
        {name: size for name, size in of_step.items() if size},
        {name: tokens * value for name, value in per_token.items()},
        devices=devices,
        dtype=torch.float32 if trainer.precision == "32-true" else torch.bfloat16,
        rows=rows,
        notes=(
            *notes,
            f"{steps} steps of {rows * trainer.accumulate_grad_batches * devices:,} tokens",
        ),
    )


def _trained_alone(
    source: Source, space: SearchSpace, options: Any, training: TrainingOptions
) -> list[SubNetwork]:
    """Networks of a training that are trained one by one; the whole one where they aren't known."""
    shrinking = shrinking_of(
        options.budgets, source.checkpoint, space, options.shrink, training,
        subnetworks=options.subnetworks, share=options.share,
    )  # fmt: skip
    if shrinking is not None:
        return list(shrinking.largest().values())
    if options.subnetworks is None or options.share is Share.all:
        return []
    if not options.subnetworks.is_file():  # a stage of a recipe will write it
        return [source.full]
    chosen = choose_candidates(source.checkpoint, subnetworks=options.subnetworks)
    return [one.subnetwork for one in chosen]
