"""One training from its options to the trained network: the same for super-networks and for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L

from whittle_nas.errors import ConfigError
from whittle_nas.space.samplers import Grid, GridSampler, Sampler
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.train.batches import Sample
from whittle_nas.train.choices import (
    SamplerKind,
    SamplerOptions,
    SandwichOptions,
    Strategy,
    ValidationOptions,
)
from whittle_nas.train.fit import fit, make_trainer, newest_checkpoint, num_steps
from whittle_nas.train.module import SupernetTraining
from whittle_nas.train.options import (
    ORIGINAL,
    LoraOptions,
    LossOptions,
    OptimizerOptions,
    TrainerOptions,
)
from whittle_nas.train.prepare import load_trainable, part_loader
from whittle_nas.train.recipe import SCORED, Recipe, scoring_interval, validation_interval
from whittle_nas.train.teacher import Teacher, make_teacher
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.checkpoint import Checkpoint
from whittle_nas.weights.files import WEIGHTS
from whittle_nas.weights.identity import fingerprint
from whittle_nas.weights.supernet import SuperNetwork


@dataclass(frozen=True)
class TrainingOptions:
    """How to train, whatever is trained; the options of `nas finetune` by the same names."""

    loss: LossOptions = LossOptions()
    lora: LoraOptions | None = LoraOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    trainer: TrainerOptions = TrainerOptions()
    validation: ValidationOptions = ValidationOptions()
    sandwich: SandwichOptions = SandwichOptions()
    sampler: SamplerOptions = SamplerOptions()
    batch_size: int = 8
    checkpoint_blocks: bool = False
    num_workers: int = 0
    keep_zeros: bool = False
    seed: int = 1337

    def alone(self) -> TrainingOptions:
        """For one network, which has no sub-networks to train.

        A limit of the whole model's loss is about that model, and so not about a part of it.
        """
        validation = self.validation
        if self.sandwich.strategy is not Strategy.standard:
            validation = replace(validation, max_full_loss=None)
        sandwich = SandwichOptions(strategy=Strategy.standard)
        return replace(self, sandwich=sandwich, validation=validation)


@dataclass(frozen=True)
class Networks:
    """Which networks of a super-network a training is about.

    Attributes:
        smallest: in sandwich steps, as often as the options say.
        sampler: of the others.
        validated: the fixed set whose loss is reported, by name.
        grid: the sampler's, if it has one.
    """

    smallest: SubNetwork
    sampler: Sampler
    validated: Mapping[str, SubNetwork]
    grid: Grid | None = None

    @classmethod
    def only(cls, full: SubNetwork) -> Networks:
        """The whole model alone."""
        return cls(full, GridSampler((full,)), {"full": full})


@dataclass(frozen=True)
class Trained:
    """What a training leaves in memory."""

    trainer: L.Trainer
    module: SupernetTraining
    networks: Networks
    checkpoint: Checkpoint

    @property
    def supernet(self) -> SuperNetwork:
        """The trained super-network, adapters not merged."""
        return self.module.supernet

    @property
    def history(self) -> dict[int, dict[str, float]]:
        """Validation losses in nats per token, by step and network."""
        return self.module.history


def train(
    options: TrainingOptions,
    checkpoint: Checkpoint,
    choose: Callable[[SuperNetwork, L.Trainer], Networks],
    *,
    samples: Sequence[Sample],
    valid: Sequence[Sample],
    out_dir: Path | None,
    teacher: Teacher | None = None,
    resume: bool = False,
    prepare: Callable[[], object] = lambda: None,
    on_step: Callable[[], object] = lambda: None,
) -> Trained:
    """Train a checkpoint.

    Args:
        options: how.
        checkpoint: what; it stays as it is.
        choose: which of its networks, once it is loaded and the devices are known.
        samples: training samples.
        valid: validation samples.
        out_dir: gets logs and checkpoints; None keeps everything in memory.
        teacher: instead of the one that `options.loss` names.
        resume: go on from the newest checkpoint in `out_dir`.
        prepare: called when everything was found valid and the training is about to start.
        on_step: called after every optimiser step.

    Raises:
        ConfigError: for everything that can be wrong with options, weights or devices.
    """
    precision, sharded = options.trainer.precision, options.trainer.is_sharded
    if sharded and options.sampler.kind is SamplerKind.calibrate_ppl:
        raise ConfigError(
            "sampler.kind=calibrate_ppl runs networks before the model is shared out: with "
            "trainer.strategy=fsdp take grid_params or pareto"
        )
    supernet = load_trainable(
        checkpoint,
        options.lora,
        precision=precision,
        sharded=sharded,
        keep_zeros=options.keep_zeros,
    )
    trainer = make_trainer(options.trainer, out_dir)
    with trainer.precision_plugin.val_step_context():  # some choose by their losses
        networks = choose(supernet, trainer)
    recipe = _recipe(options, checkpoint, trainer, networks, len(samples), len(valid))
    alone = options.sandwich.strategy is Strategy.standard
    if teacher is None and not (alone and options.loss.teacher == ORIGINAL):  # its own teacher
        teacher = make_teacher(
            options.loss, supernet, checkpoint, precision=precision, sharded=sharded
        )
    module = SupernetTraining(
        supernet,
        recipe,
        smallest=networks.smallest,
        sampler=networks.sampler,
        train=samples,
        valid=valid,
        valid_networks=networks.validated,
        teacher=teacher,
        on_step=on_step,
        prepare=part_loader(checkpoint, precision=precision, adapted=options.lora is not None),
    )
    prepare()
    tenth = max(1, recipe.total_steps // 10)
    fit(
        trainer,
        module,
        out_dir,
        checkpoint_every=options.trainer.checkpoint_every_n_steps or tenth,
        resume_from=newest_checkpoint(out_dir) if resume and out_dir else None,
    )
    return Trained(trainer, module, networks, checkpoint)


def _recipe(
    options: TrainingOptions,
    checkpoint: Checkpoint,
    trainer: L.Trainer,
    networks: Networks,
    count: int,
    num_valid: int,
) -> Recipe:
    size, sandwich, sampler = options.batch_size, options.sandwich, options.sampler
    total = num_steps(
        options.trainer, num_samples=count, batch_size=size, world_size=trainer.world_size
    )
    per_step = 1
    if sandwich.strategy is Strategy.sandwich:
        per_step = 1 + sandwich.num_random + sandwich.train_smallest
    step_passes = per_step * options.trainer.accumulate_grad_batches
    interval = options.validation.every_n_steps or validation_interval(
        total,
        step_passes=step_passes,
        validation_passes=len(networks.validated) * -(-num_valid // (size * trainer.world_size)),
    )
    return Recipe(
        sandwich=sandwich,
        loss=options.loss,
        optimizer=options.optimizer.resolved(
            full=options.lora is None, num_params=num_params(checkpoint.config)
        ),
        total_steps=total,
        batch_size=size,
        accumulate=options.trainer.accumulate_grad_batches,
        clip=options.trainer.gradient_clip_val,
        seed=options.seed,
        checkpoint_blocks=options.checkpoint_blocks,
        num_workers=options.num_workers,
        log_every_n_steps=options.trainer.log_every_n_steps,
        validate_every=min(interval, total),
        score_every=sampler.every_n_steps
        or scoring_interval(
            step_passes=step_passes,
            scoring_passes=SCORED * -(-sampler.calibration_samples // (size * trainer.world_size)),
        ),
        score_samples=sampler.calibration_samples,
        keep_zeros=options.keep_zeros and options.lora is None,
        max_full_loss=options.validation.max_full_loss,
        lora=options.lora,
        sampler=sampler,
        start=fingerprint(checkpoint.path) if (checkpoint.path / WEIGHTS).is_file() else "",
    )
