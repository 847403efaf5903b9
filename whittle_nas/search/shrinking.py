"""Networks for some budgets, of which each is searched for inside the one that was trained before.

A network that is cut from a larger trained one starts from all that the larger has learnt. Searched
for beforehand, networks of neighbouring budgets are seldom parts of each other; here they always
are. NetAdapt (Yang et al. 2018, Algorithm 1) shrinks a network in such steps, one layer at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from whittle_nas.errors import ConfigError
from whittle_nas.search.constraints import Cost, check_attainable, excess_function
from whittle_nas.search.objectives import ANALYTIC, MEASURED, is_cost
from whittle_nas.space.front import Constraint, parse_constraints
from whittle_nas.space.searchspace import DIMENSIONS, SearchSpace
from whittle_nas.space.subnetwork import SubNetwork

_DRAWS = 4096  # members that are drawn for a budget
_NEAR = 0.95  # of a limit, from where on a network makes use of it


@dataclass(frozen=True)
class Shrinking:
    """Which networks are tried for each budget.

    Attributes:
        space: where networks come from; all layers have the same sizes.
        limits: of every budget by its name, in numbers.
        cost: value of a cost of a sub-network.
        candidates: networks that are tried for a budget.
        seed: of what is drawn.
    """

    space: SearchSpace
    limits: Mapping[str, tuple[Constraint, ...]]
    cost: Cost
    candidates: int
    seed: int

    @classmethod
    def of(
        cls,
        space: SearchSpace,
        budgets: Mapping[str, str],
        cost: Cost,
        *,
        candidates: int,
        seed: int,
    ) -> Shrinking:
        """Read budgets.

        Args:
            space: where networks come from.
            budgets: of `parse_budgets`.
            cost: value of a cost of a sub-network.
            candidates: networks that are tried for a budget.
            seed: of what is drawn.

        Raises:
            ConfigError: for a limit on anything but a cost, a lower limit, a budget that no network
                of the space keeps, and a space whose layers differ.
        """
        if space.per_layer:
            raise ConfigError(
                "--budgets shrinks all layers alike, and the search space has sizes per layer: "
                "name another --search_space, or choose networks with nas search --method ilp and "
                "train them as --subnetworks"
            )
        limits = {}
        for name, text in budgets.items():
            parsed = parse_constraints(text, option="--budgets")
            for limit in parsed:
                if not is_cost(limit.metric) or limit.relation[0] != "<":
                    raise ConfigError(
                        f"--budgets: {limit} must be an upper limit on one of "
                        f"{', '.join((*ANALYTIC, *MEASURED))}"
                    )
            whole = {limit.metric: cost(space.full, limit.metric) for limit in parsed}
            limits[name] = tuple(limit.resolved(whole, "--budgets") for limit in parsed)
        for name, parsed in limits.items():
            if not parsed:
                raise ConfigError(f"--budgets: {name} has no limit")
            check_attainable(space, parsed, cost, option="--budgets")
        return cls(space, limits, cost, candidates, seed)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the budgets, the largest first."""
        return tuple(sorted(self.limits, key=self._size, reverse=True))

    def _size(self, name: str) -> float:
        full = self.space.full
        return min(limit.limit / self.cost(full, limit.metric) for limit in self.limits[name])

    def largest(self) -> dict[str, SubNetwork]:
        """For every budget the network of most parameters, if each has the one before it.

        Raises:
            ConfigError: as `members`.
        """
        found, larger = {}, self.space.full
        for name in self.names:
            members = self.members(name, larger)
            found[name] = larger = max(members, key=lambda sub: self.cost(sub, "num_params"))
        return found

    def keeps(self, name: str, sub: SubNetwork) -> bool:
        """Whether a network is under the limits of a budget."""
        return not excess_function(self.limits[name], self.cost)(sub)

    def is_member(self, name: str, sub: SubNetwork) -> bool:
        """Whether a network is one of the space, and under the limits of a budget."""
        return self.space.contains(sub) and self.keeps(name, sub)

    def members(self, name: str, larger: SubNetwork) -> list[SubNetwork]:
        """Networks to try for a budget.

        Those that are smaller in one dimension alone come first; the others are drawn from the
        parts of the larger network that make use of the budget.

        Args:
            name: of the budget.
            larger: what they are parts of; if it is a member and under the budget itself, it is
                the only one.

        Raises:
            ConfigError: if no part of it is found under the limits.
        """
        rng = random.Random(f"{self.seed} {name}")
        space = parts_of(self.space, larger)

        def fits(sub: SubNetwork | None) -> bool:
            inside = sub is not None and sub.within(larger) is not None
            return sub is not None and inside and self.is_member(name, sub)

        if fits(larger):
            return [larger]
        alone = _smaller_in_one(space, fits)
        # The smallest is a part of every member: a budget that it keeps is always within reach.
        members = [space.smallest, *(space.sample(rng) for _ in range(_DRAWS))]
        drawn = dict.fromkeys(filter(fits, members))
        others = [sub for sub in drawn if sub not in alone]
        if not alone and not others:
            limits = " and ".join(map(str, self.limits[name]))
            raise ConfigError(
                f"--budgets {limits}: no network of the search space was found that is under it "
                f"and a part of {larger}; name a larger budget, or another --search_space"
            )
        if len(alone) > self.candidates:
            return rng.sample(alone, self.candidates)
        wanted = self.candidates - len(alone)
        near = [sub for sub in others if self._used(name, sub) >= _NEAR]
        if len(near) < wanted:
            near = sorted(others, key=lambda sub: -self._used(name, sub))[:wanted]
        return [*alone, *rng.sample(near, min(wanted, len(near)))]

    def _used(self, name: str, sub: SubNetwork) -> float:
        """How much of the tightest limit a network takes."""
        return max(self.cost(sub, limit.metric) / limit.limit for limit in self.limits[name])


def parts_of(space: SearchSpace, larger: SubNetwork) -> SearchSpace:
    """The members of a space whose sizes are at most those of a network with equal layers."""
    own = larger.sizes()
    assert own is not None
    sizes = {**own, "mlp_ratio": float("inf")}  # the width follows from it; `within` looks at that
    cut = {}
    for name in DIMENSIONS:
        domain = getattr(space, name)
        if domain is not None:
            values = tuple(value for value in domain.values if value <= sizes[name])
            cut[name] = replace(domain, values=values or domain.values[:1])
    return replace(space, **cut)


def _smaller_in_one(
    space: SearchSpace, fits: Callable[[SubNetwork | None], bool]
) -> list[SubNetwork]:
    """For each dimension the largest size with which the largest member, otherwise whole, fits."""
    genes = space.genes(space.largest)
    found: list[SubNetwork] = []
    for name, values in space.dimensions().items():
        subs = (space.build(**{**genes, name: value}) for value in reversed(values))
        found += [sub for sub in [next(filter(fits, subs), None)] if sub is not None]
    return list(dict.fromkeys(found))
