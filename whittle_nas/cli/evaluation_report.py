"""What `nas evaluate` leaves behind: lm-eval's JSON, tables and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from whittle_nas.evaluate.presets import headline
from whittle_nas.evaluate.report import Score, dump, dump_samples, merge, scores
from whittle_nas.evaluate.session import Session
from whittle_nas.evaluate.store import Pair, Result
from whittle_nas.space import SubNetwork

COLUMNS = (
    "subnetwork", "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size",
    "n_layer", "num_params", "latency_ms", "task", "metric", "filter", "value", "stderr",
    "higher_is_better", "n_shot", "n_samples", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluated:
    """One sub-network and what was asked.

    Attributes:
        label: its name.
        num_params: its parameters.
        latency_ms: its latency, where it was timed.
        pairs: its tasks, all finished.
        measured: what a search measured, by name.
    """

    label: str
    num_params: int
    latency_ms: float | None
    pairs: Sequence[Pair]
    measured: Mapping[str, float] = field(default_factory=dict)


def write_report(session: Session, evaluated: Sequence[Evaluated]) -> None:
    """Write `<label>/results.json`, `results.csv`, `report.html` and pictures; print the table."""
    from whittle_nas.weights.files import atomic_write_text

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    shown: list[dict[str, Score]] = []
    found: list[list[Score]] = []
    for one in evaluated:
        results = {pair.task: _found(session, pair) for pair in one.pairs}
        _write_results(session, one, results)
        writer.writerows(_rows(one, results))
        numbers = {task: headline_of(session, task, result) for task, result in results.items()}
        shown.append({task: score for task, score in numbers.items() if score is not None})
        found.append([score for result in results.values() for score in scores(result.results)])
    atomic_write_text(session.out_dir / "results.csv", table.getvalue())
    atomic_write_text(session.out_dir / "report.html", _page(session, evaluated, shown, found))
    _draw(session, evaluated, shown)
    _print(evaluated, shown, session.out_dir / "report.html")
    if session.text is not None:
        print(f"text is {session.text.blocks}")
    print(f"tables, pictures and report.html: {session.out_dir}")
    _print_export(session, evaluated)


def _print_export(session: Session, evaluated: Sequence[Evaluated]) -> None:
    """How the middle one by size becomes a checkpoint: the rule of `nas search`, too."""
    from whittle_nas.cli.common import command_line
    from whittle_nas.page import size_options

    source = session.checkpoint
    whole = SubNetwork.from_config(source.config)
    smaller = [one for one in evaluated if one.pairs[0].subnetwork != whole]
    if smaller:
        smaller.sort(key=lambda one: one.num_params)
        middle = smaller[len(smaller) // 2].pairs[0].subnetwork
        choice = ("--checkpoint_dir", source.path, *size_options(middle.to_dict()))
        line = command_line("nas", "export", *choice, "--out_dir", "<dir>")
        print(f"export the middle one with: {line}")


def headline_of(session: Session, task: str, result: Result) -> Score | None:
    """The number that stands for a task."""
    wanted = {t.choice.name: t.choice.metric for t in session.tasks}.get(task)
    known = {score.name: score for score in scores(result.results) if score.task == task}
    name = headline(list(known), wanted)
    return None if name is None else known[name]


def _found(session: Session, pair: Pair) -> Result:
    result = session.find(pair)
    assert result is not None, f"{pair.path(session.out_dir)} vanished"
    return result


def _write_results(session: Session, one: Evaluated, results: dict[str, Result]) -> None:
    from whittle_nas.weights.files import atomic_write_text

    folder = session.out_dir / one.label
    folder.mkdir(exist_ok=True)
    about = session.about(one.pairs[0].subnetwork, one.num_params)
    atomic_write_text(folder / "results.json", dump(merge(list(results.values()), about)))
    for result in results.values():
        for task, samples in (result.samples or {}).items():
            atomic_write_text(folder / f"samples_{task}.jsonl", dump_samples(samples))


def _rows(one: Evaluated, results: dict[str, Result]) -> Iterator[list[object]]:
    sizes = one.pairs[0].subnetwork.summary().values()
    for result in results.values():
        for s in scores(result.results):
            yield [
                one.label, *sizes, one.num_params, one.latency_ms, s.task, s.metric, s.filter,
                s.value, s.stderr, s.higher_is_better, s.n_shot, s.n_samples,
                round(result.seconds, 3),
            ]  # fmt: skip


def _page(
    session: Session,
    evaluated: Sequence[Evaluated],
    shown: Sequence[dict[str, Score]],
    found: Sequence[Sequence[Score]],
) -> str:
    from whittle_nas.cli.evaluation_page import render

    first = evaluated[0]
    about = session.about(first.pairs[0].subnetwork, first.num_params)
    del about["model_args"], about["model_num_parameters"]  # those of one row
    return render(
        str(session.checkpoint.path),
        {one.label: one.pairs[0].subnetwork for one in evaluated},
        whole=SubNetwork.from_config(session.checkpoint.config),
        costs=[
            {**one.measured, "num_params": one.num_params, "latency_ms": one.latency_ms}
            for one in evaluated
        ],
        scores=found,
        headlines={task: score.name for row in shown for task, score in row.items()},
        about=about,
    )


def _draw(
    session: Session, evaluated: Sequence[Evaluated], shown: Sequence[dict[str, Score]]
) -> None:
    """A picture per task, whose panels are the costs that are known of every sub-network."""
    from whittle_nas.plots import plot_scores

    whole = SubNetwork.from_config(session.checkpoint.config)
    costs = {"parameters": [float(one.num_params) for one in evaluated]}
    timed = [one.latency_ms for one in evaluated if one.latency_ms is not None]
    if len(timed) == len(evaluated):
        costs["latency in ms"] = timed
    for task in dict.fromkeys(task for numbers in shown for task in numbers):
        rows = [at for at, numbers in enumerate(shown) if task in numbers]
        points = [shown[at][task] for at in rows]
        plot_scores(
            session.out_dir / f"{task.replace('/', '_')}.png",
            title=task,
            metric=points[0].metric,
            labels=[evaluated[at].label for at in rows],
            costs={name: [values[at] for at in rows] for name, values in costs.items()},
            values=[point.value for point in points],
            stderrs=[point.stderr for point in points],
            stars=[evaluated[at].pairs[0].subnetwork == whole for at in rows],
        )


def _print(evaluated: Sequence[Evaluated], shown: Sequence[dict[str, Score]], path: Path) -> None:
    from whittle_nas.cli.common import print_table

    tasks = list(dict.fromkeys(task for numbers in shown for task in numbers))
    metrics = {task: score.metric for numbers in shown for task, score in numbers.items()}
    timed = [one.latency_ms for one in evaluated if one.latency_ms is not None]
    columns = ["sub-network", "parameters", *(["latency_ms"] if timed else [])]
    rows = [
        [
            one.label,
            one.num_params,
            *([one.latency_ms] if timed else []),
            *(numbers[task].number() if task in numbers else "" for task in tasks),
        ]
        for one, numbers in zip(evaluated, shown, strict=True)
    ]
    print_table([*columns, *(f"{task}\n{metrics[task]}" for task in tasks)], rows, all_in=path)
