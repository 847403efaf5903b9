"""Limits that are known before a sub-network is evaluated, and whether anything satisfies them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.search.objectives import check_metric, is_cost
from whittle_nas.space.front import Constraint, parse_constraints
from whittle_nas.space.searchspace import SearchSpace
from whittle_nas.space.subnetwork import SubNetwork

Cost = Callable[[SubNetwork, str], float]
_LISTED = 20_000  # members of a space that are all tried before we say that none fits
_DRAWS = 200


def read_constraints(text: str | Sequence[str] | None) -> tuple[Constraint, ...]:
    """Read limits on objectives and costs.

    Raises:
        ConfigError: for a malformed limit or an unknown metric.
    """
    limits = parse_constraints(text)
    return tuple(
        replace(limit, metric=check_metric(limit.metric, "--constraints")) for limit in limits
    )


def excess_function(constraints: Sequence[Constraint], cost: Cost) -> Callable[[SubNetwork], float]:
    """How far a sub-network breaks the limits on its costs, 0 if it keeps them.

    Args:
        constraints: all limits; those on quality are left out, they are known too late.
        cost: value of a cost of a sub-network.

    Returns:
        A function: the sum over limits of the excess as a share of the limit.
    """
    known = [limit for limit in constraints if is_cost(limit.metric)]

    def excess(sub: SubNetwork) -> float:
        total = 0.0
        for limit in known:
            if over := limit.excess(cost(sub, limit.metric)):
                total += max(over / max(1.0, abs(limit.limit)), 1e-12)
        return total

    return excess


def check_attainable(
    space: SearchSpace,
    constraints: Sequence[Constraint],
    cost: Cost,
    *,
    option: str = "--constraints",
) -> None:
    """Refuse limits that no member of the space keeps.

    Args:
        space: the sub-networks.
        constraints: all limits.
        cost: value of a cost of a sub-network.
        option: names the flag in messages.

    Raises:
        ConfigError: naming the limit and the nearest value that can be reached.
    """
    known = [limit for limit in constraints if is_cost(limit.metric)]
    for limit in known:
        nearest = _least_excess(space, excess_function([limit], cost))
        value = cost(nearest, limit.metric)
        if limit.excess(value):
            raise ConfigError(
                f"{option} {limit}: no sub-network of the search space satisfies it; the "
                f"nearest attainable value is {value:.6g}"
            )
    if len(known) > 1:
        nearest = _least_excess(space, excess_function(known, cost))
        broken = [limit for limit in known if limit.excess(cost(nearest, limit.metric))]
        if broken:
            values = ", ".join(f"{c.metric} = {cost(nearest, c.metric):.6g}" for c in known)
            together = ", ".join(map(str, known))
            raise ConfigError(
                f"{option} {together}: no sub-network of the search space satisfies them at "
                f"once; the nearest attainable is {values}"
            )


def _least_excess(space: SearchSpace, excess: Callable[[SubNetwork], float]) -> SubNetwork:
    """The member that breaks the limits least: by descent from several members, else by listing."""
    rng = random.Random(0)
    starts = [space.largest, space.smallest, *(space.sample(rng) for _ in range(_DRAWS))]
    best = min(starts, key=excess)
    while excess(best) > 0:
        near = min(space.neighbours(best), key=excess, default=best)
        if excess(near) >= excess(best):
            break
        best = near
    if excess(best) > 0 and space.num_members() <= _LISTED:
        best = min(space.members(), key=excess)
    return best


def untrained_dimensions(space: SearchSpace, trained: SearchSpace) -> list[str]:
    """Dimensions in which a space goes beyond the one that was trained, with an example each."""
    rng = random.Random(0)
    members = [space.smallest, space.largest, *(space.sample(rng) for _ in range(500))]
    found: dict[str, Any] = {}
    for sub in members:
        for block in () if trained.contains(sub) else sub.shapes:
            sizes = {"n_embd": sub.n_embd, **block.to_dict(), "n_layer": sub.n_layer}
            for name, value in sizes.items():
                known = {**(trained.largest.sizes() or {}), name: value}
                if not trained.contains(SubNetwork.uniform(trained.layer_order, **known)):
                    found.setdefault(name, value)
    if beyond := sorted(space.per_layer - trained.per_layer):
        found["per_layer"] = beyond
    return [f"{name}={value}" for name, value in found.items()]
