"""How a long loop shows its progress, without printing anything itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

# Takes a loop's items, what it does, and how many there are; gives the items back. `cli` has the
# one that draws a bar.
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


def no_progress(items: Iterable[Any], label: str, total: int) -> Iterable[Any]:  # noqa: ARG001
    """The progress bar that shows nothing."""
    return items
