"""Pictures: one function each, from plain numbers to a file. The only place for matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whittle_nas.weights.files import atomic_file


def plot_importance(
    path: Path,
    *,
    layers: Sequence[float],
    layer_label: str,
    layer_order: Sequence[int],
    heads: Any,
    neurons: Any,
) -> None:
    """Which layers and heads carry the model, and how unequal its neurons are.

    Args:
        path: picture to write.
        layers: (L,) score of every layer by the criterion that orders them.
        layer_label: that criterion and its unit.
        layer_order: layer ids, most important first.
        heads: (L, H) head scores.
        neurons: (L, F) neuron scores.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    bars = left.bar(range(len(layers)), layers, color="tab:blue")
    ranks = [layer_order.index(layer) + 1 for layer in range(len(layers))]
    if len(layers) <= 40:
        left.bar_label(bars, labels=[str(rank) for rank in ranks], fontsize=8)
    left.set(xlabel="layer", ylabel=layer_label, title="layers, with their rank")
    image = middle.imshow(heads, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=middle, label="score")
    middle.set(xlabel="head", ylabel="layer", title="attention heads")
    for layer, scores in enumerate(neurons):
        falling = sorted(scores, reverse=True)
        shade = 0.15 + 0.75 * layer / max(1, len(neurons) - 1)
        right.plot(
            [(i + 1) / len(falling) for i in range(len(falling))],
            [score / (falling[0] or 1.0) for score in falling],
            color=str(shade),
            label=f"layer {layer}" if layer in (0, len(neurons) - 1) else None,
        )
    right.set(xlabel="share of neurons", ylabel="score / highest", title="neurons, sorted")
    right.legend()
    _save(figure, path)


def plot_before_after(
    path: Path,
    *,
    num_params: Sequence[int],
    before: Sequence[float],
    after: Sequence[float],
    full_perplexity: float,
    title: str,
) -> None:
    """Perplexity of sub-networks against their parameters, before and after sorting.

    Args:
        path: picture to write.
        num_params: parameters of every sub-network.
        before: perplexities before sorting.
        after: perplexities after sorting.
        full_perplexity: perplexity of the whole model.
        title: what is shown.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.vlines(num_params, before, after, color="0.85", linewidth=0.8, zorder=1)
    axes.scatter(num_params, before, s=14, color="tab:gray", label="before")
    axes.scatter(num_params, after, s=14, color="tab:blue", label="after sorting")
    axes.axhline(full_perplexity, color="black", linewidth=0.8, linestyle=":", label="whole model")
    axes.set(xlabel="parameters", ylabel="perplexity", yscale="log", title=title)
    axes.legend()
    _save(figure, path)


def plot_front(
    path: Path,
    *,
    objectives: Sequence[str],
    trials: Any,
    front: Any,
    hypervolume: Sequence[float],
) -> None:
    """Trials and their front, one panel per cost, and how the front grew.

    Args:
        path: picture to write.
        objectives: M names, all minimised; the first one is drawn upwards.
        trials: (N, M) values of all trials.
        front: (K, M) values of the front.
        hypervolume: dominated share of the objectives' range after each trial.
    """
    from matplotlib.figure import Figure

    costs = range(1, len(objectives))
    figure = Figure(figsize=(5.6 * (len(costs) + 1), 4.4), layout="constrained")
    panels = figure.subplots(1, len(costs) + 1)
    for cost, panel in zip(costs, panels[:-1], strict=True):
        panel.scatter(*_columns(trials, cost), s=12, color="0.75", label="trials")
        x, y = _columns(front, cost)
        line = "-" if len(objectives) == 2 else "none"  # a front of three objectives is none
        style = {"linestyle": line, "marker": "o", "drawstyle": "steps-post"}
        panel.plot(x, y, color="tab:blue", label="front", **style)
        # Tiny sub-networks may be hundreds of times worse; they would flatten the picture.
        if min(y) > 0 and max(y) > 20 * min(y):
            panel.set_yscale("log")
        panel.set(xlabel=objectives[cost], ylabel=objectives[0])
        panel.legend()
    panels[-1].plot(range(1, len(hypervolume) + 1), hypervolume, color="tab:blue")
    panels[-1].set(xlabel="trials", ylabel="dominated share of the objectives' range")
    _save(figure, path)


def _columns(points: Any, cost: int) -> tuple[list[float], list[float]]:
    """One cost and the first objective of points (N, M), by rising cost."""
    pairs = sorted((float(point[cost]), float(point[0])) for point in points)
    return [x for x, _ in pairs], [y for _, y in pairs]


def plot_training(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    untouched: float | None = None,
) -> None:
    """Losses of a super-network training, from its logs.

    Args:
        path: picture to write.
        curves: (optimiser step, value) by name, as the loggers name them: `train/ce_full`,
            `val/grid_0`, ...
        untouched: validation loss of the model before the training, a line across.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, prefix, title in zip(
        panels, ("train/ce_", "val/"), ("training, by role", "validation, by network"), strict=True
    ):
        for name in (name for name in curves if name.startswith(prefix)):
            points = curves[name]
            mark = "." if len(points) < 30 else ""
            axes.plot(*zip(*points, strict=True), marker=mark, label=name[len(prefix) :])
        if untouched is not None and prefix == "val/":
            axes.axhline(untouched, color="black", linestyle="--", linewidth=1, label="untouched")
        axes.set(xlabel="optimiser step", ylabel="cross entropy, nats per token", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    _save(figure, path)


def plot_sweep(
    path: Path, *, losses: Mapping[str, Sequence[tuple[int, float]]], limit: float
) -> None:
    """Loss of a model that is smaller in one dimension only.

    Args:
        path: picture to write.
        losses: (size, nats per token) by dimension.
        limit: loss up to which a network lives.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, points in losses.items():
        full = max(size for size, _ in points)
        x = [100 * size / full for size, _ in points]
        axes.plot(x, [loss for _, loss in points], marker=".", label=name)
    axes.axhline(limit, color="black", linestyle="--", linewidth=1, label="limit")
    axes.set(xlabel="% of the whole model's size", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_scores(
    path: Path,
    *,
    title: str,
    metric: str,
    labels: Sequence[str],
    costs: Mapping[str, Sequence[float]],
    values: Sequence[float],
    stderrs: Sequence[float],
) -> None:
    """One task's score of N sub-networks against their costs, one panel per cost.

    Args:
        path: picture to write.
        title: the task.
        metric: name of the score.
        labels: N names of the sub-networks.
        costs: N values of each cost, by its name and unit.
        values: N scores.
        stderrs: their standard errors, drawn as bars of one standard error to each side.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(costs), 4.4), layout="constrained")
    panels = figure.subplots(1, len(costs), squeeze=False)[0]
    for panel, (cost, at) in zip(panels, costs.items(), strict=True):
        panel.errorbar(at, values, yerr=stderrs, fmt="o", color="tab:blue", capsize=3)
        if len(labels) <= 20:  # more would hide the points
            for label, x, y in zip(labels, at, values, strict=True):
                panel.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        panel.margins(x=0.15)  # room for the names
        panel.set(xlabel=cost, ylabel=f"{metric} (bars: standard error)", title=title)
        panel.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a picture whole or not at all: an earlier one may have the name."""
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
