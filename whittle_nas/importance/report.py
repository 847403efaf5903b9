"""Did sorting help? Perplexity of random sub-networks before and after.

RPD = mean_i (ppl_i before - ppl_i after) / ppl_i before, v3's measure of a sort.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from whittle_nas.progress import Progress, no_progress
from whittle_nas.space.searchspace import SearchSpace
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.patch import Patch
from whittle_nas.weights.supernet import SuperNetwork


@dataclass(frozen=True)
class Improvement:
    """Relative perplexity differences over all sub-networks; 0 = no change, 1 = all of it gone."""

    mean: float
    median: float
    quantile_10: float
    quantile_90: float
    share_improved: float
    num_subnetworks: int


@dataclass(frozen=True)
class Report:
    """Perplexities of the same sub-networks before and after sorting.

    Attributes:
        subnetworks: the sizes.
        num_params: parameters of each.
        before: perplexity of each before sorting.
        after: perplexity of each after sorting.
        full_before: perplexity of the whole model before sorting.
        full_after: the same after sorting; equal but for rounding.
    """

    subnetworks: Sequence[SubNetwork]
    num_params: Sequence[int]
    before: Sequence[float]
    after: Sequence[float]
    full_before: float
    full_after: float

    @property
    def rpd(self) -> list[float]:
        """(before - after) / before of each sub-network."""
        return [(b - a) / b for b, a in zip(self.before, self.after, strict=True)]

    @property
    def improvement(self) -> Improvement:
        """RPD, with its spread."""
        return improvement(self.rpd)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        rows = zip(
            self.subnetworks, self.num_params, self.before, self.after, self.rpd, strict=True
        )
        return {
            "rpd": asdict(self.improvement),
            "full_perplexity": {"before": self.full_before, "after": self.full_after},
            "subnetworks": [
                {**sub.to_dict(), "num_params": n, "before": b, "after": a, "rpd": r}
                for sub, n, b, a, r in rows
            ],
        }


def improvement(rpd: Sequence[float]) -> Improvement:
    """Summary of the relative perplexity differences of at least one sub-network."""
    tenths = statistics.quantiles(rpd, n=10, method="inclusive") if len(rpd) > 1 else [rpd[0]]
    return Improvement(
        mean=statistics.fmean(rpd),
        median=statistics.median(rpd),
        quantile_10=tenths[0],
        quantile_90=tenths[-1],
        share_improved=sum(r > 0 for r in rpd) / len(rpd),
        num_subnetworks=len(rpd),
    )


def draw_subnetworks(space: SearchSpace, count: int, *, seed: int) -> list[SubNetwork]:
    """`count` different members of the space, all of them where it has no more."""
    if space.num_members() <= count:
        return list(space.members())
    rng = random.Random(seed)
    drawn: dict[SubNetwork, None] = {}
    for _ in range(1000 * count):  # a log-uniform choice may hardly ever hit the last few members
        drawn[space.sample(rng)] = None
        if len(drawn) == count:
            break
    return list(drawn)


def perplexities(
    supernet: SuperNetwork,
    subnetworks: Sequence[SubNetwork],
    nats_per_token: Callable[[Any], float],
    *,
    patch_of: Callable[[SubNetwork], Patch | None] = lambda _: None,
    label: str = "",
    progress: Progress = no_progress,
) -> list[float]:
    """Perplexity of every sub-network, exp(nats per token).

    Args:
        supernet: sorted or not.
        subnetworks: sizes.
        nats_per_token: measures a litgpt model.
        patch_of: what is special to a sub-network.
        label: of the progress bar.
        progress: shows how far it is.
    """
    found = []
    for sub in progress(subnetworks, label, len(subnetworks)):
        nats = nats_per_token(supernet.standalone(sub, patch_of(sub)))
        # beyond this a float has no exponential; no useful network comes near
        found.append(math.exp(min(nats, 700.0)))
    return found


def make_report(
    subnetworks: Sequence[SubNetwork], before: Sequence[float], after: Sequence[float], config: Any
) -> Report:
    """A report from perplexities of `[full model, *subnetworks]`, before and after."""
    count = parameter_counter(config)
    return Report(
        subnetworks=subnetworks,
        num_params=[count(sub) for sub in subnetworks],
        before=before[1:],
        after=after[1:],
        full_before=before[0],
        full_after=after[0],
    )
