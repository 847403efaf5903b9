"""How two sides are timed against each other."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def in_turn(
    one: Callable[[], Any], other: Callable[[], Any], rounds: int, *, inner: int = 1
) -> dict[str, Any]:
    """Seconds of both, and the median of the ratios of neighbouring runs, after a warm-up.

    Args:
        one: ours.
        other: what it is compared with.
        rounds: how often both run.
        inner: repetitions within one run, so that the clock suffices for short ones.
    """

    def clock(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        for _ in range(inner):
            run()
        return (time.perf_counter() - start) / inner

    for run in (one, other, one, other):
        clock(run)
    pairs = []
    for turn in range(rounds):
        first, second = (one, other) if turn % 2 else (other, one)
        times = {first: clock(first), second: clock(second)}
        pairs.append((times[one], times[other]))
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "other_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
