"""What follows the trials of a search: the front on all data, timed whole, and trained networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.repair.engine import repair
from whittle_nas.search.costs import Costs
from whittle_nas.search.evaluation import Job
from whittle_nas.search.objectives import QUALITY, is_cost
from whittle_nas.search.request import Request
from whittle_nas.search.results import front_of
from whittle_nas.search.trials import FILE_NAME, Trial
from whittle_nas.search.workers import Pool
from whittle_nas.space.front import Front, FrontEntry
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.files import atomic_write_text
from whittle_nas.weights.patch import Patch


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


@dataclass(frozen=True)
class Evaluated:
    """What was measured on all data.

    Attributes:
        num_trials: of the search.
        front: its best trials.
        whole: quality of the whole model; empty where that is one of them.
    """

    num_trials: int
    front: Sequence[Trial]
    whole: Mapping[str, float]


@dataclass(frozen=True)
class Finish:
    """How the results of a search are made.

    Attributes:
        request: the search.
        costs: of networks.
        listener: who is told.
    """

    request: Request
    costs: Costs
    listener: Listener

    def evaluate(self, pool: Pool, trials: Sequence[Trial]) -> Evaluated:
        """Score the trials of the front, and the whole model, on all data.

        Args:
            pool: where networks are evaluated.
            trials: all of the search.

        Raises:
            ConfigError: if no trial keeps the constraints.
        """
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
            return Evaluated(len(trials), measured, {})
        pool.submit(Job(0, full, whole=True))
        self.listener.on_step("the whole model", 0)
        return Evaluated(len(trials), measured, pool.next()[1].metrics)

    def write_front(self, found: Evaluated) -> Front:
        """The front in its file; where times are an extra, what was found is there before them."""
        path = self.request.out_dir / "front.json"
        if self.costs.is_measured:
            front = self._front(found)
        else:
            front = self._front(found, timed=False)
            atomic_write_text(path, front.dump())
            try:
                front = self._front(found)
            except (MemoryError, RuntimeError) as error:  # a device's memory ends in the latter
                self.listener.warn(
                    f"the front could not be timed, so {path} has no latency_ms: {error}"
                )
        atomic_write_text(path, front.dump())
        return front

    def _front(self, found: Evaluated, *, timed: bool = True) -> Front:
        """The front of what was evaluated on all data, timed whole unless `timed` is False."""
        request, compared = self.request, self._compared()
        measured, times = self._timed(found.front) if timed else (found.front, {})
        kept = front_of(measured, compared, request.constraints)
        if not kept:
            self.listener.warn(
                "measured again, no sub-network keeps the constraints; front.json has those of the "
                "search"
            )
            kept = front_of(measured, compared, ())
        how = request.how_measured(found.num_trials, self.costs.accuracies())
        front = self._as_front(request.objectives, kept, how)
        return replace(front, whole={"metrics": self._whole(measured, found.whole, times)})

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

    def write_recovered(self, trials: Sequence[Trial]) -> Front | None:
        """The best trials of a budget, trained and ranked again, in `recovery.json`."""
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
        found = recovery.recover(training, best, partial(self.listener.on_step, what))
        how = asdict(replace(options, data=None)) | {"blocks": len(request.tokens)}
        how["distillation"] = options.distillation.value
        objectives = (recovery.RECOVERED, *request.objectives[1:])
        front = self._as_front(objectives, found, how)
        atomic_write_text(request.out_dir / "recovery.json", front.dump())
        return front

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
            self.listener.on_step("front on all data", left)
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
        times = self.costs.whole(subs, partial(self.listener.on_step, "timing the front"))
        found = dict(zip(subs, times, strict=True))
        timed = [replace(t, metrics={**t.metrics, **found[t.sub]}) for t in members]
        return timed, found[full]
