"""The best of a front under each of some budgets, as a named file for the other commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

import yaml

from whittle_nas.errors import ConfigError
from whittle_nas.search.objectives import ANALYTIC, QUALITY, check_metric
from whittle_nas.space.front import (
    Front,
    FrontEntry,
    entries_under,
    parse_amount,
    parse_constraints,
)

FILE_NAME = "picks.yaml"
METRIC = "num_params"  # of a budget that names none
_BREAK = 0.1  # of the loss: how much worse a pick may be to be a part of a larger one
_TRIED = 64  # entries under each budget


def parse_budgets(text: Mapping[str, str] | str | Sequence[str] | None) -> dict[str, str]:
    """Read `"90%, 60%, latency_ms <= 0.7x"`: limits by the name that their pick will have.

    With names of one's own each budget may be several limits:
    `{"small": "latency_ms <= 0.7x, num_params <= 60%"}`.

    Raises:
        ConfigError: for a part that is neither a limit, nor a number or a share of `num_params`.
    """
    if isinstance(text, Mapping):
        for name, limits in text.items():
            if not re.fullmatch(r"\w[\w.+=-]*", name):
                raise ConfigError(f"--budgets: {name!r} must be a name of letters and digits")
            if not parse_constraints(limits, option="--budgets"):
                raise ConfigError(f"--budgets: {name} must be limits such as num_params <= 60%")
        return dict(text)
    parts = text.split(",") if isinstance(text, str) else list(text or ())
    found: dict[str, str] = {}
    for part in filter(None, map(str.strip, map(str, parts))):
        limit = part if re.search("[<>]", part) else f"{METRIC} <= {part}"
        amount = re.split("[<>]=?", limit)[-1].strip()
        try:
            parse_amount(amount)
        except ValueError:
            raise ConfigError(
                f"--budgets: {part!r} must be a share such as 60%, a number of parameters, or a "
                "limit such as latency_ms <= 0.7x"
            ) from None
        metric = re.split("[<>]", limit)[0].strip()
        name = re.sub(r"[^\w.+=-]+", "_", f"{metric}-{amount.rstrip('%')}")
        found[name] = limit
    return found


def check_budgets(budgets: Mapping[str, str], measured: Collection[str]) -> None:
    """Whether the front will have what budgets name: found out after the search, it is too late.

    Args:
        budgets: of `parse_budgets`.
        measured: metrics among the objectives and constraints; what follows from sizes, and loss
            with perplexity, come with them.

    Raises:
        ConfigError: for a metric that is unknown, or that the search does not measure.
    """
    known = {*measured, *ANALYTIC, *(QUALITY if {*QUALITY} & {*measured} else ())}
    for limit in parse_constraints(",".join(budgets.values()), option="--budgets"):
        if check_metric(limit.metric, "--budgets") not in known:
            raise ConfigError(
                f"--budgets: {limit} is about something that this search does not measure: add "
                f"{limit.metric} to --objectives"
            )


def pick_budgets(
    front: Front, budgets: dict[str, str], warn: Callable[[str], None], *, nested: bool = False
) -> dict[str, FrontEntry]:
    """The best entry under each budget, by name; one that is best under several stands once.

    Args:
        front: of a search.
        budgets: of `parse_budgets`.
        warn: takes sentences for the user, on budgets under which there is nothing new.
        nested: see `nested_picks`.

    Raises:
        ConfigError: if no budget leaves anything.
    """
    under: dict[str, list[FrontEntry]] = {}
    for name, limit in budgets.items():
        try:
            under[name] = entries_under(front, limit, option="--budgets")
        except ConfigError as error:
            warn(str(error))
    if not under:
        raise ConfigError(f"--budgets: nothing of {front.path} is under any of them")
    chosen = {name: entries[0] for name, entries in under.items()}
    if nested:
        chosen = nested_picks(under, front.objectives[0])
    found: dict[str, FrontEntry] = {}
    by_index: dict[int, str] = {}
    for name in under:
        entry = chosen[name]
        if entry.index in by_index:
            known = by_index[entry.index]
            warn(f"--budgets: {budgets[name]} has the same best sub-network as {known}")
            continue
        by_index[entry.index], found[name] = name, entry
    return found


def nested_picks(under: Mapping[str, Sequence[FrontEntry]], metric: str) -> dict[str, FrontEntry]:
    """One entry per budget, so that smaller ones are parts of larger ones where that costs little.

    A cascade trains the largest first, and what a network has learnt is of use to those that are
    parts of it. Minimised is the sum over budgets of the metric over the budget's best, plus a
    tenth for each entry that is no part of one chosen before it.

    Args:
        under: for every budget the entries that satisfy it, best first.
        metric: the one that is minimised.
    """
    paths: list[tuple[float, tuple[FrontEntry, ...]]] = [(0.0, ())]
    order = sorted(under, key=lambda name: -under[name][0].metrics[METRIC])
    for name in order:
        best = under[name][0].metrics[metric]
        paths = [
            min(
                ((cost + entry.metrics[metric] / best + _apart(entry, path), (*path, entry))
                 for cost, path in paths),
                key=lambda found: found[0],
            )
            for entry in under[name][:_TRIED]
        ]  # fmt: skip
    return dict(zip(order, min(paths, key=lambda found: found[0])[1], strict=True))


def _apart(entry: FrontEntry, larger: Sequence[FrontEntry]) -> float:
    """What it costs that an entry is no part of a larger one."""
    sub = entry.subnetwork
    alone = all(sub.within(one.subnetwork) is None for one in larger)
    return _BREAK if larger and alone else 0.0


def dump_picks(picks: dict[str, FrontEntry], candidates: str = "") -> str:
    """The YAML text: a list of named sizes, with the library that they are made of."""
    made = {"candidates": candidates} if candidates else {}
    rows = [{"name": name, **entry.subnetwork.to_dict(), **made} for name, entry in picks.items()]
    return yaml.safe_dump(rows, sort_keys=False)
