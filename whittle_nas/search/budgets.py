"""The best of a front under each of some budgets, as a named file for the other commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import yaml

from whittle_nas.errors import ConfigError
from whittle_nas.space.front import Front, FrontEntry, best_under, parse_amount

FILE_NAME = "picks.yaml"
METRIC = "num_params"  # of a budget that names none


def parse_budgets(text: str | Sequence[str] | None) -> dict[str, str]:
    """Read `"90%, 60%, latency_ms <= 0.7x"`: limits by the name that their pick will have.

    Raises:
        ConfigError: for a part that is neither a limit, nor a number or a share of `num_params`.
    """
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


def pick_budgets(
    front: Front, budgets: dict[str, str], warn: Callable[[str], None]
) -> dict[str, FrontEntry]:
    """The best entry under each budget, by name; one that is best under several stands once.

    Args:
        front: of a search.
        budgets: of `parse_budgets`.
        warn: takes sentences for the user, on budgets under which there is nothing new.

    Raises:
        ConfigError: if no budget leaves anything.
    """
    found: dict[str, FrontEntry] = {}
    by_index: dict[int, str] = {}
    for name, limit in budgets.items():
        try:
            entry = best_under(front, limit, option="--budgets")
        except ConfigError as error:
            warn(str(error))
            continue
        if entry.index in by_index:
            warn(f"--budgets: {limit} has the same best sub-network as {by_index[entry.index]}")
            continue
        by_index[entry.index], found[name] = name, entry
    if not found:
        raise ConfigError(f"--budgets: nothing of {front.path} is under any of them")
    return found


def dump_picks(picks: dict[str, FrontEntry], candidates: str = "") -> str:
    """The YAML text: a list of named sizes, with the library that they are made of."""
    made = {"candidates": candidates} if candidates else {}
    rows = [{"name": name, **entry.subnetwork.to_dict(), **made} for name, entry in picks.items()]
    return yaml.safe_dump(rows, sort_keys=False)
