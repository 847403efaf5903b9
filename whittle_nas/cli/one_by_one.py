"""Networks with weights of their own, trained one after the other by `nas finetune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

from whittle_nas.cli.common import seed_everything
from whittle_nas.cli.training import WEIGHTS, Task
from whittle_nas.cli.training_report import (
    Row,
    print_losses,
    print_next,
    warn_of_rise,
)
from whittle_nas.errors import ConfigError
from whittle_nas.space import SubNetwork
from whittle_nas.train.choices import Strategy
from whittle_nas.train.run import TrainingOptions
from whittle_nas.train.sampling import mean_loss
from whittle_nas.train.specialise import (
    Slice,
    smallest_around,
    specialise,
    whole_teacher,
)
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.supernet import SuperNetwork


class Networks(Protocol):
    """Which networks are trained one after the other.

    Attributes:
        files: that are made beside their directories.
    """

    files: ClassVar[tuple[str, ...]]

    @property
    def names(self) -> Sequence[str]:
        """The largest first."""
        ...

    def find(self, name: str, done: Sequence[Slice], /) -> SubNetwork | None:
        """One of them, when those before it are trained; None if there is none of its own."""
        ...

    def note(self, name: str, sub: SubNetwork) -> None:
        """Called when its training is about to start, or found to have ended."""
        ...


@dataclass(frozen=True)
class Chosen:
    """Networks that are known before."""

    files: ClassVar[tuple[str, ...]] = ()

    subs: Mapping[str, SubNetwork]
    config: Any

    @property
    def names(self) -> Sequence[str]:
        """The largest first."""
        count = parameter_counter(self.config)
        return sorted(self.subs, key=lambda name: -count(self.subs[name]))

    def find(self, name: str, _done: Sequence[Slice], /) -> SubNetwork:
        """By its name."""
        return self.subs[name]

    def note(self, name: str, sub: SubNetwork) -> None:
        """They stand in a file already."""


def train_one_by_one(task: Task, networks: Networks) -> None:
    """Train sub-networks one after the other, the largest first."""
    if task.options.trainer.is_sharded:
        raise ConfigError(
            "trainer.strategy=fsdp trains a whole checkpoint: to train a sub-network alone, export "
            "it and train the export with --sandwich.strategy standard"
        )
    teacher = whole_teacher(task.options, task.checkpoint)
    begin = partial(task.prepare, networks.names, networks.files)
    rows: list[Row] = []
    done: list[Slice] = []
    trained: list[str] = []
    for number, name in enumerate(networks.names):
        target = task.out_dir / name
        finished = task.resume and (target / WEIGHTS).is_file()
        sub = networks.find(name, done)
        if sub is None:
            continue
        trained.append(name)
        larger = smallest_around(sub, done) if task.cascade else None
        start = task.start_of(sub, larger, repair_it=task.repair and not finished)
        if finished:
            print(f"{name} is trained already: {target}")
            networks.note(name, sub)
        else:
            # Other text than that from which the larger one has learnt.
            seed = task.options.seed + (number if larger else 0)
            options = replace(task.options, seed=seed)
            note = partial(networks.note, name, sub)
            rows += _train_one(task, target, start, options, teacher, (begin, note))
            begin = _nothing
        if not task.is_dry:
            done.append(start.trained(target))
    if not rows:
        return
    if teacher is not None:
        loss = mean_loss(teacher, teacher.full, task.valid)
        rows.append(("teacher", num_params(teacher.config), loss, loss))
    print_losses(rows)
    print_next(task.out_dir, Strategy.standard, trained)


def _nothing() -> None:
    pass


def _train_one(
    task: Task,
    target: Path,
    start: Slice,
    options: TrainingOptions,
    teacher: SuperNetwork | None,
    begin: Sequence[Callable[[], object]],
) -> list[Row]:
    """Train one sub-network; a row of losses in the process that prints.

    `begin` is called when everything was found valid, and the training is about to start.
    """
    seed_everything(options.seed)  # so that no adapters depend on those before them
    trained = specialise(
        options,
        start,
        samples=task.samples,
        valid=task.valid,
        teacher=teacher,
        out_dir=None if task.is_dry else target,
        resume=task.resume,
        prepare=lambda: [step() for step in begin],
        describe=task.describe,
    )
    trained.trainer.strategy.barrier()  # the others read what the first process has written
    if task.is_dry or not trained.trainer.is_global_zero:
        return []
    history = trained.history
    before, after = history[min(history)]["full"], history[max(history)]["full"]
    warn_of_rise(target.name, before, after)
    return [(target.name, num_params(start.config), before, after)]
