"""`report.html`: an evaluation as one page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from whittle_nas import page
from whittle_nas.evaluate.report import Score
from whittle_nas.page import Column, Row
from whittle_nas.search.objectives import is_cost
from whittle_nas.space import SubNetwork
from whittle_nas.space.words import words

COSTS = "costs"
SEARCHED = "in the search"


def render(
    checkpoint_dir: str,
    subnetworks: Mapping[str, SubNetwork],
    *,
    whole: SubNetwork,
    costs: Sequence[Mapping[str, float | None]],
    scores: Sequence[Sequence[Score]],
    headlines: Mapping[str, str],
    about: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        checkpoint_dir: the super-network.
        subnetworks: N sub-networks by their name.
        whole: the whole model, a star in the chart where it is one of them.
        costs: of each one, everything known but its scores.
        scores: of each one, all numbers of all tasks.
        headlines: for each task the metric that stands for it.
        about: how it was measured.
    """
    metrics = _metric_columns(scores, headlines)
    known = [_name(s) for row in scores for s in row if headlines.get(s.task) == s.name]
    rows = [
        _row(checkpoint_dir, label, sub, row_costs, row_scores)
        for (label, sub), row_costs, row_scores in zip(
            subnetworks.items(), costs, scores, strict=True
        )
    ]
    sizes = next(iter(subnetworks.values())).summary()
    tasks = dict.fromkeys(score.task for row in scores for score in row)
    report = page.Report(
        title=f"Evaluation of {checkpoint_dir}",
        summary=f"{len(rows)} sub-networks on {', '.join(tasks)}{_errors(rows)}.",
        columns=[*metrics, *_cost_columns(costs), *page.size_columns(sizes)],
        rows=rows,
        x="num_params",
        y=known[0] if known else "num_params",
        original=next(
            (row for row, sub in zip(rows, subnetworks.values(), strict=True) if sub == whole), None
        ),
        details={
            "Questions": _questions(scores),
            "How it was measured": json.dumps(about, indent=1, default=str),
        },
        numbers="results.csv",
    )
    return page.render(report)


def _errors(rows: Sequence[Row]) -> str:
    known = any(error is not None for row in rows for error in row.stderrs.values())
    return "; ± is one standard error" if known else ""


def _name(score: Score) -> str:
    return f"{score.task} {_label(score)}"


def _label(score: Score) -> str:
    return score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"


def _metric_columns(
    scores: Sequence[Sequence[Score]], headlines: Mapping[str, str]
) -> list[Column]:
    """One column per task and metric, tasks together; of each task one column is shown first."""
    found = {_name(score): score for row in scores for score in row}
    tasks = list(dict.fromkeys(score.task for score in found.values()))
    return [
        Column(
            name,
            score.task,
            _label(score),
            lower_is_better=None if score.higher_is_better is None else not score.higher_is_better,
            extra=headlines.get(score.task) != score.name,
        )
        for name, score in sorted(found.items(), key=lambda item: tasks.index(item[1].task))
    ]


def _cost_columns(costs: Sequence[Mapping[str, float | None]]) -> list[Column]:
    """`num_params` and times first; the rest of what a search measured is extra."""
    names = dict.fromkeys(name for row in costs for name, value in row.items() if value is not None)
    return [
        Column(
            name,
            COSTS if is_cost(name) else SEARCHED,
            lower_is_better=True,
            extra=name not in ("num_params", "latency_ms", "decode_ms_per_token"),
            words=words(name),
        )
        for name in sorted(names, key=lambda name: not is_cost(name))
    ]


def _row(
    checkpoint_dir: str,
    label: str,
    sub: SubNetwork,
    costs: Mapping[str, float | None],
    scores: Sequence[Score],
) -> Row:
    # Sizes rather than an index: a front may be searched anew, and not every row is from one.
    choice = page.size_options(sub.to_dict())
    command = page.export_line(checkpoint_dir, choice, f"exported-{label}")
    values = {_name(score): score.value for score in scores}
    stderrs = {_name(score): score.stderr for score in scores}
    return Row(label, {**costs, **sub.summary(), **values}, stderrs, command)


def _questions(scores: Sequence[Sequence[Score]]) -> str:
    tasks = {score.task: score for row in scores for score in row}
    return "\n".join(
        f"{task}: {'?' if score.n_samples is None else score.n_samples} questions"
        + ("" if score.n_shot is None else f", {score.n_shot} examples before each")
        for task, score in tasks.items()
    )
