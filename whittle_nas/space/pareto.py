"""Training samples from the current front instead of from the whole space.

AttentiveNAS (Wang et al., 2021) trains, among networks of about equal cost, the one that is
predicted best. Here the predictions are measured: now and then, members are scored on a small
held-out set, and steps draw from the front over cost that the scores make, from its neighbours and,
with a small share, from anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from whittle_nas.space.samplers import Sampler, bin_edges, bin_of
from whittle_nas.space.searchspace import SearchSpace
from whittle_nas.space.subnetwork import SubNetwork

FRONT, NEAR = 0.6, 0.9  # shares of the draws, running total: the front, its neighbours, anywhere
_TRIES = 200  # random members among which one of a bin is looked for


@dataclass(frozen=True)
class ParetoSampler(Sampler):
    """Draws from the front over cost of what was scored last.

    A value: scoring makes a new one, so that a draw depends on nothing but it and `rng`.

    Attributes:
        space: where members come from.
        cost: of a sub-network, e.g. its number of parameters.
        num_bins: equal bins of the cost; the front has at most one member in each.
        best: by number of the bin, its best member and the loss that it had, in nats.
    """

    space: SearchSpace
    cost: Callable[[SubNetwork], float]
    num_bins: int
    best: Mapping[int, tuple[SubNetwork, float]]

    @classmethod
    def start(
        cls, space: SearchSpace, cost: Callable[[SubNetwork], float], num_bins: int
    ) -> ParetoSampler:
        """Nothing was scored yet: draws come from anywhere, each bin as often as the others."""
        return cls(space, cost, num_bins, {})

    @property
    def edges(self) -> list[float]:
        """Limits of the bins."""
        low, high = (self.cost(sub) for sub in (self.space.smallest, self.space.largest))
        return bin_edges(low, high, self.num_bins)

    def sample(self, rng: random.Random, count: int) -> list[SubNetwork]:
        """Draw `count` sub-networks; some may be equal where the space is small."""
        found: list[SubNetwork] = []
        for _ in range(8 * count):
            if len(found) == count:
                break
            if (sub := self._draw(rng)) not in found:
                found.append(sub)
        return found + [self._draw(rng) for _ in range(count - len(found))]

    def _draw(self, rng: random.Random) -> SubNetwork:
        kind, front = rng.random(), self.front()
        if not front or kind >= NEAR:
            return self._anywhere(rng)
        sub = rng.choice(front)
        if kind < FRONT:
            return sub
        return rng.choice(self.space.neighbours(sub) or [sub])

    def _anywhere(self, rng: random.Random) -> SubNetwork:
        """A member of a random bin, or any if none was found there."""
        edges, wanted = self.edges, rng.randrange(self.num_bins)
        drawn = (self.space.sample(rng) for _ in range(_TRIES))
        fits = (sub for sub in drawn if bin_of(self.cost(sub), edges) == wanted)
        return next(fits, None) or self.space.sample(rng)

    def front(self) -> list[SubNetwork]:
        """The members that no cheaper one beats, by rising cost."""
        kept, lowest = [], float("inf")
        for _, (sub, loss) in sorted(self.best.items()):
            if loss < lowest:
                kept.append(sub)
                lowest = loss
        return kept

    def candidates(self, rng: random.Random, count: int) -> list[SubNetwork]:
        """What should be scored next: the front again, its neighbours, and some from anywhere.

        Args:
            rng: of the draws.
            count: how many at most; a front that is longer is scored whole.
        """
        found = dict.fromkeys(self.front())
        half = (len(found) + count) // 2
        for _ in range(8 * count):
            if len(found) >= count:
                break
            front = self.front()
            near = self.space.neighbours(rng.choice(front)) if front and len(found) < half else []
            found[rng.choice(near) if near else self._anywhere(rng)] = None
        return list(found)

    def updated(self, scored: Sequence[tuple[SubNetwork, float]]) -> ParetoSampler:
        """With the best of each bin among what was just scored.

        Losses fall during the training, so those of other steps do not count: a bin of which
        nothing was scored keeps its member, whose old loss only keeps it off the front.

        Args:
            scored: sub-networks and their losses, all at the same step.
        """
        edges, fresh = self.edges, {}
        for sub, loss in scored:
            number = bin_of(self.cost(sub), edges)
            if number not in fresh or loss < fresh[number][1]:
                fresh[number] = (sub, loss)
        return replace(self, best={**self.best, **fresh})

    def state(self) -> list[dict[str, Any]]:
        """What was scored, in plain values."""
        return [
            {"bin": number, "loss": loss, "subnetwork": sub.to_dict()}
            for number, (sub, loss) in self.best.items()
        ]

    def restored(self, state: Sequence[Mapping[str, Any]]) -> ParetoSampler:
        """The sampler whose `state` this is."""
        best: dict[int, tuple[SubNetwork, float]] = {}
        for entry in state:
            sub = SubNetwork.from_dict(entry["subnetwork"], self.space.layer_order)
            best[int(entry["bin"])] = sub, float(entry["loss"])
        return replace(self, best=best)
