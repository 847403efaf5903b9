"""What `nas search` shows: a bar while it runs, then a table, pictures and the next command."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from whittle_nas import progress
from whittle_nas.cli.common import command_line, print_table
from whittle_nas.errors import ConfigError
from whittle_nas.export.checkpoint import plan_export
from whittle_nas.plots import plot_front, plot_shapes
from whittle_nas.search import budgets, html, rounds
from whittle_nas.search.costs import PHASES
from whittle_nas.search.finish import Listener
from whittle_nas.search.objectives import REPAIR
from whittle_nas.search.options import Method
from whittle_nas.search.request import Request
from whittle_nas.search.results import (
    best_per_budget,
    candidates,
    hypervolume_over_time,
    points_of,
)
from whittle_nas.search.session import Outcome
from whittle_nas.search.trials import Status, Trial
from whittle_nas.space.front import Front, FrontEntry
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.files import atomic_write_text

_SHAPES = 6  # of a front, in shapes.png


@contextmanager
def listening(request: Request, warn: Callable[[str], None]) -> Iterator[Listener]:
    """A bar with the time left and the best trial under some budgets."""
    quality = request.objectives[0]
    # The delay keeps the bar away from what is wrong with the options, which is found at once.
    with progress.bar("trials", request.num_trials, delay=2) as bar:

        def show(trials: Sequence[Trial]) -> None:
            bar.update(len(trials) - bar.n)
            best = best_per_budget(trials, request.objectives, request.constraints)
            shown = [f"<={share:.0%} {trial.metrics[quality]:.4g}" for share, trial in best]
            bar.set_postfix_str(f"best {quality}: {', '.join(shown)}", refresh=False)

        def step(what: str, left: int) -> None:
            bar.set_description_str(f"{what}, {left} left" if left else "trials")

        def clear_and_warn(sentence: str) -> None:
            bar.clear()
            warn(sentence)

        yield Listener(show, step, clear_and_warn)


def report(request: Request, outcome: Outcome) -> None:
    """Write pictures and `front.html` and print the front."""
    growth = hypervolume_over_time(outcome.trials, request.objectives, request.constraints)
    path = request.out_dir / "front.json"
    whole = SubNetwork.from_config(request.checkpoint.config)
    unheld = _not_for_transformers(request, outcome.front)
    page = html.render(outcome.front, outcome.trials, growth, str(path), whole=whole, note=unheld)
    atomic_write_text(request.out_dir / "front.html", page)
    _draw(request, outcome, growth)
    entries = outcome.front.entries
    some = entries[:: math.ceil(len(entries) / _SHAPES)]
    draw_shapes(request, {f"front-{entry.index}": entry.subnetwork for entry in some})
    _print_front(request, outcome)
    failed = [trial for trial in outcome.trials if trial.status is Status.failed]
    if failed:
        print(f"{len(failed)} trials failed, the first one: {failed[0].sub}: {failed[0].note}")
    if stopped := sum(trial.status is Status.stopped for trial in outcome.trials):
        print(f"{stopped} trials were stopped after {request.halving.first_blocks} blocks")
    if request.method is Method.ilp:
        _print_programs(request)
    elif len(outcome.trials) < request.num_trials:
        print(
            f"the search space holds no more than these {len(outcome.trials)} sub-networks"
            f"{' within the constraints' if request.constraints else ''}"
        )
    for name, how in outcome.front.how_measured.items():
        if name.endswith("of the latency table"):
            print(
                f"{name}: {how['sum_error']:.1%} off {how['networks']} whole networks as a sum, "
                f"{how['corrected_error']:.1%} corrected (medians), rank correlation "
                f"{how['rank_correlation']:.3f}; the front was timed whole"
            )
    _print_repair(outcome.trials)
    if outcome.recovered is not None:
        _print_recovered(outcome.recovered)
    if unheld:
        print(unheld)
    print(f"trials, front and pictures: {request.out_dir}")
    source = ("--checkpoint_dir", request.checkpoint.path)
    evaluate = ("nas", "evaluate", *source, "--front", path, "--tasks", "<tasks>")
    print(f"evaluate all with: {_with_repair(request, evaluate, '--calibration.files')}")
    export = ("nas", "export", *source, *_export_choice(request, outcome))
    print(
        f"export the {'middle' if outcome.recovered is None else 'best'} one with: "
        f"{_with_repair(request, export, '--data.files')}"
    )


def _not_for_transformers(request: Request, front: Front) -> str:
    """Which networks no Hugging Face architecture holds, and why; empty if there are none."""
    reasons = {}
    for entry in front.entries:
        try:
            plan_export(request.checkpoint, entry.subnetwork, to_hf=True)
        except ConfigError as error:
            reasons[entry.index] = error
    if not reasons:
        return ""
    first, reason = next(iter(reasons.items()))
    return (
        f"{len(reasons)} of {len(front.entries)} networks on the front are no model of "
        f"transformers (nas export --format hf), such as front-{first}: {reason}"
    )


def _with_repair(request: Request, words: Sequence[object], text: str) -> str:
    """A command about the networks of a search, which come out as they were searched."""
    mended = ("--repair", "true", text, "<text>") if request.calibration is not None else ()
    return command_line(*words, *mended, "--out_dir", "<dir>")


def _draw(request: Request, outcome: Outcome, growth: Sequence[float]) -> None:
    shown = candidates(outcome.trials, request.constraints)
    entries = outcome.front.entries
    plot_front(
        request.out_dir / "front.png",
        objectives=request.objectives,
        trials=points_of(shown, request.objectives),
        front=[[entry.metrics[name] for name in request.objectives] for entry in entries],
        hypervolume=growth,
        original=outcome.front.whole.get("metrics"),
    )


def draw_shapes(request: Request, subs: Mapping[str, SubNetwork]) -> None:
    """Write `shapes.png`: what networks keep of every layer."""
    whole = SubNetwork.from_config(request.checkpoint.config)
    shapes = {name: sub.shares(whole) for name, sub in subs.items()}
    plot_shapes(request.out_dir / "shapes.png", shapes, whole=whole.blocks)


def _print_front(request: Request, outcome: Outcome) -> None:
    entries = outcome.front.entries
    names = list(request.space.largest.summary())
    metrics = _shown_metrics(request, entries[0])
    varied = [n for n in names if len({entry.subnetwork.summary()[n] for entry in entries}) > 1]
    rows = [
        [entry.index]
        + [entry.metrics[name] for name in metrics]
        + [entry.subnetwork.summary()[name] for name in varied]
        for entry in entries
    ]
    title = f"{len(rows)} of {len(outcome.trials)} sub-networks are on the front"
    path = request.out_dir / "front.html"
    print_table(["index", *metrics, *varied], rows, title, all_in=path)


def _shown_metrics(request: Request, entry: FrontEntry) -> list[str]:
    """The objectives, and the times that were measured beside them."""
    times = (name for name in PHASES if name in entry.metrics)
    return [*dict.fromkeys([*request.objectives, *times])]


def _print_programs(request: Request) -> None:
    """What the first program of each budget found, and what each round bought."""
    path = request.out_dir / rounds.FILE_NAME
    rows = []
    for found in rounds.read_report(path):
        name = found["budget"] or ", ".join(found["limits"])
        first = min(found["solutions"], key=lambda one: one["measured"] or math.inf)
        predicted, measured = first["predicted"], first["measured"]
        rows.append([name, "first", len(found["solutions"]), predicted, measured, None])
        for number, one in enumerate(found["rounds"], start=1):
            best = min(one["steps"], key=lambda step: step["measured"] or math.inf, default={})
            predicted = best.get("predicted")
            tried = len(one["steps"])
            rows.append([name, f"round {number}", tried, predicted, one["after"], one["gain"]])
    columns = ["budget", "program", "networks", "predicted loss", "best measured", "gain"]
    print_table(columns, rows, f"integer programs; all of it in {path}")


def _print_repair(trials: Sequence[Trial]) -> None:
    times = [trial.metrics[REPAIR] for trial in trials if REPAIR in trial.metrics]
    if times:
        share = sum(times) / max(1e-9, sum(trial.seconds for trial in trials))
        print(
            f"losses are those after repair, which took {statistics.median(times):.1f} s per "
            f"sub-network (median) and {share:.0%} of the search; export with --repair true"
        )


def _print_recovered(recovered: Front) -> None:
    columns = ["rank_before", "val_loss", *recovered.objectives]
    rows = [[e.index, *(e.metrics[name] for name in columns)] for e in recovered.entries]
    title = f"best under {recovered.how_measured['budget']}, ranked after recovery"
    print_table(["index", *columns], rows, title)
    if len(rows) > 2:
        before = [entry.metrics["rank_before"] for entry in recovered.entries]
        shift = sum((rank - at) ** 2 for at, rank in enumerate(before, start=1))
        count = len(rows)
        correlation = 1 - 6 * shift / (count * (count**2 - 1))  # Spearman's
        print(f"rank correlation before and after the training: {correlation:.2f}")


def _export_choice(request: Request, outcome: Outcome) -> list[object]:
    """Options for the best after recovery, else for a budget in the middle of the front."""
    if outcome.recovered is not None:
        return ["--front", request.out_dir / "recovery.json", "--index", 0]
    cost = request.objectives[-1]
    values = sorted(entry.metrics[cost] for entry in outcome.front.entries)
    budget = values[len(values) // 2]
    return [
        "--front",
        request.out_dir / "front.json",
        "--pick",
        f"{cost} <= {int(budget) if float(budget).is_integer() else budget!r}",
    ]


def write_picks(
    request: Request,
    outcome: Outcome,
    wanted: dict[str, str],
    warn: Callable[[str], None],
    *,
    nested: bool,
) -> None:
    """Write the best under each budget, print them and the commands that read the file."""
    path = request.out_dir / budgets.FILE_NAME
    picks = budgets.pick_budgets(outcome.front, wanted, warn, nested=nested)
    atomic_write_text(path, budgets.dump_picks(picks, outcome.front.candidates))
    draw_shapes(request, {name: entry.subnetwork for name, entry in picks.items()})
    shown = _shown_metrics(request, next(iter(picks.values())))
    columns = [*dict.fromkeys([*shown, budgets.METRIC])]
    rows = [[n, e.index, *(e.metrics[c] for c in columns)] for n, e in picks.items()]
    print_table(["pick", "index", *columns], rows, f"best under each budget, in {path}")
    source = ["--checkpoint_dir", request.checkpoint.path, "--subnetworks", path]
    if request.library is None:  # whose parts are fitted already
        source += ["--repair", "true"]
    text = ("--data.files", "<text>", "--data.valid_fraction", 0.1)
    words = ("nas", "finetune", *source, *text, "--out_dir", "<dir>")
    print(f"train them with: {command_line(*words)}")
