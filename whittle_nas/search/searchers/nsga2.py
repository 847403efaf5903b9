"""NSGA-II with the operators of pymoo."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.population import Population
from pymoo.core.problem import Problem as PymooProblem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair

from whittle_nas.search.searchers.base import Problem, SpaceSearcher
from whittle_nas.space.subnetwork import SubNetwork

# Small, as search budgets are: with 20 or 40 the second generation starts when 50 trials are over.
_POPULATION = 10


class NSGA2Searcher(SpaceSearcher):
    """Children of the population; it is renewed when a generation of results has come in.

    A sub-network is a vector of positions in the ordered choices of each dimension. pymoo's own
    ask/tell hands out whole generations and waits for all of one, which late or failed trials
    would block.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._choices = {n: v for n, v in self.space.dimensions().items() if len(v) > 1}
        highest = np.array([len(values) - 1 for values in self._choices.values()])
        self._bounds: Any = PymooProblem(
            n_var=max(1, len(highest)),
            n_obj=len(problem.objectives),
            xl=np.zeros(max(1, len(highest))),
            xu=highest if len(highest) else np.ones(1),
            vtype=int,
        )
        self._algorithm: Any = NSGA2(
            pop_size=_POPULATION,
            crossover=SBX(prob=0.9, eta=15, vtype=float, repair=RoundingRepair()),
            mutation=PM(eta=20, vtype=float, repair=RoundingRepair()),
            seed=self.random_seed,
        )
        self._algorithm.setup(self._bounds)
        self._population: Any = Population.empty()
        self._generation: list[tuple[np.ndarray, np.ndarray]] = []

    def observe(self, sub: SubNetwork, values: np.ndarray) -> None:
        """Collect a generation, then keep the best of it and of the population."""
        genes = self.space.genes(sub)
        position = np.array([v.index(genes[name]) for name, v in self._choices.items()])
        self._generation.append((position, values))
        if len(self._generation) < _POPULATION:
            return
        positions, points = map(np.array, zip(*self._generation, strict=True))
        self._generation = []
        merged = Population.merge(self._population, Population.new(X=positions, F=points))
        for individual in merged:
            individual.evaluated.update(("F", "G", "H"))
        self._population = self._algorithm.survival.do(
            self._bounds,
            merged,
            n_survive=_POPULATION,
            algorithm=self._algorithm,
            random_state=np.random.default_rng(self.random_seed),
        )

    def propose(self) -> SubNetwork:
        """A child of two parents; random members before the first generation."""
        if not len(self._population) or not self._choices:
            return self.space.sample(self.rng)
        # Both the operators and their tournament draw from the algorithm's generator.
        self._algorithm.random_state = np.random.default_rng(self.rng.getrandbits(64))
        children = self._algorithm.mating.do(
            self._bounds,
            self._population,
            1,
            algorithm=self._algorithm,
            random_state=self._algorithm.random_state,
        )
        if not len(children):
            return self.space.sample(self.rng)
        choices = zip(self._choices.items(), children[0].X, strict=True)
        genes = {name: values[round(at)] for (name, values), at in choices}
        fixed = {n: v[0] for n, v in self.space.dimensions().items() if n not in genes}
        return self.space.build(**fixed, **genes) or self.space.sample(self.rng)
