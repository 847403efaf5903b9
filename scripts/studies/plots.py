"""Curves with their spread, the picture that all studies share."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

Point = tuple[float, float, float]  # where, mean over the seeds, their standard deviation


@dataclass(frozen=True)
class Panel:
    """One panel: its words, and points by the name of a curve."""

    title: str
    xlabel: str
    ylabel: str
    curves: Mapping[str, Sequence[Point]]
    log: bool = False
    stairs: bool = (
        False  # what was measured across does not rise with the size: draw the best so far
    )
    falling: bool = True  # whether lower is better


def mean_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation; one value has no spread."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def shown(values: Iterable[float], digits: int = 3, scale: float = 1.0) -> str:
    """`mean +- standard deviation`."""
    mean, spread = mean_spread(scale * value for value in values)
    return f"{mean:.{digits}f} +- {spread:.{digits}f}"


def plot_curves(path: Path, panels: Sequence[Panel], columns: int = 3) -> None:
    """All panels in one picture; the same name has the same colour and is explained once."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    for panel, ax in zip(panels, axes, strict=False):
        for name, points in panel.curves.items():
            color = f"C{names.index(name) % 10}"
            x, mean, spread = zip(*sorted(points), strict=True)
            if panel.stairs:
                best = min if panel.falling else max
                ax.plot(x, mean, ".", color=color)
                so_far = list(itertools.accumulate(mean, best))
                ax.plot(x, so_far, color=color, drawstyle="steps-post", label=name)
                continue
            ax.plot(x, mean, marker=".", color=color, label=name)
            low, high = ([m + s * d for m, d in zip(mean, spread, strict=True)] for s in (-1, 1))
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        ax.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.log:
            ax.set_yscale("log")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.savefig(path, dpi=110)
