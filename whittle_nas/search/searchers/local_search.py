"""Local search around the front."""

from __future__ import annotations

import numpy as np

from whittle_nas.search.pareto import is_on_front
from whittle_nas.search.searchers.base import Problem, SpaceSearcher
from whittle_nas.space.subnetwork import SubNetwork


class LocalSearcher(SpaceSearcher):
    """Changes one dimension of a random member of the present front."""

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._front: list[SubNetwork] = []
        self._points = np.empty((0, len(problem.objectives)))

    def observe(self, sub: SubNetwork, values: np.ndarray) -> None:
        """Keep the front."""
        subs, points = [*self._front, sub], np.vstack([self._points, values])
        kept = is_on_front(points)
        self._front = [sub for sub, keep in zip(subs, kept, strict=True) if keep]
        self._points = points[kept]

    def propose(self) -> SubNetwork:
        """A member that differs from one of the front in one dimension."""
        if not self._front:
            return self.space.sample(self.rng)
        return self.mutated(self.rng.choice(self._front))
