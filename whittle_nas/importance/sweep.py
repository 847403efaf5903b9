"""How far each dimension alone can shrink before a sorted model is lost: a space that fits it.

Half of everything is a desert on a real model: networks that guess no better than at random, on
which training spends its passes and a search its trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whittle_nas.progress import Progress, no_progress
from whittle_nas.space import SubNetwork, load_space
from whittle_nas.weights.supernet import SuperNetwork

# What is swept, and the sizes that are looked at: those of the space `aligned`, down to the least.
DIMENSIONS: dict[str, Any] = {
    "n_embd": {"min": 1, "max": "full", "step": "auto"},
    "n_head": {"min": 1, "max": "full"},
    "intermediate_size": {"min": 1, "max": "full", "step": "auto"},
    "n_layer": {"min": 1, "max": "full"},
}
_STEPS = 8  # equal steps from the whole model down to nothing
Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Sweep:
    """Losses of a model that is smaller in one dimension only.

    Attributes:
        losses: (size, nats per token) by dimension, the largest size first, down to the first that
            is above the limit.
        limit: nats per token up to which a network counts as alive.
        limits: the same by dimension, where they differ.
        space: the sizes that live, as a search space.
    """

    losses: dict[str, Points]
    limit: float
    space: dict[str, Any]
    limits: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain form for `supernet.yaml`."""
        losses = {name: [list(point) for point in points] for name, points in self.losses.items()}
        limits = {"limits": dict(self.limits)} if self.limits else {}
        return {"limit": self.limit, **limits, "losses": losses, "space": self.space}


def sweep(
    supernet: SuperNetwork,
    nats_per_token: Callable[[Any], float],
    *,
    bound: float,
    bounds: Mapping[str, float] | None = None,
    progress: Progress = no_progress,
) -> Sweep:
    """Shrink one dimension after the other.

    Args:
        supernet: the sorted model.
        nats_per_token: measures a litgpt model.
        bound: largest rise of the loss in one dimension, as a share of the way from the whole
            model's loss to that of a uniform guess; so it means the same for every model.
        bounds: of single dimensions instead.
        progress: shows the dimensions.
    """
    config = supernet.config
    whole = nats_per_token(supernet.standalone(supernet.full))
    reach = max(math.log(config.vocab_size) - whole, 0.0)
    limits = {name: whole + share * reach for name, share in (bounds or {}).items()}
    common = whole + bound * reach
    losses: dict[str, Points] = {}
    space: dict[str, Any] = {}
    for name in progress(DIMENSIONS, "sweeping", len(DIMENSIONS)):
        members = _members(supernet, name)
        sizes, limit = list(members), limits.get(name, common)
        points = [(sizes[0], whole)]
        for size in _spread(sizes):
            points.append((size, nats_per_token(supernet.standalone(members[size]))))
            if points[-1][1] > limit:
                break
        losses[name] = tuple(points)
        space[name] = {**DIMENSIONS[name], "min": _smallest(sizes, points, limit)}
    return Sweep(losses, common, space, limits)


def _members(supernet: SuperNetwork, name: str) -> dict[int, SubNetwork]:
    """Sub-networks that differ from the whole in one dimension, by its size, largest first."""
    info = supernet.info
    space = load_space(
        {name: DIMENSIONS[name]},
        supernet.config,
        layer_order=info.layer_order,
        head_channels=info.head_channels,
    )
    found = {int(space.genes(sub)[name]): sub for sub in space.members()}
    return dict(sorted(found.items(), reverse=True))


def _spread(sizes: Sequence[int]) -> list[int]:
    """The sizes next to equal steps from the largest, which itself is left out."""
    full = sizes[0]
    wanted = (full * (1 - step / _STEPS) for step in range(1, _STEPS))
    near = (min(sizes[1:], key=lambda size: abs(size - w)) for w in wanted if len(sizes) > 1)
    return list(dict.fromkeys(near))


def _smallest(sizes: Sequence[int], points: Sequence[tuple[int, float]], limit: float) -> int:
    """The smallest size that lives, interpolated between the last two that were measured."""
    (last, low), (first, high) = points[-2:] if len(points) > 1 else (points[0], points[0])
    if high <= limit:
        return first
    reach = last - (last - first) * (limit - low) / (high - low)
    return min(size for size in sizes if size >= reach)
