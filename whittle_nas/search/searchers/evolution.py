"""Multi-objective regularised evolution, Syne Tune's with its ranking and its seed put right."""

from __future__ import annotations

from typing import Any

import numpy as np
from syne_tune.config_space import Domain
from syne_tune.optimizer.schedulers.multiobjective import MultiObjectiveRegularizedEvolution
from syne_tune.optimizer.schedulers.multiobjective.multiobjective_priority import MOPriority

from whittle_nas.search.pareto import pareto_rank
from whittle_nas.search.searchers.base import Problem, SpaceSearcher
from whittle_nas.space.subnetwork import SubNetwork

_POPULATION = 30
_SAMPLE = 10


class RankPriority(MOPriority):
    """The number of the front that a point is on; crowded ones last among equals.

    Syne Tune's `NonDominatedPriority` returns an argsort where priorities are expected, which
    makes its evolution select almost at random (0.16.0).
    """

    def priority_unsafe(self, objectives: np.ndarray) -> np.ndarray:
        """Lower is better, (N, M) -> (N,)."""
        ranks = pareto_rank(objectives)
        return ranks + 0.5 * _crowding(objectives, ranks)


def _crowding(points: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """1 for a point whose neighbours on its front are close, 0 for the loneliest and the ends."""
    lonely = np.zeros(len(points))
    span = np.ptp(points, axis=0)
    scaled = points / np.where(span > 0, span, 1.0)
    for rank in np.unique(ranks):
        members = np.flatnonzero(ranks == rank)
        for column in scaled[members].T:
            order = np.argsort(column, kind="stable")
            gaps = np.full(len(members), np.inf)
            gaps[order[1:-1]] = column[order[2:]] - column[order[:-2]]
            lonely[members] += gaps
    return 1.0 / (1.0 + lonely)


class EvolutionSearcher(SpaceSearcher):
    """Mutates the best of a random sample of a population from which the oldest dies."""

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._domains = {
            name: domain for name, domain in self.config_space.items() if isinstance(domain, Domain)
        }
        self._evolution: Any = self._domains and MultiObjectiveRegularizedEvolution(
            self._domains,
            population_size=_POPULATION,
            sample_size=_SAMPLE,
            multiobjective_priority=RankPriority(),
            random_seed=self.random_seed,
        )

    def observe(self, sub: SubNetwork, values: np.ndarray) -> None:
        """Let it live in the population."""
        if self._evolution:
            genes = self.space.genes(sub)
            config = {name: domain.cast(genes[name]) for name, domain in self._domains.items()}
            self._evolution.on_trial_complete(0, config, list(values))

    def propose(self) -> SubNetwork:
        """A child; random members until there is a population."""
        # Its own random members come from numpy's global generator.
        if not self._evolution or len(self._evolution.population) < _POPULATION:
            return self.space.sample(self.rng)
        self._evolution.random_state = np.random.RandomState(self.rng.getrandbits(32))
        child = self._evolution.suggest()
        sub = self.space.build(**{**self.config_space, **(child or {})})
        return sub or self.space.sample(self.rng)
