"""A search space of which only the members of a range of costs count.

No product of sizes can say that: a network of full width may lose half of its layers, or the other
way round, but not both. So members are drawn from the space until one lies in the range.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property

from whittle_nas.errors import ConfigError
from whittle_nas.space.front import parse_amount
from whittle_nas.space.searchspace import SearchSpace
from whittle_nas.space.subnetwork import SubNetwork

_DRAWS = 4096  # of which one must lie in the range, and among which the ends are looked for


@dataclass(frozen=True)
class LimitedSpace(SearchSpace):
    """Members of a space whose cost lies in a range.

    Attributes:
        cost: of a sub-network, e.g. its number of parameters.
        low: least cost.
        high: highest cost.
    """

    cost: Callable[[SubNetwork], float] = field(kw_only=True)
    low: float = field(kw_only=True)
    high: float = field(kw_only=True)

    def _holds(self, sub: SubNetwork) -> bool:
        return self.low <= self.cost(sub) <= self.high

    def sample(self, rng: random.Random) -> SubNetwork:
        """One member in the range; every choice uniform, given that.

        Raises:
            ConfigError: if there seems to be none.
        """
        draws = (super(LimitedSpace, self).sample(rng) for _ in range(_DRAWS))
        found = next(filter(self._holds, draws), None)
        if found is None:
            raise ConfigError(
                f"sampler.num_params: none of {_DRAWS} members of the search space has between "
                f"{self.low:,.0f} and {self.high:,.0f} parameters"
            )
        return found

    def neighbours(self, sub: SubNetwork) -> list[SubNetwork]:
        """Members in the range one step away from `sub` in one dimension."""
        return list(filter(self._holds, super().neighbours(sub)))

    def contains(self, sub: SubNetwork) -> bool:
        """Whether `sub` is a member, in the range."""
        return super().contains(sub) and self._holds(sub)

    @cached_property
    def _ends(self) -> tuple[SubNetwork, SubNetwork]:
        """The cheapest and the dearest of the space's own ends and of many draws."""
        rng = random.Random("ends of a range")
        drawn = [self.sample(rng) for _ in range(_DRAWS // 16)]
        known = [*filter(self._holds, (super().smallest, super().largest)), *drawn]
        return min(known, key=self.cost), max(known, key=self.cost)

    @property
    def smallest(self) -> SubNetwork:
        """The cheapest member that is known."""
        return self._ends[0]

    @property
    def largest(self) -> SubNetwork:
        """The dearest member that is known."""
        return self._ends[1]


def limited(
    space: SearchSpace, cost: Callable[[SubNetwork], float], given: str | None
) -> SearchSpace:
    """The members of a space within a range such as `40%..90%` or `1e6..5e6`; None: all.

    Args:
        space: where the members come from.
        cost: of a sub-network; shares are of what the whole model has.
        given: the range; an end that is left out does not limit.

    Raises:
        ConfigError: if the range can't be read, is empty, or holds no member.
    """
    if given is None:
        return space
    low, high = read_range(given, cost(space.full))
    own = {one.name: getattr(space, one.name) for one in fields(space)}
    found = LimitedSpace(**own, cost=cost, low=low, high=high)
    found.sample(random.Random(0))
    return found


def read_range(given: str, whole: float) -> tuple[float, float]:
    """Ends of a range such as `40%..90%`, `1e6..` or `..0.9x`, where `whole` is 100 %.

    Raises:
        ConfigError: if it can't be read or is empty.
    """
    words = given.split("..")
    try:
        if len(words) != 2 or not any(words):
            raise ValueError
        low, high = (_amount(word.strip(), whole) for word in words)
    except ValueError:
        raise ConfigError(
            f"sampler.num_params={given!r} must be a range such as 40%..90%, 1e6..5e6 or ..0.9x"
        ) from None
    low, high = 0.0 if low is None else low, float("inf") if high is None else high
    if not low <= high:
        raise ConfigError(f"sampler.num_params={given!r} is empty: its lower end comes first")
    return low, high


def _amount(word: str, whole: float) -> float | None:
    if not word:
        return None
    value, is_share = parse_amount(word)
    return value * whole if is_share else value
