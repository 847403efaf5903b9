"""Random search spread evenly over the cost."""

from __future__ import annotations

import random

from whittle_nas.search.searchers.base import Problem, SpaceSearcher
from whittle_nas.space.subnetwork import SubNetwork

_BINS = 20
_DRAWS = 100


class StratifiedSearcher(SpaceSearcher):
    """Takes one random member per cost bin in turn.

    A uniform draw of sizes favours small sub-networks. Here a target cost is drawn first, from each
    bin once before any bin twice, and of many random members the nearest is taken. Waiting for a
    member of the bin itself would take forever where a bin is nearly empty.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._cost = next(iter(problem.costs.values()), problem.size)
        low, high = self._cost(problem.space.smallest), self._cost(problem.space.largest)
        self._low, self._width = low, (high - low) / _BINS

    def propose(self) -> SubNetwork:
        """The draw that is nearest to the next target."""
        target = self._low + (self._bin() + self.rng.random()) * self._width
        draws = [self.space.sample(self.rng) for _ in range(_DRAWS)]
        fitting = [sub for sub in draws if self.is_new(sub)] or draws
        return min(fitting, key=lambda sub: abs(self._cost(sub) - target))

    def _bin(self) -> int:
        """Whose turn it is: every round takes the bins in an order of its own."""
        turn, at = divmod(len(self.proposals), _BINS)
        bins = list(range(_BINS))
        random.Random(f"bins/{self.random_seed}/{turn}").shuffle(bins)
        return bins[at]
