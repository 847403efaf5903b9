"""One search from a checkpoint to its front: what `nas search` does between flags and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.metrics.latency_table import calibration_networks
from whittle_nas.repair.engine import repair
from whittle_nas.search import budgets, rounds, settings
from whittle_nas.search.constraints import check_attainable, excess_function
from whittle_nas.search.evaluation import Job
from whittle_nas.search.loop import Schedule, Search
from whittle_nas.search.objectives import QUALITY, is_cost
from whittle_nas.search.options import Method
from whittle_nas.search.programs import Programs
from whittle_nas.search.request import Request
from whittle_nas.search.results import front_of
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
from whittle_nas.space.front import Front, FrontEntry
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.files import atomic_write_text, remove_run
from whittle_nas.weights.patch import Patch

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


@dataclass(frozen=True)
class Listener:
    """Who is told how the search goes.

    Attributes:
        on_trial: called after each trial with all trials so far, in the order in which they ended.
        on_step: called with what is done beside the trials, and how many steps of it are left.
        warn: takes sentences for the user.
    """

    on_trial: Callable[[Sequence[Trial]], None] = lambda _: None
    on_step: Callable[[str, int], None] = lambda _what, _left: None
    warn: Callable[[str], None] = lambda _: None


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
            measured, quality = self._evaluated(pool, trials)
        finally:
            pool.close()
            del pool
        _give_back_cache()
        front = self._written(len(trials), measured, quality)
        recovered = self._recover(trials)
        if recovered is not None:
            atomic_write_text(self.request.out_dir / "recovery.json", recovered.dump())
        return Outcome(trials, front, recovered)

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

    def _evaluated(
        self, pool: Pool, trials: Sequence[Trial]
    ) -> tuple[list[Trial], dict[str, float]]:
        """The trials of the front and the quality of the whole model, both on all data."""
        request = self.request
        members = front_of(trials, self._compared(), request.constraints)
        if not members:
            limits = ", ".join(map(str, request.constraints))
            raise ConfigError(
                f"none of the {len(trials)} trials of {request.out_dir / FILE_NAME} could be "
                f"evaluated{f' within --constraints {limits}' if limits else ''}; raise "
                "--num_trials and --resume, or relax the constraints"
            )
        measured = self._on_all_data(pool, members)
        full = SubNetwork.from_config(request.checkpoint.config)
        if any(trial.sub == full for trial in measured):
            return measured, {}
        pool.submit(Job(0, full, whole=True))
        self._listener.on_step("the whole model", 0)
        return measured, pool.next()[1].metrics

    def _written(
        self, num_trials: int, measured: Sequence[Trial], quality: Mapping[str, float]
    ) -> Front:
        """The front in its file; where times are an extra, what was found is there before them."""
        path = self.request.out_dir / "front.json"
        if self.costs.is_measured:
            front = self._front(num_trials, measured, quality)
        else:
            front = self._front(num_trials, measured, quality, timed=False)
            atomic_write_text(path, front.dump())
            try:
                front = self._front(num_trials, measured, quality)
            except (MemoryError, RuntimeError) as error:  # a device's memory ends in the latter
                self._listener.warn(
                    f"the front could not be timed, so {path} has no latency_ms: {error}"
                )
        atomic_write_text(path, front.dump())
        return front

    def _front(
        self,
        num_trials: int,
        measured: Sequence[Trial],
        quality: Mapping[str, float],
        *,
        timed: bool = True,
    ) -> Front:
        """The front of what was evaluated on all data, timed whole.

        Args:
            num_trials: how many were tried.
            measured: see `_evaluated`.
            quality: of the whole model, where it is not among them.
            timed: False leaves the times out.
        """
        request, compared = self.request, self._compared()
        measured, times = self._timed(measured) if timed else (measured, {})
        kept = front_of(measured, compared, request.constraints)
        if not kept:
            self._listener.warn(
                "measured again, no sub-network keeps the constraints; front.json has those of the "
                "search"
            )
            kept = front_of(measured, compared, ())
        how = request.how_measured(num_trials, self.costs.accuracies())
        front = self._as_front(request.objectives, kept, how)
        return replace(front, whole={"metrics": self._whole(measured, quality, times)})

    def _compared(self) -> tuple[str, ...]:
        """The objectives, and the costs that the budgets of programs name.

        What is best under a budget may lose in every objective, but not in the budget's own cost.
        The last objective stays the last: entries come in its order.
        """
        limits = (limit for _, asked in self.request.programs.limits() for limit in asked)
        costs = (limit.metric for limit in limits if is_cost(limit.metric))
        first, *others = self.request.objectives
        more = dict.fromkeys(cost for cost in costs if cost not in (first, *others))
        return (first, *more, *others)

    def _whole(
        self,
        measured: Sequence[Trial],
        quality: Mapping[str, float],
        times: Mapping[str, float],
    ) -> dict[str, float]:
        """Metrics of the whole model, like those of the front; without quality if it fails."""
        full = SubNetwork.from_config(self.request.checkpoint.config)
        if (found := next((t for t in measured if t.sub == full), None)) is not None:
            return dict(found.metrics)
        return {**quality, **self.costs.of(full), **times}

    def _as_front(
        self, objectives: tuple[str, ...], trials: Sequence[Trial], how: dict[str, Any]
    ) -> Front:
        entries = tuple(
            FrontEntry(index, trial.sub, trial.metrics) for index, trial in enumerate(trials)
        )
        library = str(self.request.library.path) if self.request.library else ""
        return Front(
            objectives, entries, str(self.request.checkpoint.path), how, candidates=library
        )

    def _recover(self, trials: Sequence[Trial]) -> Front | None:
        """The best trials of a budget, trained and ranked again."""
        request, options = self.request, self.request.recovery_in_numbers(self.costs)
        if options.budget is None:
            return None
        from whittle_nas.search import recovery
        from whittle_nas.train.batches import from_blocks

        assert request.training is not None
        best = recovery.best_of_budget(trials, request.constraints, options)
        teacher = recovery.load_teacher(request.checkpoint, request.device, request.load.dtype)

        def patch_of(sub: SubNetwork) -> Patch | None:
            if request.calibration is not None:  # as its trial was
                return repair(teacher, sub, request.calibration).patch
            return request.library and request.library.patch(sub)

        training = recovery.Recovery(
            options,
            request.checkpoint,
            teacher,
            from_blocks(request.training),
            from_blocks(request.tokens),
            request.device,
            request.seed,
            patch_of,
        )
        what = "recovery, training steps"
        found = recovery.recover(training, best, partial(self._listener.on_step, what))
        how = asdict(replace(options, data=None)) | {"blocks": len(request.tokens)}
        how["distillation"] = options.distillation.value
        objectives = (recovery.RECOVERED, *request.objectives[1:])
        return self._as_front(objectives, found, how)

    def _on_all_data(self, pool: Pool, members: Sequence[Trial]) -> list[Trial]:
        """The same trials with their quality on all blocks and all questions."""
        request = self.request
        text_done = not set(QUALITY) & set(request.quality_metrics)
        text_done = text_done or members[0].blocks == len(request.tokens)
        if text_done and request.tasks.limit is None:
            return list(members)
        for number, trial in enumerate(members):
            pool.submit(Job(number, trial.sub, whole=True))
        found = {}
        for left in range(len(members) - 1, -1, -1):
            number, evaluation = pool.next()
            found[number] = evaluation
            self._listener.on_step("front on all data", left)
        return [
            replace(
                trial,
                status=found[number].status,
                metrics={**trial.metrics, **found[number].metrics},
                blocks=found[number].blocks,
            )
            for number, trial in enumerate(members)
        ]

    def _timed(self, members: Sequence[Trial]) -> tuple[list[Trial], dict[str, float]]:
        """The same trials, with times of whole networks in place of the table's.

        Returns:
            The trials, and the times of the whole model, to which budgets are compared.
        """
        full = SubNetwork.from_config(self.request.checkpoint.config)
        subs = list(dict.fromkeys([*(trial.sub for trial in members), full]))
        times = self.costs.whole(subs, partial(self._listener.on_step, "timing the front"))
        found = dict(zip(subs, times, strict=True))
        timed = [replace(t, metrics={**t.metrics, **found[t.sub]}) for t in members]
        return timed, found[full]


def _give_back_cache() -> None:
    """Let other processes, such as workers, have the GPU memory of models that are gone."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
