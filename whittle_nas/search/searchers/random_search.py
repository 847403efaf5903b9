"""Random search: the method that every other one has to beat."""

from __future__ import annotations

from whittle_nas.search.searchers.base import SpaceSearcher
from whittle_nas.space.subnetwork import SubNetwork


class RandomSearcher(SpaceSearcher):
    """Draws every choice as the search space says: uniform, or log-uniform.

    Syne Tune's own draws from numpy's global generator, whatever its `random_seed`.
    """

    def propose(self) -> SubNetwork:
        """A random member."""
        return self.space.sample(self.rng)
