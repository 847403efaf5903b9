"""Linear scalarisation: a single objective with random weights, drawn anew for each proposal."""

from __future__ import annotations

import numpy as np

from whittle_nas.search.searchers.base import Problem, SpaceSearcher
from whittle_nas.space.subnetwork import SubNetwork

_START = 10  # random members before the first weights


class ScalarizationSearcher(SpaceSearcher):
    """Changes one dimension of the sub-network that is best under random weights.

    Objectives are scaled to [0, 1] over what was seen. Only points on the convex hull of the front
    are best under any weights, so concave parts are reached by their neighbours alone.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._subs: list[SubNetwork] = []
        self._points: list[np.ndarray] = []

    def observe(self, sub: SubNetwork, values: np.ndarray) -> None:
        """Keep all results."""
        self._subs.append(sub)
        self._points.append(values)

    def propose(self) -> SubNetwork:
        """A member that differs in one dimension from the best one."""
        if len(self._subs) < _START:
            return self.space.sample(self.rng)
        points = np.array(self._points)  # (N, M)
        span = np.ptp(points, axis=0)
        scaled = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
        weights = np.array([self.rng.expovariate(1.0) for _ in self.problem.objectives])
        return self.mutated(self._subs[int(np.argmin(scaled @ weights))])
