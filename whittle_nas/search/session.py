"""One search from a checkpoint to its front: what `nas search` does between flags and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.metrics.latency_table import calibration_networks
from whittle_nas.search import budgets, rounds, settings
from whittle_nas.search.constraints import check_attainable, excess_function
from whittle_nas.search.finish import Finish, Listener
from whittle_nas.search.loop import Schedule, Search
from whittle_nas.search.options import Method
from whittle_nas.search.programs import Programs
from whittle_nas.search.request import Request
from whittle_nas.search.rounds import ProgramSearch
from whittle_nas.search.searchers import Problem, make_searcher
from whittle_nas.search.trials import (
    FILE_NAME,
    Status,
    Trial,
    TrialLog,
    read_trials,
    write_trials,
)
from whittle_nas.search.workers import Pool, make_pool
from whittle_nas.space.front import Front
from whittle_nas.weights.files import remove_run

FILES = (
    FILE_NAME, settings.FILE_NAME, "front.json", "front.png", "shapes.png", "front.html",
    "recovery.json", budgets.FILE_NAME, rounds.FILE_NAME,
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        trials: all of them, by number.
        front: as written to `front.json`.
        recovered: as written to `recovery.json`: the best of a budget, ranked after a training.
    """

    trials: list[Trial]
    front: Front
    recovered: Front | None = None


class Session:
    """A search in its directory."""

    def __init__(self, request: Request, listener: Listener | None = None) -> None:
        """Check what can be checked before any work.

        Args:
            request: the search.
            listener: who is told.

        Raises:
            ConfigError: if nothing can satisfy the constraints.
        """
        self.request = request = request.resolved()
        self._listener = listener or Listener()
        request.halving.check(request.search_blocks, request.objectives)
        request.recovery.check(request.quality_metrics)
        if request.recovery.budget is not None and request.library is not None:
            from whittle_nas.train.specialise import check_trainable

            library = request.library
            check_trainable(library.forms, f"--recovery.budget: --candidates {library.path}")
        self.costs = request.make_costs()
        self.metrics = (*request.quality_metrics, *self.costs.names)
        self._first = request.first()
        self._programs: Programs | None = None
        if request.method is Method.ilp:
            self._programs = Programs(request, self.costs)
        else:
            check_attainable(request.space, request.constraints, self.costs.estimate)

    def run(self, *, resume: bool) -> Outcome:
        """Run the trials, evaluate the front on all data and write `front.json`.

        Args:
            resume: go on with the trials that the directory holds.

        Raises:
            ConfigError: if the directory can't be resumed, or if evaluations fail from the start.
        """
        resume = resume and self._can_resume()
        ahead, ended = self._open() if resume else (self._ahead(), [])
        # Whole networks are timed before the super-network is loaded and after it is gone: a GPU
        # that the one fills has no room for the other.
        self._calibrate()
        _give_back_cache()
        pool = self._pool()
        try:
            if not resume:
                self._begin(ahead)
            trials = self._all_trials(pool, ahead, ended)
            finish = Finish(self.request, self.costs, self._listener)
            evaluated = finish.evaluate(pool, trials)
        finally:
            pool.close()
            del pool
        _give_back_cache()
        return Outcome(trials, finish.write_front(evaluated), finish.write_recovered(trials))

    def _all_trials(self, pool: Pool, ahead: int, ended: list[Trial]) -> list[Trial]:
        """The trials that are recorded, and those that are still to be run."""
        recorded = {trial.number: trial for trial in ended}

        def record(trial: Trial) -> None:
            log.append(trial)
            ended.append(trial)
            self._listener.on_trial(ended)

        log = TrialLog(self.request.out_dir / FILE_NAME, self.metrics, self.request.space)
        try:
            search = self._search(pool, ahead, record)
            search.recorded = recorded
            return search.run()
        finally:
            log.close()

    def _ahead(self) -> int:
        """How far proposals run ahead of results."""
        return 1 if self.request.workers == 1 else 2 * self.request.workers

    def _can_resume(self) -> bool:
        """Whether there is anything to go on from; an interruption may come before it."""
        path, trials = (self.request.out_dir / name for name in (settings.FILE_NAME, FILE_NAME))
        if trials.is_file() and not path.is_file():
            raise ConfigError(
                f"--resume: {path} is missing, which says how {trials} was made; start anew with "
                "another --out_dir"
            )
        return path.is_file()

    def _begin(self, ahead: int) -> None:
        """Make the directory for a new search; only now, when all options are found right."""
        request = self.request
        request.out_dir.mkdir(parents=True, exist_ok=True)
        remove_run(request.out_dir, FILES)
        settings.write_settings(request.out_dir, request.settings(ahead))

    def _open(self) -> tuple[int, list[Trial]]:
        """How far proposals ran ahead, and the trials of an interrupted run."""
        request, path = self.request, self.request.out_dir / FILE_NAME
        # A resumed search may have other workers; what its proposals know stays the same.
        ahead = settings.read_settings(request.out_dir).get("ahead", self._ahead())
        if not isinstance(ahead, int):
            raise ConfigError(f"--resume: {request.out_dir / settings.FILE_NAME}: {ahead=}")
        settings.check_settings(request.out_dir, request.settings(ahead))
        if not path.is_file():
            return ahead, []
        recorded, cut_off = read_trials(path, self.metrics, self.request.space)
        if cut_off:
            self._listener.warn(
                f"the last line of {path} was cut off and is dropped; its trial is repeated"
            )
        if failed := sum(trial.status is Status.failed for trial in recorded):
            self._listener.warn(f"{failed} failed trials of {path} are repeated")
            recorded = [trial for trial in recorded if trial.status is not Status.failed]
            write_trials(path, recorded, self.metrics, request.space)
        self._listener.on_trial(recorded)
        return ahead, recorded

    def _calibrate(self) -> None:
        """Time whole networks for a new latency table; a table that ranks badly is told."""
        request, count = self.request, self.request.costs.calibrate
        if self.costs.is_measured and count:
            subs = calibration_networks(request.space, count, request.seed)
            left = iter(range(count - 1, -1, -1))
            self.costs.calibrate(
                subs, lambda: self._listener.on_step("timing whole networks", next(left))
            )
        self._resolve_again()
        for name, accuracy in self.costs.accuracies().items():
            if not accuracy.ranks:
                self._listener.warn(
                    f"{name}: the times of {request.table} rank whole networks at "
                    f"{accuracy.rank_correlation:.2f}: they were measured on a busy machine; "
                    "remove the file and search again, with --overwrite true, while it is quiet"
                )

    def _resolve_again(self) -> None:
        """Set limits that are shares of the whole model's time, now that times are corrected."""
        before, request = self.request, self.request.resolved(self.costs)
        self.request = request
        if self._programs is not None:
            self._programs.renew(request)
        elif request.constraints != before.constraints:
            check_attainable(request.space, request.constraints, self.costs.estimate)

    def _search(
        self, pool: Pool, ahead: int, on_trial: Callable[[Trial], None]
    ) -> Search | ProgramSearch:
        request, costs = self.request, self.costs
        if self._programs is not None:
            return ProgramSearch(
                self._programs, pool, on_trial, partial(self._listener.on_step, "measuring around")
            )
        likely = excess_function(request.constraints, costs.estimate)
        exact = excess_function(request.constraints, costs.value) if costs.is_measured else likely
        problem = Problem(
            space=request.space,
            objectives=request.objectives,
            costs=costs.estimators(request.objectives),
            first=self._first,
            size=partial(costs.estimate, name="num_params"),
            likely_excess=likely,
            excess=exact,
        )
        return Search(
            searcher=make_searcher(request.method, problem, request.seed),
            objectives=request.objectives,
            costs=costs.of,
            pool=pool,
            schedule=Schedule(request.num_trials, ahead, in_groups=costs.is_measured),
            on_trial=on_trial,
            halving=request.halving,
        )

    def _pool(self) -> Pool:
        return make_pool(self.request, self._listener.warn)


def _give_back_cache() -> None:
    """Let other processes, such as workers, have the GPU memory of models that are gone."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
