"""Whether an interrupted run is resumed as it was begun."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between the settings of a run and those of its resumption; "" if nothing does.

    Args:
        old: plain values by name.
        new: the same of now.
    """
    return "; ".join(
        f"{name} was {_short(old.get(name))} and is {_short(new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    )


def _short(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
