"""Which sub-networks take part in a training step.

Pure Python: what a sub-network costs and how good it is come as callables.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.space.searchspace import SearchSpace
from whittle_nas.space.subnetwork import SubNetwork


class Sampler(ABC):
    """Draws sub-networks for training steps.

    Contract: every draw is a member of the space (or of the list that the user gave), depends on
    nothing but `rng` and leaves the sampler as it is, so that every process of a distributed run
    and every resumed run draws the same.
    """

    @abstractmethod
    def sample(self, rng: random.Random, count: int) -> list[SubNetwork]:
        """Draw `count` sub-networks, all different as long as there are enough."""


@dataclass(frozen=True)
class RandomSampler(Sampler):
    """Every choice of the space uniform; it favours small sub-networks (v1, Figure 2a)."""

    space: SearchSpace

    def sample(self, rng: random.Random, count: int) -> list[SubNetwork]:
        """Draw `count` members of the space."""
        found: list[SubNetwork] = []
        for _ in range(16 * count):  # a space with fewer members repeats some
            if len(found) == count:
                break
            if (sub := self.space.sample(rng)) not in found:
                found.append(sub)
        return found + [self.space.sample(rng) for _ in range(count - len(found))]


@dataclass(frozen=True)
class GridSampler(Sampler):
    """A uniform choice among the members of a grid."""

    members: tuple[SubNetwork, ...]

    def __post_init__(self) -> None:
        assert self.members

    def sample(self, rng: random.Random, count: int) -> list[SubNetwork]:
        """Draw `count` members; all of them in turn where the grid is smaller than `count`."""
        rounds, rest = divmod(count, len(self.members))
        return list(self.members) * rounds + rng.sample(self.members, rest)


@dataclass(frozen=True)
class GridMember:
    """One sub-network of a grid.

    Attributes:
        sub: its sizes.
        cost: what the bins count, e.g. its number of parameters.
        score: why it was kept among the candidates of its bin; None if it was drawn at random.
    """

    sub: SubNetwork
    cost: float
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain form for `grid.yaml`."""
        scored = {} if self.score is None else {"score": self.score}
        return {"cost": self.cost, **scored, **self.sub.to_dict()}


@dataclass(frozen=True)
class Grid:
    """Sub-networks spread over the range of costs.

    Attributes:
        members: by rising cost, at most one per bin.
        edges: limits of the bins, one more than there are bins; empty for a list by hand.
        empty_bins: numbers of the bins in which no member was found.
    """

    members: tuple[GridMember, ...]
    edges: tuple[float, ...] = ()
    empty_bins: tuple[int, ...] = field(default=())

    @property
    def subs(self) -> tuple[SubNetwork, ...]:
        """The sub-networks alone."""
        return tuple(member.sub for member in self.members)

    def to_dict(self) -> dict[str, Any]:
        """Plain form: what `grid.yaml` holds."""
        return {
            "edges": list(self.edges),
            "empty_bins": list(self.empty_bins),
            "members": [member.to_dict() for member in self.members],
        }

    @classmethod
    def from_dict(
        cls,
        spec: Any,
        *,
        cost: Callable[[SubNetwork], float],
        layer_order: Sequence[int],
        source: str = "grid",
    ) -> Grid:
        """Inverse of `to_dict`; also reads a search's front, and a list of sizes written by hand.

        Args:
            spec: the plain form, that of `front.json`, or a list of sub-network sizes, which may
                have a `name` each.
            cost: gives the costs anew, since a file may have been edited.
            layer_order: of the super-network, most important first.
            source: names the file in messages.

        Raises:
            ConfigError: if the form is unknown or there is no sub-network.
        """
        listed = spec.get("members", spec.get("front")) if isinstance(spec, dict) else spec
        if not isinstance(listed, list) or not listed:
            raise ConfigError(
                f"{source}: expected a list of sub-network sizes, a grid.yaml with 'members', or "
                "a front.json"
            )
        try:
            members = [_read_member(entry, cost, layer_order) for entry in listed]
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        by_hand = not isinstance(spec, dict)
        return cls(
            members=tuple(sorted(members, key=lambda member: member.cost)),
            edges=() if by_hand else tuple(spec.get("edges", ())),
            empty_bins=() if by_hand else tuple(spec.get("empty_bins", ())),
        )


def _read_member(
    entry: Any, cost: Callable[[SubNetwork], float], layer_order: Sequence[int]
) -> GridMember:
    sizes, score = entry, None
    if isinstance(entry, dict):
        sizes, score = entry.get("subnetwork", entry), entry.get("score")
    if isinstance(sizes, dict):
        sizes = {n: size for n, size in sizes.items() if n not in ("cost", "score", "name")}
    sub = SubNetwork.from_dict(sizes, layer_order)
    return GridMember(sub, cost(sub), score)


def build_grid(
    space: SearchSpace,
    cost: Callable[[SubNetwork], float],
    *,
    seed: int,
    num_bins: int = 22,
    trials_per_bin: int = 10_000,
    score: Callable[[SubNetwork], float] | None = None,
    candidates_per_bin: int = 50,
) -> Grid:
    """One sub-network per bin, K equal bins between the cost of the smallest and the largest.

    Rejection sampling: a bin takes the first member (or the first `candidates_per_bin` different
    ones) of a stream of random members of the space that falls into it. All bins watch the same
    stream: what each gets has the same distribution as from a stream of its own, at 1 / K of the
    draws. A bin into which none of `trials_per_bin` members falls stays empty.

    Args:
        space: where the members come from.
        cost: of a sub-network, e.g. its number of parameters.
        seed: of the draws.
        num_bins: K.
        trials_per_bin: members of the space that a bin sees at most.
        score: keeps the candidate of a bin with the highest score; None keeps the first.
        candidates_per_bin: how many compete where there is a score.

    Raises:
        ConfigError: if a number is out of range.
    """
    for name, value in [("num_bins", num_bins), ("trials_per_bin", trials_per_bin)]:
        if value < 1:
            raise ConfigError(f"sampler.{name}={value} must be at least 1")
    wanted = 1 if score is None else max(1, candidates_per_bin)
    edges = bin_edges(cost(space.smallest), cost(space.largest), num_bins)
    bins = _fill(space, cost, edges, wanted, trials_per_bin, random.Random(f"grid/{seed}"))
    members = tuple(_best(found, score) for found in bins if found)
    empty = tuple(number for number, found in enumerate(bins) if not found)
    return Grid(members, tuple(edges), empty)


def bin_edges(low: float, high: float, num_bins: int) -> list[float]:
    """Limits of `num_bins` equal bins between two costs."""
    return [low + (high - low) * i / num_bins for i in range(num_bins)] + [high]


def bin_of(cost: float, edges: Sequence[float]) -> int:
    """Number of the bin that a cost falls into; the last bin includes its upper limit."""
    return min(max(bisect_right(edges, cost) - 1, 0), len(edges) - 2)


def _fill(
    space: SearchSpace,
    cost: Callable[[SubNetwork], float],
    edges: Sequence[float],
    wanted: int,
    trials: int,
    rng: random.Random,
) -> list[list[GridMember]]:
    """Up to `wanted` different candidates per bin."""
    bins: list[list[GridMember]] = [[] for _ in edges[1:]]
    unfilled = len(bins)
    seen: set[SubNetwork] = set()
    for _ in range(trials):
        sub = space.sample(rng)
        if sub in seen:
            continue
        seen.add(sub)
        price = cost(sub)
        found = bins[bin_of(price, edges)]
        if len(found) < wanted:
            found.append(GridMember(sub, price))
            unfilled -= len(found) == wanted
            if not unfilled:
                break
    return bins


def _best(found: list[GridMember], score: Callable[[SubNetwork], float] | None) -> GridMember:
    if score is None:
        return found[0]
    scored = [GridMember(member.sub, member.cost, score(member.sub)) for member in found]
    return max(scored, key=lambda member: member.score or 0.0)
