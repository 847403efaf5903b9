"""Successive halving without rounds: each trial is told beforehand which loss is too high.

The bound depends on the costs of the trial and on results that are known when it is proposed, so a
worker needs no second instruction and the trials stay repeatable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from whittle_nas.search.trials import Status, Trial

FIRST = "first_val_loss"  # loss on the first blocks, of every trial


def bound(
    costs: Mapping[str, float], told: Sequence[Trial], names: Sequence[str], *, keep: float
) -> float:
    """Highest loss on the first blocks with which a trial goes on to all blocks.

    That is the lowest loss among trials that cost no more, plus a slack: the `keep` quantile of how
    far trials have been above that. A trial below all cheaper ones always goes on.

    Args:
        costs: of the new trial.
        told: finished trials.
        names: which costs count.
        keep: share of the trials, in the long run.
    """
    seen = [trial for trial in told if FIRST in trial.metrics]
    if not seen or not names:
        return math.inf
    losses = np.array([trial.metrics[FIRST] for trial in seen])
    prices = np.array([[trial.metrics[name] for name in names] for trial in seen])  # (N, C)
    new = np.array([costs[name] for name in names])
    no_dearer = (prices <= new).all(axis=1)
    if not no_dearer.any():
        return math.inf
    gaps = []
    for at, price in enumerate(prices):
        others = (prices <= price).all(axis=1)
        others[at] = False
        if others.any():
            gaps.append(losses[at] - losses[others].min())
    slack = max(0.0, float(np.quantile(gaps, keep))) if gaps else math.inf
    return float(losses[no_dearer].min()) + slack


def completed(trial: Trial, told: Sequence[Trial], objectives: Sequence[str]) -> dict[str, float]:
    """Objectives of a trial for the searcher; those of a stopped one as they would have become.

    The loss on all blocks is the loss on the first ones plus the median difference of both in the
    trials that saw all.
    """
    if trial.status is not Status.stopped:
        return {name: trial.metrics[name] for name in objectives}
    differences = [
        other.metrics["val_loss"] - other.metrics[FIRST]
        for other in told
        if other.status is Status.complete and FIRST in other.metrics
    ]
    loss = trial.metrics[FIRST] + (float(np.median(differences)) if differences else 0.0)
    found = {**trial.metrics, "val_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return {name: found[name] for name in objectives}
