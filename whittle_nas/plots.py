"""Pictures: one function each, from plain numbers to a file. The only place for matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whittle_nas.space.words import axis, words
from whittle_nas.weights.files import atomic_file

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
COLOURS = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_STAR = {"marker": "*", "s": 190, "color": "black", "zorder": 5}  # the whole model


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

    Heads and neurons are shown as shares of their layer's highest score: layers are sorted each for
    itself, and their scores are not comparable.

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
    ranks = [layer_order.index(layer) + 1 for layer in range(len(layers))]
    bars = left.bar(range(len(layers)), layers, color=BLUE, label=f"a bar: {layer_label}")
    if len(layers) <= 40:
        left.bar_label(bars, labels=[str(rank) for rank in ranks], fontsize=8)
        left.plot([], [], " ", label="its number: rank, 1 is kept longest")
    left.margins(y=0.3)  # room for the legend
    left.legend(fontsize=8, loc="upper left", handlelength=1)
    left.set(xlabel="layer", ylabel="score", title="layers")
    shares = [[head / (max(row) or 1.0) for head in row] for row in heads]
    image = middle.imshow(
        shares, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=1
    )
    figure.colorbar(image, ax=middle, label="share of the layer's highest score")
    middle.set(xlabel="head", ylabel="layer", title="attention heads")
    for layer, scores in enumerate(neurons):
        falling = sorted(scores, reverse=True)
        shade = 0.15 + 0.75 * layer / max(1, len(neurons) - 1)
        right.plot(
            [100 * (i + 1) / len(falling) for i in range(len(falling))],
            [score / (falling[0] or 1.0) for score in falling],
            color=str(shade),
            label=f"layer {layer}" if layer in (0, len(neurons) - 1) else None,
        )
    right.set(xlabel="neurons, % of the layer, best first", title="MLP neurons")
    right.set_ylabel("share of the layer's highest score")
    right.legend(title="dark to light", fontsize=8)
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
    label, unit = axis("num_params", num_params)
    at = [count / unit for count in num_params]
    axes.vlines(at, before, after, color="0.85", linewidth=0.8, zorder=1)
    axes.scatter(at, before, s=14, color=ORANGE, marker="s", label="before")
    axes.scatter(at, after, s=14, color=BLUE, label="after sorting")
    axes.axhline(full_perplexity, color="black", linewidth=0.8, linestyle=":", label="whole model")
    axes.set(xlabel=label, ylabel="perplexity", yscale="log", title=title)
    axes.legend()
    _save(figure, path)


def plot_front(
    path: Path,
    *,
    objectives: Sequence[str],
    trials: Any,
    front: Any,
    hypervolume: Sequence[float],
    original: Mapping[str, float] | None = None,
) -> None:
    """Trials and their front, one panel per cost, and how the front grew.

    Args:
        path: picture to write.
        objectives: M names, all minimised; the first one is drawn upwards.
        trials: (N, M) values of all trials.
        front: (K, M) values of the front.
        hypervolume: dominated share of the objectives' range after each trial.
        original: metrics of the whole model, a star.
    """
    from matplotlib.figure import Figure

    costs = range(1, len(objectives))
    figure = Figure(figsize=(5.6 * (len(costs) + 1), 4.4), layout="constrained")
    panels = figure.subplots(1, len(costs) + 1)
    for cost, panel in zip(costs, panels[:-1], strict=True):
        _draw_front(panel, objectives, cost, trials, front, original or {})
    panels[0].legend()
    panels[-1].plot(range(1, len(hypervolume) + 1), hypervolume, color=BLUE, drawstyle="steps-post")
    panels[-1].set(xlabel="trials", ylabel="dominated share of the objectives' range")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def _draw_front(
    panel: Any,
    objectives: Sequence[str],
    cost: int,
    trials: Any,
    front: Any,
    original: Mapping[str, float],
) -> None:
    name, quality = objectives[cost], objectives[0]
    whole = original.get(name), original.get(quality)
    known = [value for value in (whole[0],) if value is not None]
    label, unit = axis(name, [*_columns(trials, cost)[0], *_columns(front, cost)[0], *known])
    x, y = _columns(trials, cost)
    panel.scatter([v / unit for v in x], y, s=12, color="0.75", label="trials")
    x, y = _columns(front, cost)
    line = "-" if len(objectives) == 2 else "none"  # a front of three objectives is none
    style = {"linestyle": line, "marker": "o", "drawstyle": "steps-post"}
    panel.plot([v / unit for v in x], y, color=BLUE, label="front", **style)
    if whole[0] is not None and whole[1] is not None:
        panel.scatter([whole[0] / unit], [whole[1]], label="whole model", **_STAR)
        if name.startswith("num_params"):
            _add_percent(panel, whole[0] / unit)
    # Tiny sub-networks may be hundreds of times worse; they would flatten the picture.
    if min(y) > 0 and max(y) > 20 * min(y):
        panel.set_yscale("log")
    panel.set(xlabel=label, ylabel=words(quality))


def _add_percent(panel: Any, whole: float) -> None:
    """A second scale above: percent of the whole model."""
    ways = (lambda value: 100 * value / whole, lambda percent: percent * whole / 100)
    panel.secondary_xaxis("top", functions=ways).set_xlabel("% of the whole model")


def _columns(points: Any, cost: int) -> tuple[list[float], list[float]]:
    """One cost and the first objective of points (N, M), by rising cost."""
    pairs = sorted((float(point[cost]), float(point[0])) for point in points)
    return [x for x, _ in pairs], [y for _, y in pairs]


def plot_training(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    untouched: float | None = None,
    num_params: Mapping[str, int] | None = None,
) -> None:
    """Losses of a super-network training, from its logs.

    Args:
        path: picture to write.
        curves: (optimiser step, value) by name, as the loggers name them: `train/ce_full`,
            `val/grid_0`, ...
        untouched: validation loss of the model before the training, a line across.
        num_params: parameters of the validated networks, by which the legend calls them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    sizes = num_params or {}
    for axes, prefix, title in zip(
        panels, ("train/ce_", "val/"), ("training, by role", "validation, by network"), strict=True
    ):
        names = [name[len(prefix) :] for name in curves if name.startswith(prefix)]
        if prefix == "val/":
            names.sort(key=lambda name: -sizes.get(name, 0))
        for name, colour in zip(names, itertools.cycle(COLOURS), strict=False):
            points = curves[prefix + name]
            mark = "." if len(points) < 30 else ""
            label = _sized(name, sizes) if prefix == "val/" else name
            axes.plot(*zip(*points, strict=True), marker=mark, color=colour, label=label)
        if untouched is not None and prefix == "val/":
            axes.axhline(untouched, color="black", linestyle="--", linewidth=1, label="untouched")
        axes.set(xlabel="optimiser step", ylabel="cross entropy, nats per token", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:  # beside the curves, which fill the panel
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def _sized(name: str, num_params: Mapping[str, int]) -> str:
    """A validated network by its size: `grid_1` says nothing."""
    if name not in num_params:
        return name
    count, whole = num_params[name], max(num_params.values())
    label, unit = axis("num_params", [count])
    unit_word = label.partition(", ")[2] or "parameters"
    return f"{count / unit:.3g} {unit_word}, {100 * count / whole:.0f} %"


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
    stderrs: Sequence[float | None],
    stars: Sequence[bool] = (),
) -> None:
    """One task's score of N sub-networks against their costs, one panel per cost.

    Args:
        path: picture to write.
        title: the task.
        metric: name of the score.
        labels: N names of the sub-networks.
        costs: N values of each cost, by its name and unit.
        values: N scores.
        stderrs: their standard errors, drawn as bars of one standard error to each side; None
            where there is none, as of a perplexity.
        stars: N times whether it is the whole model.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(costs), 4.4), layout="constrained")
    panels = figure.subplots(1, len(costs), squeeze=False)[0]
    for panel, (cost, at) in zip(panels, costs.items(), strict=True):
        across, unit = axis("num_params", at) if cost == "parameters" else (cost, 1.0)
        at = [value / unit for value in at]
        bars = [error or 0.0 for error in stderrs] if any(stderrs) else None
        panel.errorbar(at, values, yerr=bars, fmt="o", color=BLUE, capsize=3)
        for x, y in itertools.compress(zip(at, values, strict=True), stars):
            panel.scatter([x], [y], **_STAR)
        if len(labels) <= 20:  # more would hide the points
            for label, x, y in zip(labels, at, values, strict=True):
                panel.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        panel.margins(x=0.15)  # room for the names
        meaning = " (bars: one standard error)" if any(stderrs) else ""
        panel.set(xlabel=across, ylabel=words(metric) + meaning, title=title)
        panel.grid(alpha=0.3)
    _save(figure, path)


def plot_shapes(
    path: Path, shapes: Mapping[str, Sequence[tuple[float, float]]], *, whole: Sequence[Any]
) -> None:
    """What networks keep of every layer: heads upwards, neurons downwards, hatched where all.

    Args:
        path: picture to write.
        shapes: shares of head channels and neurons of every layer, by the network's name.
        whole: blocks of the whole model, whose sizes the ends of the scale are.
    """
    from matplotlib.figure import Figure

    width = min(4 + 0.25 * len(whole), 14)
    figure = Figure(figsize=(width, 0.6 + 1.7 * len(shapes)), layout="constrained")
    heads = max((block.n_head for block in whole), default=0)
    neurons = max((block.intermediate_size for block in whole), default=0)
    panels = figure.subplots(len(shapes), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (name, layers) in zip(panels, shapes.items(), strict=True):
        for part, (colour, sign) in enumerate(((BLUE, 1), (ORANGE, -1))):
            at = range(len(layers))
            bars = panel.bar(at, [sign * layer[part] for layer in layers], color=colour)
            for bar, layer in zip(bars, layers, strict=True):
                if layer[part] == 1:
                    bar.set(hatch="////", facecolor="white", edgecolor=colour)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(ylim=(-1.1, 1.1), yticks=(-1, 0, 1), title=name)
        panel.set_yticklabels((f"{neurons} neurons", "0", f"{heads} heads"))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3, axis="y")
    panels[-1].set_xlabel("layer (hatched: as in the whole model)")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a picture whole or not at all: an earlier one may have the name."""
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
