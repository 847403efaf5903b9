"""`front.html`: the search as one page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence

from whittle_nas import page
from whittle_nas.page import Column, Row
from whittle_nas.search.objectives import is_cost
from whittle_nas.search.trials import Trial
from whittle_nas.space.front import Front, FrontEntry
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.space.words import words


def render(
    front: Front,
    trials: Sequence[Trial],
    hypervolume: Sequence[float],
    path: str,
    *,
    whole: SubNetwork,
    note: str = "",
) -> str:
    """The page.

    Args:
        front: what was found.
        trials: all trials.
        hypervolume: dominated share of the objectives' range after each trial.
        path: of `front.json`, for the export commands.
        whole: the whole model, to which shapes are compared.
        note: what else to know of the front, a sentence.
    """
    first = front.entries[0]
    names = [*front.objectives, *(m for m in first.metrics if m not in front.objectives)]
    metrics = [
        # All that a search measures is minimised; a task's accuracy enters as 1 - accuracy.
        Column(
            name,
            "costs" if is_cost(name) else "quality",
            lower_is_better=True,
            extra=name not in (*front.objectives, "num_params"),
            words=words(name),
        )
        for name in sorted(names, key=is_cost)
    ]
    report = page.Report(
        title=f"Front of {front.checkpoint_dir}",
        summary=f"{len(front.entries)} of {len(trials)} sub-networks are on the front of "
        f"{', '.join(front.objectives)}.{note and f' {note}.'}",
        columns=[*metrics, *page.size_columns(first.subnetwork.summary())],
        rows=[_row(front, entry, path, whole) for entry in front.entries],
        x=front.objectives[-1],
        y=front.objectives[0],
        named="on the front",
        others=[_trial(front, trial) for trial in trials],
        others_named="trials",
        original=_original(front),
        growth=hypervolume,
        details={"How it was measured": json.dumps(dict(front.how_measured), indent=1)},
        numbers="trials.csv and front.json",
    )
    return page.render(report)


def _original(front: Front) -> Row | None:
    metrics = front.whole.get("metrics")
    return Row("whole model", metrics) if metrics else None


def _row(front: Front, entry: FrontEntry, path: str, whole: SubNetwork) -> Row:
    choice = ["--front", path, "--index", str(entry.index)]
    command = page.export_line(front.checkpoint_dir, choice, f"exported-front-{entry.index}")
    # `nas evaluate` gives the same names.
    values = {**entry.metrics, **entry.subnetwork.summary()}
    shape = entry.subnetwork.shares(whole)
    return Row(f"front-{entry.index}", values, command=command, shape=shape)


def _trial(front: Front, trial: Trial) -> Row:
    choice = page.size_options(trial.sub.to_dict())
    command = page.export_line(front.checkpoint_dir, choice, f"exported-trial-{trial.number}")
    return Row(f"trial {trial.number}", {**trial.metrics, **trial.sub.summary()}, command=command)
