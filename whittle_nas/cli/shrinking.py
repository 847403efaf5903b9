"""`nas finetune --budgets`: networks that are searched for while they are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import yaml

from whittle_nas.cli.candidates import choose_candidates
from whittle_nas.cli.common import is_first_process, progress_bar
from whittle_nas.cli.training import Task, check_apart
from whittle_nas.errors import ConfigError
from whittle_nas.metrics.latency_parts import Load
from whittle_nas.search.budgets import FILE_NAME, parse_budgets
from whittle_nas.search.constraints import Cost
from whittle_nas.search.costs import Costs
from whittle_nas.search.objectives import MEASURED
from whittle_nas.search.options import CostOptions, ShrinkOptions
from whittle_nas.search.shrinking import Shrinking
from whittle_nas.space import SearchSpace, SubNetwork
from whittle_nas.train.choices import Share
from whittle_nas.train.fit import fitting_device
from whittle_nas.train.run import TrainingOptions
from whittle_nas.train.sampling import mean_loss
from whittle_nas.train.specialise import Slice
from whittle_nas.weights.checkpoint import Checkpoint, supernet_of
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.files import atomic_write_text


def shrinking_of(
    budgets: Mapping[str, str] | Sequence[str] | str | None,
    checkpoint: Checkpoint,
    space: SearchSpace,
    shrink: ShrinkOptions,
    options: TrainingOptions,
    *,
    subnetworks: Path | None,
    share: Share,
) -> Shrinking | None:
    """What `--budgets` asks for, None without it.

    Raises:
        ConfigError: for budgets that can't be kept, and options that do not go with them.
    """
    if budgets is None:
        return None
    if subnetworks is not None:
        raise ConfigError(
            f"--budgets searches for the networks and --subnetworks {subnetworks} names them: "
            "leave one of the two out"
        )
    if share is not Share.cascade:
        raise ConfigError(
            f"--share {share.value} and --budgets: each network is searched for inside the trained "
            "one before it, which is --share cascade; leave one of the two out"
        )
    check_apart(options, "--budgets")
    wanted = parse_budgets(budgets)
    if not wanted:
        raise ConfigError(f'--budgets {budgets!r} names none; give some, such as "80%, 60%"')
    cost = _cost(checkpoint, wanted, shrink, options)
    return Shrinking.of(space, wanted, cost, candidates=shrink.candidates, seed=options.seed)


def _cost(
    checkpoint: Checkpoint,
    budgets: Mapping[str, str],
    shrink: ShrinkOptions,
    options: TrainingOptions,
) -> Cost:
    """Costs of networks; a training measures no times."""
    timed = [name for name in MEASURED if any(name in limit for limit in budgets.values())]
    table = shrink.latency_table
    config, info = checkpoint.config, checkpoint.info
    load = Load(
        shrink.batch,
        CostOptions(tokens=shrink.tokens).check(config.block_size, "--shrink"),
        fitting_device(options.trainer) if timed else torch.device("cpu"),
        checkpoint.state_dict()["lm_head.weight"].dtype if timed else torch.bfloat16,
    )
    if not timed:
        return Costs(config, info, load).value
    if table is not None and table.is_file():
        costs = Costs(config, info, load, measured=timed, table=table)
        if all(map(costs.is_known, timed)):
            return costs.estimate
    raise ConfigError(
        f"--budgets: a training measures no {timed[0]}; give --shrink.latency_table a file that "
        "has it for this device, as nas profile --table or a search over it writes"
    )


@dataclass(frozen=True)
class Inside:
    """Networks that are searched for inside the trained ones before them.

    Attributes:
        task: the training.
        shrinking: what is tried.
        shrink: how.
    """

    files: ClassVar[tuple[str, ...]] = (FILE_NAME,)

    task: Task
    shrinking: Shrinking
    shrink: ShrinkOptions

    @property
    def names(self) -> Sequence[str]:
        """The largest budget first."""
        return self.shrinking.names

    def find(self, name: str, done: Sequence[Slice], /) -> SubNetwork | None:
        """The best of what is tried for a budget; after an interruption, what was found before.

        None if the network before it is under this budget as well.

        Raises:
            ConfigError: if nothing is under the budget, or what was found before does not fit.
        """
        larger = done[-1] if done else None
        around = larger.sub if larger else self.shrinking.space.full
        if self.task.resume and (sub := self._known.get(name)) is not None:
            if sub.within(around) is None or not self.shrinking.is_member(name, sub):
                raise ConfigError(
                    f"--resume: {name} of {self._picks} does not fit --budgets and --search_space: "
                    "give those of the interrupted training, or another --out_dir"
                )
            return sub
        members = self.shrinking.members(name, around)
        if larger is not None and members == [around]:
            if is_first_process():
                print(f"{name}: the network before it is under this budget as well")
            return None
        losses = self._losses(name, members, larger, repair_them=False)
        if self.task.repair:
            members = [sub for _, sub in sorted(zip(losses, members, strict=True))]
            members = members[: self.shrink.repaired]
            losses = self._losses(name, members, larger, repair_them=True)
        loss, sub = min(zip(losses, members, strict=True))
        if is_first_process():
            count = parameter_counter(self.task.checkpoint.config)
            print(f"{name}: {sub}, {count(sub):,} parameters, {loss:.3f} nats before training")
        return sub

    def note(self, name: str, sub: SubNetwork) -> None:
        """Write what was found: for the other commands, and for `--resume`."""
        if self.task.is_dry or not is_first_process():
            return
        found = {**self._known, name: sub}
        rows = [{"name": name, **found[name].to_dict()} for name in self.names if name in found]
        atomic_write_text(self._picks, yaml.safe_dump(rows, sort_keys=False))

    @property
    def _picks(self) -> Path:
        return self.task.out_dir / FILE_NAME

    @property
    def _known(self) -> dict[str, SubNetwork]:
        """What was found before, by name."""
        if not self._picks.is_file():
            return {}
        known = choose_candidates(self.task.checkpoint, subnetworks=self._picks)
        return {one.label: one.subnetwork for one in known}

    def _losses(
        self, name: str, members: Sequence[SubNetwork], larger: Slice | None, *, repair_them: bool
    ) -> list[float]:
        """Of networks as they start: the first process's, where there are several.

        Before the first training there is nothing yet that connects them: each finds its own
        network, from the same numbers, and a training refuses networks that differ.
        """
        task, samples, losses = self.task, self.shrink.samples, list[float]()
        device = fitting_device(task.options.trainer)
        whole = supernet_of(larger or task.checkpoint, device=device) if repair_them else None
        what = f"trying {'repaired ' if repair_them else ''}networks for {name}"
        for sub in progress_bar(members, what, len(members)):
            start = task.start_of(sub, larger, repair_it=repair_them, around=whole, samples=samples)
            net = supernet_of(start, device=device)
            # The last samples: repair is fitted on the first ones.
            loss = mean_loss(net, net.full, task.samples[-samples:])
            losses.append(loss if math.isfinite(loss) else math.inf)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(losses, src=0)
        return losses
