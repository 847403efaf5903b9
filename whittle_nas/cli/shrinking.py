"""`nas finetune --budgets`: networks that are searched for while they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from whittle_nas.cli.candidates import choose_candidates
from whittle_nas.cli.common import is_first_process, progress_bar
from whittle_nas.cli.training import PICKS, Task, check_apart
from whittle_nas.errors import ConfigError
from whittle_nas.metrics.latency_parts import Load
from whittle_nas.search.budgets import parse_budgets
from whittle_nas.search.costs import Costs
from whittle_nas.search.objectives import MEASURED
from whittle_nas.search.options import CostOptions, ShrinkOptions
from whittle_nas.search.shrinking import Shrinking
from whittle_nas.space import SearchSpace, SubNetwork
from whittle_nas.train.fit import fitting_device
from whittle_nas.train.memory import stored_format
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
    costs: CostOptions,
    *,
    options: TrainingOptions,
    subnetworks: Path | None,
) -> Shrinking | None:
    """What `--budgets` asks for, None without it.

    Raises:
        ConfigError: for budgets that can't be kept, and options that do not go with them.
    """
    if not budgets:
        return None
    if subnetworks is not None:
        raise ConfigError(
            f"--budgets searches for the networks and --subnetworks {subnetworks} names them: "
            "leave one of the two out"
        )
    check_apart(options, "--budgets")
    wanted = parse_budgets(budgets)
    timed = [name for name in MEASURED if any(name in limit for limit in wanted.values())]
    table = costs.latency_table
    if timed and (table is None or not table.is_file()):
        raise ConfigError(
            f"--budgets: a training measures no {timed[0]}; give --costs.latency_table the file "
            "that nas profile --table, or a search over it, has written on this device"
        )
    tokens = costs.check(checkpoint.config.block_size)
    device = fitting_device(options.trainer)
    load = Load(costs.batch, tokens, device, stored_format(checkpoint.path))
    found = Costs(
        checkpoint.config, checkpoint.info, load, measured=timed, table=table or Path(PICKS)
    )
    return Shrinking.of(
        space, wanted, found.estimate, candidates=shrink.candidates, seed=options.seed
    )


@dataclass(frozen=True)
class Inside:
    """Networks that are searched for inside the trained ones before them.

    Attributes:
        task: the training.
        shrinking: what is tried.
        samples: training samples on which each is repaired, if it is, and scored.
    """

    task: Task
    shrinking: Shrinking
    samples: int

    @property
    def names(self) -> Sequence[str]:
        """The largest budget first."""
        return self.shrinking.names

    def find(self, name: str, done: Sequence[Slice], /) -> SubNetwork:
        """The best of what is tried for a budget; after an interruption, what was found before.

        Raises:
            ConfigError: if nothing is under the budget, or what was found before is not.
        """
        if self.task.resume and (sub := self._found_before(name)) is not None:
            return sub
        larger = done[-1] if done else None
        around = larger.sub if larger else self.shrinking.space.full
        members = self.shrinking.members(name, around)
        losses = [
            self._loss(sub, larger)
            for sub in progress_bar(members, f"trying networks for {name}", len(members))
        ]
        losses = _of_first_process(losses)
        best = min(range(len(members)), key=lambda at: (losses[at] != losses[at], losses[at]))
        if is_first_process():
            self._report(name, members, losses, best)
        return members[best]

    def note(self, name: str, sub: SubNetwork) -> None:
        """Write what was found: for the other commands, and for `--resume`."""
        if self.task.is_dry or not is_first_process():
            return
        path = self.task.out_dir / PICKS
        others = [row for row in _rows(path) if row["name"] != name]
        rows = [*others, {"name": name, **sub.to_dict()}]
        atomic_write_text(path, yaml.safe_dump(rows, sort_keys=False))

    def _loss(self, sub: SubNetwork, larger: Slice | None) -> float:
        task = self.task
        start = task.start_of(sub, larger, repair_it=task.repair, samples=self.samples)
        net = supernet_of(start, device=fitting_device(task.options.trainer))
        # The last samples: repair is fitted on the first ones.
        return mean_loss(net, net.full, task.samples[-self.samples :])

    def _found_before(self, name: str) -> SubNetwork | None:
        path = self.task.out_dir / PICKS
        if not any(row.get("name") == name for row in _rows(path)):
            return None
        known = choose_candidates(self.task.checkpoint, subnetworks=path)
        sub = next(one.subnetwork for one in known if one.label == name)
        if not self.shrinking.keeps(name, sub):
            raise ConfigError(
                f"--resume: {name} of {path} is not under --budgets as they are now: give those of "
                "the interrupted training, or another --out_dir"
            )
        return sub

    def _report(
        self, name: str, members: Sequence[SubNetwork], losses: Sequence[float], best: int
    ) -> None:
        sub, count = members[best], parameter_counter(self.task.checkpoint.config)
        print(
            f"{name}: {sub}, {count(sub):,} parameters, {losses[best]:.3f} nats before training, "
            f"the best of {len(members)}"
        )


def _rows(path: Path) -> list[dict[str, Any]]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []


def _of_first_process(losses: list[float]) -> list[float]:
    """The same in all processes, which must train the same network."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(losses, src=0)
    return losses
