"""A search with every option resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from whittle_nas.candidates.library import Library
from whittle_nas.errors import ConfigError
from whittle_nas.metrics.latency_correction import Accuracy
from whittle_nas.metrics.latency_parts import Load
from whittle_nas.reading import read_yaml
from whittle_nas.search.costs import Costs
from whittle_nas.search.halving import FIRST
from whittle_nas.search.objectives import MEASURED, QUALITY, REPAIR, task_of
from whittle_nas.search.options import (
    CostOptions,
    HalvingOptions,
    Method,
    ProgramOptions,
    RecoveryOptions,
    TaskOptions,
)
from whittle_nas.space.front import Constraint, parse_constraints
from whittle_nas.space.samplers import Grid
from whittle_nas.space.searchspace import SearchSpace
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.checkpoint import Checkpoint
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.identity import fingerprint, tokens_id
from whittle_nas.weights.placement import spelled

GRID = "grid.yaml"
TABLE = "latency_table.json"


def check_placed(
    placed_on: Sequence[torch.device], wanted: Sequence[str], recovery: RecoveryOptions
) -> None:
    """Refuse what a search can't do with a model on several devices.

    Args:
        placed_on: devices of the model.
        wanted: metrics that objectives, constraints and budgets name.
        recovery: whether the best are trained.

    Raises:
        ConfigError: naming the option.
    """
    if len(placed_on) == 1:
        return
    several = f"--device {spelled(placed_on)}"
    if timed := [name for name in wanted if name in MEASURED]:
        raise ConfigError(
            f"{several}: {timed[0]} comes from times of blocks on one device; name one, or "
            "search for flops or num_params"
        )
    if recovery.budget is not None:
        raise ConfigError(f"{several}: --recovery.budget trains on one device; name one")


@dataclass(frozen=True)
class Request:
    """What is searched, and how.

    Attributes:
        checkpoint: the super-network.
        out_dir: existing directory for the files.
        space: the sub-networks.
        objectives: names, all minimised.
        constraints: limits on objectives and costs.
        tokens: (N, T + 1) validation text in blocks; N = 0 if no metric needs text.
        method: who proposes.
        num_trials: evaluations.
        seed: of every random choice.
        search_blocks: blocks of a trial; the front is evaluated on all.
        batch_size: blocks per forward pass; None: chosen for the device.
        start_from_grid: propose the grid of the super-network's training first.
        costs: the load that costs are for.
        time_front: time the front whole also where no metric is a time.
        halving: whether bad trials are stopped early.
        tasks: how lm-eval tasks are asked.
        recovery: whether the best are trained and ranked again.
        library: candidates that every trial is made of; None: plain slices.
        programs: how `--method ilp` chooses among them.
        start: sub-networks to try first, those in the space.
        text: where the validation text comes from, see `data.load_blocks`.
        training: (N, T + 1) training text for the recovery.
        calibration: (N, T + 1) text on which every trial is repaired; None: none is.
        placed_on: devices that the model lies on, see `weights.placement`.
        dtype: number format of the weights; None: as stored.
        workers: processes that evaluate; 1: this one.
        cluster: address of a Ray cluster; None: this machine.
    """

    checkpoint: Checkpoint
    out_dir: Path
    space: SearchSpace
    objectives: tuple[str, ...]
    constraints: tuple[Constraint, ...]
    tokens: torch.Tensor
    method: Method
    num_trials: int
    seed: int
    search_blocks: int = 32
    batch_size: int | None = None
    start_from_grid: bool = True
    costs: CostOptions = field(default_factory=CostOptions)
    time_front: bool = True
    halving: HalvingOptions = field(default_factory=HalvingOptions)
    tasks: TaskOptions = field(default_factory=TaskOptions)
    recovery: RecoveryOptions = field(default_factory=RecoveryOptions)
    library: Library | None = None
    programs: ProgramOptions = field(default_factory=ProgramOptions)
    start: tuple[SubNetwork, ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)
    training: torch.Tensor | None = None
    calibration: torch.Tensor | None = None
    placed_on: tuple[torch.device, ...] = (torch.device("cpu"),)
    dtype: torch.dtype | None = None
    workers: int = 1
    cluster: str | None = None

    def __post_init__(self) -> None:
        """As `check_placed`."""
        check_placed(self.placed_on, self.wanted, self.recovery)

    @property
    def device(self) -> torch.device:
        """Where token ids go in and logits come out."""
        return self.placed_on[0]

    def resolved(self, costs: Costs | None = None) -> Request:
        """The same search, with shares of the whole model in its limits as numbers.

        A second time, they are numbers by what is known of times then. The recovery's budget stays
        as it is, and is checked.

        Args:
            costs: of networks; None: new ones.

        Raises:
            ConfigError: for a share of a quality, which is known too late.
        """
        limits = list(map(_as_asked, self.constraints))
        budgets = parse_constraints(self.recovery.budget, option="--recovery.budget")
        if not any(limit.of_whole for limit in (*limits, *budgets)):
            return self
        costs = costs or self.make_costs()
        self.recovery_in_numbers(costs)
        return replace(self, constraints=self._in_numbers(limits, costs, "--constraints"))

    def recovery_in_numbers(self, costs: Costs) -> RecoveryOptions:
        """How the best are trained, with shares of the whole model in the budget as numbers.

        Args:
            costs: of networks.

        Raises:
            ConfigError: as `resolved`.
        """
        option = "--recovery.budget"
        limits = parse_constraints(self.recovery.budget, option=option)
        if not any(limit.of_whole for limit in limits):
            return self.recovery
        numbers = self._in_numbers(limits, costs, option)
        return replace(self.recovery, budget=", ".join(limit.in_numbers for limit in numbers))

    def _in_numbers(
        self, limits: Sequence[Constraint], costs: Costs, option: str
    ) -> tuple[Constraint, ...]:
        full = SubNetwork.from_config(self.checkpoint.config)
        named = [limit.metric for limit in limits if limit.of_whole]
        whole = {name: costs.value(full, name) for name in named if name in costs.names}
        return tuple(limit.resolved(whole, option) for limit in limits)

    @cached_property
    def wanted(self) -> tuple[str, ...]:
        """Metrics that objectives and constraints name."""
        limits = [*self.constraints, *(c for _, asked in self.programs.limits() for c in asked)]
        return tuple(dict.fromkeys([*self.objectives, *(c.metric for c in limits)]))

    @cached_property
    def quality_metrics(self) -> tuple[str, ...]:
        """Quality metrics of a trial; loss and perplexity come together."""
        text = QUALITY if needs_text(self.wanted) else ()
        first = (FIRST,) if text and self.halving.first_blocks else ()
        repair = (REPAIR,) if self.calibration is not None else ()
        return (*text, *first, *repair, *(name for name in self.wanted if task_of(name)))

    @cached_property
    def load(self) -> Load:
        """What costs are for."""
        tokens = self.costs.check(self.checkpoint.config.block_size)
        dtype = self.dtype or self.checkpoint.state_dict()["lm_head.weight"].dtype
        return Load(self.costs.batch, tokens, self.device, dtype)

    @property
    def table(self) -> Path:
        """The file of the latency table."""
        return self.costs.latency_table or self.out_dir / TABLE

    def make_costs(self) -> Costs:
        """Costs of every sub-network."""
        measured = [name for name in self.wanted if name in MEASURED]
        config, info = self.checkpoint.config, self.checkpoint.info
        timed = self.time_front and len(self.placed_on) == 1
        return Costs(config, info, self.load, measured=measured, table=self.table, time_front=timed)

    def first(self) -> list[SubNetwork]:
        """What is tried first: the ends of the space, fewer layers, and the grid that was trained.

        Fewer layers alone lose much at once and recover fast: a random member that happens to be
        whole in all other dimensions is rare, so without these the front would never offer any.

        Raises:
            ConfigError: if `grid.yaml` is malformed.
        """
        path = self.checkpoint.path / GRID
        first = [sub for sub in self.start if self.space.contains(sub)]
        first += [self.space.largest, self.space.smallest, *self._shallow()]
        if self.start_from_grid and path.is_file():
            first += [sub for sub in _read_grid(path, self.checkpoint) if self.space.contains(sub)]
        return first

    def _shallow(self) -> list[SubNetwork]:
        """Networks that only lack layers: four, evenly over their number."""
        largest, order = self.space.largest, self.checkpoint.info.layer_order
        kept = [layer for layer in order if largest.blocks[layer] is not None]
        members = []
        for count in range(len(kept) - 1, 0, -1):
            blocks = tuple(
                block if at in kept[:count] else None for at, block in enumerate(largest.blocks)
            )
            sub = SubNetwork(largest.n_embd, blocks)
            members += [sub] if self.space.contains(sub) else []
        most = min(len(members), 4)
        return [members[at * len(members) // most] for at in range(most)]

    def how_measured(self, num_trials: int, accuracies: Mapping[str, Accuracy]) -> dict[str, Any]:
        """What `front.json` says about its numbers.

        Args:
            num_trials: evaluations.
            accuracies: of the latency table, by metric.
        """
        how: dict[str, Any] = {
            "method": self.method.value,
            "seed": self.seed,
            "num_trials": num_trials,
            "constraints": list(map(str, self.constraints)),
            "device": spelled(self.placed_on),
            "dtype": str(self.load.dtype).removeprefix("torch."),
            "costs": {"batch": self.load.batch, "tokens": self.load.tokens},
        }
        if set(QUALITY) & set(self.quality_metrics):
            blocks, length = self.tokens.shape
            how["text"] = {
                **{key: self.text[key] for key in ("sources", "splits") if key in self.text},
                "block_bos": self.text.get("block_bos", False),
                "blocks": blocks,
                "block_size": length - 1,
                "blocks_in_search": min(blocks, self.search_blocks),
            }
        if self.library is not None:
            how["candidates"] = str(self.library.path)
        if self.calibration is not None:
            blocks, length = self.calibration.shape
            how["repair"] = {"blocks": blocks, "block_size": length - 1}
        for name, accuracy in accuracies.items():
            how[f"{name} of the latency table"] = asdict(accuracy)
        return how

    def settings(self, ahead: int) -> dict[str, Any]:
        """What a resumed search must have in common with the interrupted one."""
        measured = [name for name in self.wanted if name in MEASURED]
        costs = asdict(replace(self.costs, latency_table=None, calibrate=0))
        return {
            "checkpoint": fingerprint(self.checkpoint.path),
            "search_space": self.space.to_dict(),
            "objectives": list(self.objectives),
            "constraints": list(map(str, self.constraints)),
            "data": tokens_id(self.tokens),
            "search_blocks": self.search_blocks,
            "halving": asdict(self.halving),
            "tasks": {k: v and str(v) for k, v in asdict(self.tasks).items()},
            "method": self.method.value,
            "seed": self.seed,
            "start_from_grid": self.start_from_grid,
            "costs": costs | ({"device": self.device.type} if measured else {}),
            "dtype": str(self.dtype),
            "repair": None if self.calibration is None else tokens_id(self.calibration),
            "candidates": self.library and self.library.identity(),
            "start": [sub.to_dict() for sub in self.start],
            "programs": self.programs.to_dict() if self.method is Method.ilp else None,
            "ahead": ahead,
        }


def _as_asked(limit: Constraint) -> Constraint:
    """A limit as it was given: a share of the whole model is one again."""
    return parse_constraints(limit.text)[0] if limit.text else limit


def needs_text(metrics: tuple[str, ...]) -> bool:
    """Whether validation text is needed for some metrics."""
    return bool(set(metrics) & set(QUALITY))


def _read_grid(path: Path, checkpoint: Checkpoint) -> tuple[SubNetwork, ...]:
    spec, cost = read_yaml(path), parameter_counter(checkpoint.config)
    order = checkpoint.info.layer_order
    return Grid.from_dict(spec, cost=cost, layer_order=order, source=str(path)).subs
