"""`trials.csv`: one line per evaluated sub-network, written as it ends."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path

from whittle_nas.errors import ConfigError
from whittle_nas.space.subnetwork import SubNetwork

FILE_NAME = "trials.csv"
_SIZES = tuple(field.name for field in fields(SubNetwork))


class Status(str, Enum):
    """How an evaluation ended; `stopped` ones saw only the first blocks (successive halving)."""

    complete = "complete"
    stopped = "stopped"
    failed = "failed"


@dataclass(frozen=True)
class Trial:
    """One evaluated sub-network.

    Attributes:
        number: in the order of the proposals, from 0.
        sub: its sizes.
        status: how the evaluation ended.
        metrics: values by name; of a failed one the costs only.
        blocks: blocks of validation text that the loss is a mean of.
        seconds: time of the evaluation.
        note: why it failed.
    """

    number: int
    sub: SubNetwork
    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    blocks: int = 0
    seconds: float = 0.0
    note: str = ""


class TrialLog:
    """Appends trials to a file; every line is on the disk before `append` returns."""

    def __init__(self, path: Path, metrics: Sequence[str]) -> None:
        """Open the file, and write the header if it is new.

        Args:
            path: the file.
            metrics: names of the metric columns.
        """
        self.columns = columns(metrics)
        self._metrics = tuple(metrics)
        new = not path.is_file() or path.stat().st_size == 0
        self._file = path.open("a", encoding="utf-8", newline="")
        if new:
            self._write(list(self.columns))

    def append(self, trial: Trial) -> None:
        """Write one trial."""
        values = [repr(trial.metrics[m]) if m in trial.metrics else "" for m in self._metrics]
        sizes = list(trial.sub.to_dict().values())
        note = " ".join(trial.note.split())  # a line break would look like a cut-off line
        rest = [trial.blocks, f"{trial.seconds:.3f}", note]
        self._write([trial.number, trial.status.value, *sizes, *values, *rest])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, row: list[object]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        self._file.write(text.getvalue())
        self._file.flush()
        os.fsync(self._file.fileno())


def columns(metrics: Sequence[str]) -> tuple[str, ...]:
    """The header of the file."""
    return ("trial", "status", *_SIZES, *metrics, "blocks", "seconds", "note")


def read_trials(path: Path, metrics: Sequence[str]) -> tuple[list[Trial], bool]:
    """Read what a search wrote before it was interrupted.

    A last line without a line break was cut off by the interruption: it is removed from the file.

    Args:
        path: the file.
        metrics: expected metric columns.

    Returns:
        The trials, and whether a line was dropped.

    Raises:
        ConfigError: if the file has other columns or a line that is not a trial.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    cut_off = len(whole) < len(data)
    if cut_off:
        with path.open("rb+") as file:
            file.truncate(len(whole))
    rows = list(csv.DictReader(io.StringIO(whole.decode("utf-8", errors="replace"))))
    header = next(csv.reader(io.StringIO(whole.decode("utf-8", errors="replace"))), None)
    if header is not None and tuple(header) != columns(metrics):
        raise ConfigError(
            f"{path} has the columns {', '.join(header)}, this search writes "
            f"{', '.join(columns(metrics))}; start anew with another --out_dir"
        )
    found = [_read(row, metrics, path, line) for line, row in enumerate(rows, start=2)]
    if len({trial.number for trial in found}) < len(found):
        raise ConfigError(f"{path} holds a trial twice; start anew with another --out_dir")
    return found, cut_off


def _read(row: Mapping[str, str], metrics: Sequence[str], path: Path, line: int) -> Trial:
    try:
        return Trial(
            number=int(row["trial"]),
            sub=SubNetwork.from_dict({name: int(row[name]) for name in _SIZES}),
            status=Status(row["status"]),
            metrics={name: _number(row[name]) for name in metrics if row[name]},
            blocks=int(row["blocks"]),
            seconds=float(row["seconds"]),
            note=row["note"],
        )
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} line {line} is not a trial; remove it, or start anew with another --out_dir"
        ) from None


def _number(text: str) -> float:
    """An int or a float, as it was written."""
    return int(text) if text.lstrip("-").isdigit() else float(text)
