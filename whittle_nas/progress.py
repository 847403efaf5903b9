"""How a long loop shows its progress: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

# Takes a loop's items, what it does, and how many there are; gives the items back. `cli` has the
# one that draws a bar.
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]

LINE_SECONDS = 10.0
_LINE = "{desc}: {n_fmt}/{total_fmt} ({elapsed}, {remaining} left{postfix})"
_LAST = "{desc}: {n_fmt}/{total_fmt} ({elapsed}{postfix})"  # what follows is not counted


def no_progress(items: Iterable[Any], label: str, total: int) -> Iterable[Any]:  # noqa: ARG001
    """The progress bar that shows nothing."""
    return items


def bar(label: str, total: int, *, delay: float = 0, show: bool = True) -> Any:
    """A context manager with `update(n)` and what else of tqdm's interface `Lines` has, on stderr.

    Args:
        label: what is done.
        total: how often.
        delay: seconds before a bar on a terminal appears.
        show: draw at all.
    """
    from tqdm import tqdm

    if not show or sys.stderr.isatty():
        return tqdm(
            total=total, desc=label, file=sys.stderr, leave=False, delay=delay, disable=not show
        )
    return Lines(label, total)


class Lines:
    """tqdm's interface where stderr is a file: a line every ten seconds, also inside a long item.

    What is done sooner leaves no line.
    """

    def __init__(self, label: str, total: int, *, seconds: float = LINE_SECONDS) -> None:
        self.n = 0
        self._label, self._total, self._postfix = label, total, ""
        self._start = time.monotonic()
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, args=(seconds,), daemon=True)

    def __enter__(self) -> Lines:
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def update(self, n: float = 1) -> None:
        """Count what was done."""
        self.n += n

    def set_description_str(self, label: str) -> None:
        """Say what is done from now on."""
        self._label = label

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:  # noqa: ARG002
        """Say what was found."""
        self._postfix = text

    def clear(self) -> None:
        """Nothing stands in the way of other output: lines stay where they are."""

    def _tick(self, seconds: float) -> None:
        from tqdm import tqdm

        while not self._closed.wait(seconds):
            text = tqdm.format_meter(
                self.n,
                self._total,
                time.monotonic() - self._start,
                prefix=self._label,
                postfix=self._postfix,
                bar_format=_LINE if self.n < self._total else _LAST,
            )
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
