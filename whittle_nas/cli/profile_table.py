"""`nas profile --table`: measure a latency table ahead of a search, and say how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whittle_nas.cli.common import print_table
from whittle_nas.metrics.latency_parts import Load, Phase
from whittle_nas.metrics.latency_table import LatencyTable, calibration_networks
from whittle_nas.progress import bar
from whittle_nas.space import SearchSpace


def measure_table(
    path: Path, source: Any, space: SearchSpace, load: Load, *, networks: int = 30, seed: int = 1337
) -> None:
    """Time random sub-networks in parts and whole, fit the correction and print what error is left.

    `nas search --costs.latency_table` reads the file, and adds the shapes that it meets.

    Args:
        path: JSON file of the table; times that it holds already are kept.
        source: `weights.checkpoint.Checkpoint` of the super-network.
        space: where the sub-networks come from.
        load: batch, tokens, device and number format.
        networks: how many; at least 4.
        seed: of the draws.
    """
    table = LatencyTable(path, source.config, source.info, load)
    subs = calibration_networks(space, networks, seed)
    rows = []
    for phase in Phase:
        with bar(phase.value, networks) as shown:
            found = table.calibrate(subs, phase, on_progress=shown.update)
        rows.append(
            [
                phase.value,
                found.networks,
                f"{found.sum_error:.1%}",
                f"{found.corrected_error:.1%}",
                f"{found.rank_correlation:.3f}",
            ]
        )
    print_table(
        ["phase", "networks", "error of the sum", "corrected", "rank correlation"],
        rows,
        f"latency table against whole networks (medians), {load.batch} x {load.tokens} tokens",
    )
    print(f"use it with: nas search --costs.latency_table {path}")
