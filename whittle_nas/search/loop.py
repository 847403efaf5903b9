"""Ask, evaluate, tell: the same trials for the same seed, however often it is interrupted."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from syne_tune.backend.trial_status import Trial as SyneTuneTrial
from syne_tune.optimizer.schedulers.single_fidelity_scheduler import SingleFidelityScheduler

from whittle_nas.errors import ConfigError
from whittle_nas.search import halving
from whittle_nas.search.evaluation import Evaluation, Job
from whittle_nas.search.options import HalvingOptions
from whittle_nas.search.searchers import SpaceSearcher
from whittle_nas.search.trials import Status, Trial
from whittle_nas.search.workers import Pool
from whittle_nas.space.subnetwork import SubNetwork

_HOPELESS = 5  # trials in a row that fail


@dataclass(frozen=True)
class Schedule:
    """When a proposal may be made: what makes parallel runs repeatable.

    A proposal knows the results of a fixed set of earlier trials, whichever happen to have ended.
    With a few more trials ahead than workers nobody waits.

    Attributes:
        num_trials: how many trials there are.
        ahead: trials whose results a proposal need not know, itself included; 1: none.
        in_groups: propose `ahead` trials at once while nothing runs, so that times on this device
            can be measured in between.
    """

    num_trials: int
    ahead: int = 1
    in_groups: bool = False

    def known_before(self, number: int) -> int:
        """Number of trials whose results are told before trial `number` is proposed."""
        if self.in_groups:
            return number // self.ahead * self.ahead
        return max(0, number - self.ahead + 1)


@dataclass
class Search:
    """State of a running search.

    Attributes:
        searcher: proposes.
        objectives: names, in the order in which the searcher sees them.
        costs: all cost metrics of a sub-network.
        pool: evaluates.
        schedule: who waits for what.
        on_trial: called with each new trial as it ends.
        recorded: trials of an interrupted run by number.
        halving: whether bad trials are stopped early.
    """

    searcher: SpaceSearcher
    objectives: Sequence[str]
    costs: Callable[[SubNetwork], Mapping[str, float]]
    pool: Pool
    schedule: Schedule
    on_trial: Callable[[Trial], None]
    recorded: Mapping[int, Trial] = field(default_factory=dict)
    halving: HalvingOptions = field(default_factory=HalvingOptions)

    def __post_init__(self) -> None:
        self._scheduler = SingleFidelityScheduler(
            self.searcher.config_space,
            metrics=list(self.objectives),
            searcher=self.searcher,
            random_seed=self.searcher.random_seed,
        )
        self._running: dict[int, tuple[SubNetwork, Mapping[str, float]]] = {}
        self._ended: dict[int, Trial] = {}
        self._asked = 0
        self.told: list[Trial] = []

    def run(self) -> list[Trial]:
        """Run all trials.

        Returns:
            The trials by number, those of the interrupted run included.

        Raises:
            ConfigError: if several trials in a row fail.
        """
        exhausted = False
        while True:
            while not exhausted and self._may_ask():
                exhausted = not self._ask()
            if len(self.told) == self._asked:
                return self.told
            while len(self.told) not in self._ended:
                self._collect()
            self._tell(self._ended.pop(len(self.told)))

    def _may_ask(self) -> bool:
        wanted = self._asked < self.schedule.num_trials
        return wanted and len(self.told) >= self.schedule.known_before(self._asked)

    def _ask(self) -> bool:
        """Propose and start one trial; False if the space is exhausted."""
        number = self._asked
        if number in self.recorded:
            self._ended[number] = self.recorded[number]
            self.searcher.accept(self.recorded[number].sub)
        else:
            suggestion = self._scheduler.suggest()
            if suggestion is None:
                return False
            sub = self.searcher.proposals[number]
            costs = self.costs(sub)
            self._running[number] = sub, costs
            self.pool.submit(Job(number, sub, stop_above=self._bound(costs)))
        self._asked += 1
        return True

    def _bound(self, costs: Mapping[str, float]) -> float:
        if not self.halving.first_blocks:
            return float("inf")
        names = [name for name in self.objectives if name in costs]
        return halving.bound(costs, self.told, names, keep=self.halving.keep)

    def _collect(self) -> None:
        """Wait for one evaluation."""
        number, evaluation = self.pool.next()
        trial = _trial(number, *self._running.pop(number), evaluation)
        self._ended[number] = trial
        self.on_trial(trial)

    def _tell(self, trial: Trial) -> None:
        config: dict[str, Any] = dict(self.searcher.space.genes(trial.sub))
        stamped = SyneTuneTrial(trial.number, config, datetime.datetime.now())
        if trial.status is Status.failed:
            self.searcher.on_trial_error(trial.number)
        else:
            values = halving.completed(trial, self.told, self.objectives)
            self._scheduler.on_trial_complete(stamped, values)
        self.told.append(trial)
        last = self.told[-_HOPELESS:]
        if len(last) == _HOPELESS and all(trial.status is Status.failed for trial in last):
            raise ConfigError(
                f"{_HOPELESS} sub-networks in a row could not be evaluated (--resume true repeats "
                f"them); the last one, {trial.sub}: {trial.note}"
            )


def _trial(number: int, sub: SubNetwork, costs: Mapping[str, float], found: Evaluation) -> Trial:
    metrics = {**found.metrics, **costs}
    return Trial(number, sub, found.status, metrics, found.blocks, found.seconds, found.note)
