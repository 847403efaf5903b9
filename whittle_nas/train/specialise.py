"""One sub-network trained alone: from its slice, taught by the whole model.

It needs no super-network training. `nas finetune --subnetworks` writes what comes out, and the
search ranks its candidates by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.space.subnetwork import COARSE, SPARSE, SubNetwork
from whittle_nas.train.batches import Sample
from whittle_nas.train.options import IN_PLACE, Distillation
from whittle_nas.train.output import completing, write_losses
from whittle_nas.train.prepare import TrainedTensors
from whittle_nas.train.run import Networks, Trained, TrainingOptions, train
from whittle_nas.train.teacher import Teacher, frozen, open_teacher
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from whittle_nas.weights.files import atomic_directory
from whittle_nas.weights.patch import Patch, patched
from whittle_nas.weights.slicing import check_forms, plan_slices, slice_state_dict
from whittle_nas.weights.supernet import SuperNetwork

_REPAIR_BLOCKS = 64  # of the training text, on which repair is fitted


@dataclass(frozen=True)
class Slice(Checkpoint):
    """A sub-network of a checkpoint as a checkpoint in memory.

    Attributes:
        sub: the sub-network, of the super-network.
        tensors: its weights, views of the super-network's file where they can be.
    """

    sub: SubNetwork = field(kw_only=True)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the super-network, that its blocks came from."""
        return self.sub.layers

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights."""
        return dict(self.tensors)

    def trained(self, checkpoint_dir: Path) -> Slice:
        """The same with the weights that a training has written.

        Raises:
            ConfigError: if the directory holds another network.
        """
        found = open_checkpoint(checkpoint_dir, per_layer=True)
        if SubNetwork.from_config(found.config) != SubNetwork.from_config(self.config):
            raise ConfigError(
                f"{checkpoint_dir} holds another network than {self.sub}; give a new --out_dir"
            )
        return replace(self, path=checkpoint_dir, config=found.config, tensors=found.state_dict())


def check_trainable(forms: Iterable[str], option: str) -> None:
    """Refuse parts of few bits: a training takes weights off their grid.

    Args:
        forms: of the parts of some networks.
        option: what names the networks.

    Raises:
        ConfigError: naming the form.
    """
    if coarse := sorted({*forms} & {*COARSE}):
        raise ConfigError(
            f"{option} has {' and '.join(coarse)} parts, whose weights leave their grid when they "
            "are trained: choose without them (2:4 parts keep their zeros), and give what is "
            "trained fewer bits by nas prune --method gptq"
        )


def slice_of(checkpoint: Checkpoint, sub: SubNetwork, patch: Patch | None = None) -> Slice:
    """A sub-network's weights as they stand in the super-network.

    Args:
        checkpoint: the super-network.
        sub: the sub-network.
        patch: what is special to it.

    Raises:
        ConfigError: if the sizes do not fit, or linear maps are not in the patch.
    """
    info, patch = checkpoint.info, patch or Patch()
    plan = plan_slices(sub, checkpoint.config, head_channels=info.head_channels, norms=info.norms)
    check_forms(plan, patch.names())
    found = Slice(
        path=checkpoint.path,
        config=plan.own_config,
        info=plan.info_of(info),
        sub=sub,
        tensors=slice_state_dict(plan, checkpoint.state_dict()),
    )
    return repaired(found, patch)


def smallest_around(sub: SubNetwork, trained: Sequence[Slice]) -> Slice | None:
    """The smallest of some trained networks that a sub-network is a part of, None without one.

    Of equal ones it is the last.

    Networks whose blocks differ are left out: nothing is cut from a checkpoint of theirs.
    """
    whole = [one for one in trained if one.sub.sizes() is not None]
    around = [one for one in whole if sub.within(one.sub) is not None]
    return min(reversed(around), key=lambda one: num_params(one.config), default=None)


def part_of(larger: Slice, sub: SubNetwork) -> Slice:
    """A sub-network's weights as a larger network's training has left them.

    Raises:
        ConfigError: if it is no part of the larger one.
    """
    inside = sub.within(larger.sub)
    if inside is None:
        raise ConfigError(f"{sub} is no part of {larger.sub}")
    return replace(slice_of(larger, inside), sub=sub)


def repaired(start: Slice, patch: Patch) -> Slice:
    """A slice with what repair has changed."""
    return replace(start, tensors=dict(patched(start.tensors, patch)))


def text_of(samples: Sequence[Sample]) -> torch.Tensor:
    """The first blocks of the training text, on which a repair is fitted, (N, T + 1).

    Raises:
        ConfigError: if the samples are no blocks of one length.
    """
    chosen = samples[:_REPAIR_BLOCKS]
    rows = [torch.cat([s.input_ids, s.labels[-1:]]) for s in chosen if s.segments is None]
    if (
        len(rows) < len(chosen)
        or len({len(row) for row in rows}) > 1
        or torch.stack(rows).min() < 0
    ):
        raise ConfigError(
            "--repair true fits text in blocks and the training data are instructions: export the "
            "networks with `nas export --repair true --data.files <text>`, and train those"
        )
    return torch.stack(rows)


def whole_teacher(options: TrainingOptions, checkpoint: Checkpoint) -> SuperNetwork | None:
    """The frozen model that teaches every network of a call; None where the labels alone do.

    Raises:
        ConfigError: if nobody can teach as the options say.
    """
    loss = options.loss
    if loss.distillation is Distillation.none:
        return None
    if loss.teacher == IN_PLACE:
        raise ConfigError(
            "loss.teacher=in_place: a network that is trained alone has no full network beside it; "
            "use original or the directory of a checkpoint"
        )
    chosen = open_teacher(loss, checkpoint)
    return frozen(chosen, like=checkpoint.config, precision=options.trainer.precision)


def specialise(
    options: TrainingOptions,
    start: Slice,
    *,
    samples: Sequence[Sample],
    valid: Sequence[Sample],
    teacher: SuperNetwork | None,
    out_dir: Path | None = None,
    resume: bool = False,
    prepare: Callable[[], object] = lambda: None,
    on_step: Callable[[], object] = lambda: None,
    describe: Callable[[Path], object] = lambda _: None,
) -> Trained:
    """Train one sub-network with weights of its own; zeros of 2:4 parts stay.

    Args:
        options: how; which networks a step runs does not matter here.
        start: its weights; `slice_of`, repaired or not.
        samples: training samples.
        valid: validation samples.
        teacher: from `whole_teacher`.
        out_dir: gets an ordinary checkpoint, losses and logs; None keeps it in memory.
        resume: go on from the newest checkpoint in `out_dir`.
        prepare: called when everything was found valid, before anything is written.
        on_step: called after every optimiser step.
        describe: adds to the checkpoint's folder before it becomes `out_dir`.

    Raises:
        ConfigError: for everything that can be wrong; `Diverged` if the loss is not finite.
    """
    options = options.alone()
    if SPARSE in start.sub.forms:
        options = replace(options, keep_zeros=True)

    def begin() -> None:
        prepare()
        if out_dir is not None:
            out_dir.mkdir(parents=True, exist_ok=True)

    lesson = None if teacher is None else Teacher(teacher, start.layers)
    trained = train(
        options,
        start,
        lambda supernet, _: Networks.only(supernet.full),
        samples=samples,
        valid=valid,
        out_dir=out_dir,
        teacher=lesson,
        resume=resume,
        prepare=begin,
        on_step=on_step,
    )
    if out_dir is not None and trained.trainer.is_global_zero:
        networks = trained.networks.validated
        write_losses(out_dir, start.config, history=trained.history, networks=networks)
        with completing(out_dir) as folder:
            tensors = TrainedTensors(trained.supernet, start.state_dict())
            write_checkpoint(folder, tensors, config=start.config, source=start.path)
            describe(folder)
    return trained


def write_slices(
    checkpoint_dir: Path,
    subs: Mapping[str, SubNetwork],
    *,
    describe: Callable[[Path], object] = lambda _: None,
) -> None:
    """Write sub-networks of a super-network as ordinary checkpoints, in directories inside of it.

    Args:
        checkpoint_dir: the super-network.
        subs: the sub-networks by the names of their directories.
        describe: adds to the folder of each.
    """
    whole = open_checkpoint(checkpoint_dir)
    for name, sub in subs.items():
        part = slice_of(whole, sub)
        with atomic_directory(checkpoint_dir / name, overwrite=True) as folder:
            write_checkpoint(folder, part.tensors, config=part.config, source=whole.path)
            describe(folder)
