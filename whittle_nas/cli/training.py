"""What a call of `nas finetune` trains, and the training of networks that share weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from whittle_nas.cli.common import is_first_process, progress_bar
from whittle_nas.cli.fronts import is_front, open_front
from whittle_nas.cli.selection import default_space, space_for
from whittle_nas.cli.training_report import (
    print_grid,
    print_next,
    print_ranks,
    report,
)
from whittle_nas.errors import ConfigError
from whittle_nas.export.checkpoint import describe
from whittle_nas.prune.report import carry_report
from whittle_nas.reading import read_yaml
from whittle_nas.repair.engine import repair
from whittle_nas.space import SearchSpace, SubNetwork
from whittle_nas.space.limited import limited
from whittle_nas.train import adapters
from whittle_nas.train.batches import Sample
from whittle_nas.train.choices import SamplerKind, SamplerOptions, SandwichOptions, Share, Strategy
from whittle_nas.train.fit import fitting_device
from whittle_nas.train.options import Distillation, LossOptions
from whittle_nas.train.output import write_outputs
from whittle_nas.train.run import TrainingOptions, train
from whittle_nas.train.sampling import choose_networks
from whittle_nas.train.specialise import (
    Slice,
    check_trainable,
    part_of,
    repaired,
    slice_of,
    text_of,
    write_slices,
)
from whittle_nas.weights.checkpoint import Checkpoint, supernet_of
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.files import PRUNE_REPORT, remove_run
from whittle_nas.weights.patch import PatchSource
from whittle_nas.weights.supernet import SuperNetwork

WEIGHTS = "lit_model.pth"


@dataclass(frozen=True)
class Task:
    """What a call of the command is about."""

    options: TrainingOptions
    checkpoint: Checkpoint
    samples: Sequence[Sample]
    valid: Sequence[Sample]
    out_dir: Path
    resume: bool
    untied: bool = False
    repair: bool = False
    cascade: bool = False
    library: PatchSource | None = None

    @property
    def is_dry(self) -> bool:
        """Whether nothing is written."""
        return self.options.trainer.fast_dev_run

    def start_of(
        self,
        sub: SubNetwork,
        larger: Slice | None,
        *,
        repair_it: bool,
        around: SuperNetwork | None = None,
        samples: int | None = None,
    ) -> Slice:
        """The weights that a network starts from: its part of a trained one, or a slice.

        Args:
            sub: the network.
            larger: the trained one; None: it is cut from the checkpoint.
            repair_it: whether it is repaired.
            around: what it is cut from, where that is loaded already.
            samples: on how many it is repaired; None: as many as repair takes.
        """
        whole: Checkpoint = larger or self.checkpoint
        inside = sub.within(larger.sub) if larger else sub
        patch = None if self.library is None else self.library.patch(sub)
        start = part_of(larger, sub) if larger else slice_of(self.checkpoint, sub, patch)
        if not repair_it or inside is None:
            return start
        text = text_of(self.samples)[:samples]
        supernet = around or supernet_of(whole, device=fitting_device(self.options.trainer))
        return repaired(start, repair(supernet, inside, text, progress=progress_bar).patch)

    def prepare(self, names: Iterable[str] = (), files: Iterable[str] = ()) -> None:
        """Make the directory, without what an earlier run left unless it goes on.

        Args:
            names: of the networks that get directories of their own in it.
            files: that are made beside them.
        """
        if self.is_dry or not is_first_process():
            return
        if not self.resume:
            for path in (self.out_dir, *(self.out_dir / name for name in names)):
                remove_run(path, (WEIGHTS, "checkpoints", "logs", PRUNE_REPORT, *files))
        self.out_dir.mkdir(parents=True, exist_ok=True)

    def describe(self, folder: Path) -> None:
        """Add to a checkpoint what other programs read, and whose zeros it has kept."""
        describe(folder)
        if self.options.keep_zeros:
            carry_report(self.checkpoint.path, folder)


def named(
    checkpoint: Checkpoint, subnetworks: Path | None, *, share: Share, options: TrainingOptions
) -> dict[str, SubNetwork]:
    """The sub-networks of `--subnetworks` by name, none without that option.

    Raises:
        ConfigError: for a file that can't be read, and for options that do not go together.
    """
    from whittle_nas.cli.candidates import choose_candidates

    if subnetworks is None:
        if share is not Share.cascade:
            raise ConfigError(f"--share {share.value} is about --subnetworks: give that file")
        return {}
    check_apart(options, "--subnetworks", shared=share is Share.all)
    candidates = choose_candidates(checkpoint, subnetworks=subnetworks)
    if share is Share.all and any(candidate.library for candidate in candidates):
        raise ConfigError(
            f"--share all trains slices of one set of weights, and the networks of {subnetworks} "
            "are made of parts of a library: train them one by one (--share cascade or none)"
        )
    chosen = {candidate.label: candidate.subnetwork for candidate in candidates}
    forms = [form for sub in chosen.values() for form in sub.forms]
    check_trainable(forms, f"--subnetworks {subnetworks}")
    return chosen


def check_apart(options: TrainingOptions, option: str, *, shared: bool = False) -> None:
    """Refuse options of a super-network where networks are trained one by one.

    Args:
        options: of the command.
        option: says which networks they are.
        shared: whether they have one set of weights.

    Raises:
        ConfigError: naming the option.
    """
    if not shared and options.lora is not None and options.lora.ranks:
        raise ConfigError(
            "lora.ranks: adapters of networks that are trained one by one are merged at once; "
            "leave it out, or train chosen --subnetworks together with --share all"
        )
    if options.sampler != SamplerOptions():
        raise ConfigError(f"{option} says which networks are trained: leave `sampler` out")


def by_labels_alone(options: TrainingOptions, *, apart: bool = False) -> TrainingOptions:
    """The options of what is trained where nobody is left to teach, else the same.

    The whole model trained alone is what its teacher, the checkpoint as it came in, is; and in
    place it would teach nobody.

    Args:
        options: of the command.
        apart: whether sub-networks are trained alone, which the whole model teaches.

    Raises:
        ConfigError: if something was asked of that teacher.
    """
    loss, nothing = options.loss, LossOptions(Distillation.none)
    whole = options.sandwich.strategy is Strategy.standard and not apart
    if not whole or loss.distillation is Distillation.none or loss.names_a_directory:
        return options
    usual = LossOptions(chunk_elements=loss.chunk_elements)
    given = [f.name for f in fields(loss) if getattr(loss, f.name) != getattr(usual, f.name)]
    if given:
        value = getattr(loss, given[0])
        raise ConfigError(
            f"loss.{given[0]}={getattr(value, 'value', value)} has no effect with "
            "--sandwich.strategy standard, which trains the whole model: it has no teacher in "
            "itself; give loss.teacher the directory of another checkpoint, or set "
            "loss.distillation none to learn from the labels alone"
        )
    return replace(options, loss=replace(nothing, chunk_elements=loss.chunk_elements))


def check_members(checkpoint: Checkpoint, sampler: SamplerOptions) -> None:
    """Refuse the front of another checkpoint as the members that are trained.

    Raises:
        ConfigError: naming the file.
    """
    if sampler.file is None:
        return
    if is_front(read_yaml(sampler.file, label=f"sampler.file={sampler.file}")):
        open_front(checkpoint, sampler.file, option="--sampler.file")


def space_to_train(
    checkpoint: Checkpoint, source: str | None, num_params: str | None = None
) -> SearchSpace:
    """The search space of a name or file, in a range; see `selection.default_space`."""
    space = space_for(checkpoint, default_space(checkpoint, source))
    return limited(space, parameter_counter(checkpoint.config), num_params)


def batch_networks(
    sandwich: SandwichOptions, full: SubNetwork, space: SearchSpace
) -> dict[SubNetwork, float]:
    """How often networks of which size are in a step; sampled ones are of about middle size."""
    if sandwich.strategy is Strategy.standard:
        return {full: 1.0}
    shares = dict.fromkeys((full, space.largest, space.smallest), 0.0)
    sampled: float = sandwich.num_random
    if sandwich.strategy is Strategy.sandwich:
        shares[full] += sandwich.full_share
        least = sandwich.smallest_share if sandwich.train_smallest else 0.0
        shares[space.smallest] += least
        sampled += 1 - sandwich.full_share + sandwich.train_smallest - least
    else:
        linear = sandwich.strategy is Strategy.random_linear
        sampled = 0.5 if linear else 1.0
        shares[full] += 1 - sampled
    for end in (space.largest, space.smallest):
        shares[end] += sampled / 2
    return shares


def train_together(task: Task, space: SearchSpace, chosen: Mapping[str, SubNetwork]) -> None:
    """Train the super-network, or the sub-networks `chosen` with the weights that they share."""
    options = task.options
    if chosen:
        options = replace(options, sandwich=replace(options.sandwich, train_smallest=False))
    strategy = options.sandwich.strategy
    trained = train(
        options,
        task.checkpoint,
        lambda supernet, trainer: choose_networks(
            options.sampler,
            space,
            supernet,
            strategy=strategy,
            num_validated=options.validation.num_networks,
            chosen=chosen,
            samples=task.samples,
            seed=options.seed,
            device=trainer.strategy.root_device,
        ),
        samples=task.samples,
        valid=task.valid,
        out_dir=None if task.is_dry else task.out_dir,
        resume=task.resume,
        prepare=task.prepare,
    )
    if is_first_process():
        print_grid(trained.networks.grid)
    if task.is_dry:
        return
    kind = SamplerKind.fixed if chosen else options.sampler.kind
    loss = options.loss
    summary: dict[str, Any] = {
        "strategy": strategy.value,
        "teacher": None if loss.distillation is Distillation.none else loss.teacher,
        "distillation": loss.distillation.value,
        "hidden": loss.hidden.value,
        "sampler": kind.value,
        "steps": trained.module.global_step,
        "head_untied": task.untied,
    }
    if options.lora is not None:
        summary["lora"] = adapters.summary(
            options.lora, task.checkpoint, keep_zeros=options.keep_zeros
        )
    ranks = options.lora.choices if options.lora else ()
    by_rank = adapters.losses_by_rank(trained, ranks, task.valid)
    shared = None if strategy is Strategy.standard else space
    write_outputs(
        task.out_dir,
        trained,
        space=shared,
        training=summary,
        by_rank=by_rank,
        describe=task.describe,
    )
    if not trained.trainer.is_global_zero:
        return
    write_slices(task.out_dir, chosen, describe=task.describe)
    report(trained)
    print_ranks(by_rank)
    print_next(task.out_dir, strategy, chosen)
