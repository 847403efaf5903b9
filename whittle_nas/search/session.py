"""One search from a checkpoint to its front: what `nas search` does between flags and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from whittle_nas.errors import ConfigError
from whittle_nas.search import settings
from whittle_nas.search.constraints import check_attainable, excess_function
from whittle_nas.search.costs import Costs
from whittle_nas.search.evaluation import EvaluationSpec, Evaluator
from whittle_nas.search.loop import Schedule, Search
from whittle_nas.search.objectives import QUALITY
from whittle_nas.search.options import CostOptions, Method
from whittle_nas.search.results import front_of
from whittle_nas.search.searchers import Problem, make_searcher
from whittle_nas.search.trials import FILE_NAME, Trial, TrialLog, read_trials
from whittle_nas.search.workers import InlinePool, Pool
from whittle_nas.space.front import Constraint, Front, FrontEntry
from whittle_nas.space.samplers import Grid
from whittle_nas.space.searchspace import SearchSpace
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.checkpoint import Checkpoint
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.files import atomic_write_text

GRID = "grid.yaml"


@dataclass(frozen=True)
class Request:
    """A search, with every option resolved.

    Attributes:
        checkpoint: the super-network.
        out_dir: existing directory for the files.
        space: the sub-networks.
        objectives: names, all minimised.
        constraints: limits on objectives and costs.
        tokens: (N, T + 1) validation text in blocks.
        method: who proposes.
        num_trials: evaluations.
        seed: of every random choice.
        search_blocks: blocks of a trial; the front is evaluated on all.
        batch_size: blocks per forward pass; None: chosen for the device.
        start_from_grid: propose the grid of the super-network's training first.
        costs: the load that costs are for.
        device: where the model runs.
        dtype: number format of the weights; None: as stored.
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
    search_blocks: int | None = None
    batch_size: int | None = None
    start_from_grid: bool = True
    costs: CostOptions = field(default_factory=CostOptions)
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype | None = None

    def settings(self) -> dict[str, Any]:
        """What a resumed search must have in common with the interrupted one."""
        return {
            "checkpoint": settings.checkpoint_id(self.checkpoint.path),
            "search_space": self.space.to_dict(),
            "objectives": list(self.objectives),
            "constraints": list(map(str, self.constraints)),
            "data": settings.tokens_id(self.tokens),
            "search_blocks": self.search_blocks,
            "method": self.method.value,
            "seed": self.seed,
            "start_from_grid": self.start_from_grid,
            "costs": asdict(self.costs),
            "dtype": str(self.dtype),
        }


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        trials: all of them, by number.
        front: as written to `front.json`.
    """

    trials: list[Trial]
    front: Front


class Session:
    """A search in its directory."""

    def __init__(self, request: Request, *, warn: Callable[[str], None]) -> None:
        """Check what can be checked before any work.

        Args:
            request: the search.
            warn: takes sentences for the user.

        Raises:
            ConfigError: if nothing can satisfy the constraints.
        """
        self.request = request
        self._warn = warn
        check_attainable(request.space, request.constraints, self._cost)

    @cached_property
    def quality_metrics(self) -> tuple[str, ...]:
        """Measured quality metrics: loss and perplexity come together."""
        wanted = {*self.request.objectives, *(c.metric for c in self.request.constraints)}
        return QUALITY if wanted & set(QUALITY) else ()

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """All columns of `trials.csv`."""
        return (*self.quality_metrics, *self.costs.names)

    @cached_property
    def costs(self) -> Costs:
        """Costs of every sub-network."""
        request = self.request
        config = request.checkpoint.config
        return Costs(
            config,
            request.checkpoint.info,
            batch_size=request.costs.batch_size,
            tokens=request.costs.resolve_tokens(config.block_size),
            dtype=request.dtype or torch.float32,
        )

    def run(self, *, resume: bool, on_trial: Callable[[Sequence[Trial]], None]) -> Outcome:
        """Run the trials, evaluate the front on all data and write the files.

        Args:
            resume: go on with the trials that the directory holds.
            on_trial: called after each trial with all trials so far, in the order in which they
                ended.

        Raises:
            ConfigError: if the directory can't be resumed, or if evaluations fail from the start.
        """
        recorded = self._open(resume)
        log = TrialLog(self.request.out_dir / FILE_NAME, self.metrics)
        ended = list(recorded)

        def record(trial: Trial) -> None:
            log.append(trial)
            ended.append(trial)
            on_trial(ended)

        pool = self._pool()
        try:
            trials = self._search(pool, recorded, record).run()
            front = self._front(pool, trials)
        finally:
            pool.close()
            log.close()
        atomic_write_text(self.request.out_dir / "front.json", front.dump())
        return Outcome(trials, front)

    def _open(self, resume: bool) -> list[Trial]:
        path = self.request.out_dir / FILE_NAME
        if not resume or not path.is_file():
            settings.write_settings(self.request.out_dir, self.request.settings())
            return []
        settings.check_settings(self.request.out_dir, self.request.settings())
        recorded, cut_off = read_trials(path, self.metrics)
        if cut_off:
            self._warn(f"the last line of {path} was cut off and is dropped; its trial is repeated")
        return recorded

    def _search(
        self, pool: Pool, recorded: Sequence[Trial], on_trial: Callable[[Trial], None]
    ) -> Search:
        request = self.request
        problem = Problem(
            space=request.space,
            objectives=request.objectives,
            costs=self.costs.functions(request.objectives),
            first=self._first(),
            size=lambda sub: self._cost(sub, "num_params"),
            likely_excess=excess_function(request.constraints, self._cost),
            excess=excess_function(request.constraints, self._cost),
        )
        return Search(
            searcher=make_searcher(request.method, problem, request.seed),
            objectives=request.objectives,
            costs=self.costs.of,
            pool=pool,
            schedule=Schedule(request.num_trials),
            on_trial=on_trial,
            recorded={trial.number: trial for trial in recorded},
        )

    def _pool(self) -> Pool:
        request = self.request
        spec = EvaluationSpec(
            checkpoint_dir=request.checkpoint.path,
            metrics=self.quality_metrics,
            batch_size=request.batch_size,
            num_blocks=request.search_blocks,
            device=str(request.device),
            dtype=request.dtype,
        )
        return InlinePool(Evaluator(spec, request.tokens))

    def _first(self) -> list[SubNetwork]:
        """The ends of the space, then the grid that was trained."""
        space, path = self.request.space, self.request.checkpoint.path / GRID
        first = [space.largest, space.smallest]
        if self.request.start_from_grid and path.is_file():
            first += [sub for sub in self._read_grid(path).subs if space.contains(sub)]
        return first

    def _read_grid(self, path: Path) -> Grid:
        try:
            spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
        cost = parameter_counter(self.request.checkpoint.config)
        return Grid.from_dict(spec, cost=cost, source=str(path))

    def _front(self, pool: Pool, trials: Sequence[Trial]) -> Front:
        """The front of the trials, evaluated again on all blocks."""
        request = self.request
        members = front_of(trials, request.objectives, request.constraints)
        if not members:
            raise ConfigError(
                "no sub-network satisfies --constraints "
                f"{', '.join(map(str, request.constraints)) or '(none)'} among the "
                f"{len(trials)} trials of {request.out_dir / FILE_NAME}"
            )
        whole = self._on_all_blocks(pool, members)
        kept = front_of(whole, request.objectives, request.constraints)
        entries = tuple(
            FrontEntry(index, trial.sub, self.costs.layers(trial.sub), trial.metrics)
            for index, trial in enumerate(kept)
        )
        return Front(
            request.objectives,
            entries,
            checkpoint_dir=str(request.checkpoint.path),
            how_measured=self._how_measured(len(trials)),
        )

    def _on_all_blocks(self, pool: Pool, members: Sequence[Trial]) -> list[Trial]:
        if not self.quality_metrics or members[0].blocks == len(self.request.tokens):
            return list(members)
        for number, trial in enumerate(members):
            pool.submit(number, trial.sub, whole=True)
        found = dict(pool.next() for _ in members)
        return [
            Trial(
                trial.number,
                trial.sub,
                found[number].status,
                {**trial.metrics, **found[number].metrics},
                found[number].blocks,
            )
            for number, trial in enumerate(members)
        ]

    def _how_measured(self, num_trials: int) -> dict[str, Any]:
        tokens = self.request.tokens
        return {
            "method": self.request.method.value,
            "seed": self.request.seed,
            "num_trials": num_trials,
            "search_blocks": self.request.search_blocks or len(tokens),
            "front_blocks": len(tokens),
            "block_size": tokens.shape[1] - 1,
            "device": str(self.request.device),
            "dtype": str(self.request.dtype or "as stored"),
            "costs_batch_size": self.request.costs.batch_size,
            "costs_tokens": self.request.costs.resolve_tokens(
                self.request.checkpoint.config.block_size
            ),
        }

    def _cost(self, sub: SubNetwork, name: str) -> float:
        return self.costs.of(sub, [name])[name]
