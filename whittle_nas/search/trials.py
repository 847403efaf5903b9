"""`trials.csv`: one line per evaluated sub-network, written as it ends."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from whittle_nas.errors import ConfigError
from whittle_nas.space.searchspace import SearchSpace
from whittle_nas.space.subnetwork import SIZES, SubNetwork
from whittle_nas.weights.files import atomic_file

FILE_NAME = "trials.csv"
SHAPE = "shape"


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

    def __init__(self, path: Path, metrics: Sequence[str], space: SearchSpace) -> None:
        """Open the file, and write the header if it is new.

        Args:
            path: the file.
            metrics: names of the metric columns.
            space: where the sub-networks come from.
        """
        self.columns = columns(metrics, space)
        self._metrics = tuple(metrics)
        new = not path.is_file() or path.stat().st_size == 0
        self._file = path.open("a", encoding="utf-8", newline="")
        if new:
            self._write(list(self.columns))

    def append(self, trial: Trial) -> None:
        """Write one trial."""
        values = [repr(trial.metrics[m]) if m in trial.metrics else "" for m in self._metrics]
        sizes: list[object] = list(trial.sub.summary().values())
        if SHAPE in self.columns:
            sizes.append(json.dumps(trial.sub.to_dict()))
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


def write_trials(
    path: Path, trials: Sequence[Trial], metrics: Sequence[str], space: SearchSpace
) -> None:
    """Replace the file by one that holds these trials."""
    with atomic_file(path) as unfinished:
        log = TrialLog(unfinished, metrics, space)
        for trial in trials:
            log.append(trial)
        log.close()


def columns(metrics: Sequence[str], space: SearchSpace) -> tuple[str, ...]:
    """The header of the file; sizes say all about a sub-network with equal blocks."""
    shape = (SHAPE,) if space.per_layer else ()
    return ("trial", "status", *SIZES, *shape, *metrics, "blocks", "seconds", "note")


def read_trials(path: Path, metrics: Sequence[str], space: SearchSpace) -> tuple[list[Trial], bool]:
    """Read what a search wrote before it was interrupted.

    A last line without a line break was cut off by the interruption: it is removed from the file.

    Args:
        path: the file.
        metrics: expected metric columns.
        space: where the sub-networks come from.

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
    if header is not None and tuple(header) != columns(metrics, space):
        raise ConfigError(
            f"{path} has the columns {', '.join(header)}, this search writes "
            f"{', '.join(columns(metrics, space))}; start anew with another --out_dir"
        )
    found = [_read(row, metrics, space, path, line) for line, row in enumerate(rows, start=2)]
    if len({trial.number for trial in found}) < len(found):
        raise ConfigError(f"{path} holds a trial twice; start anew with another --out_dir")
    return found, cut_off


def _read(
    row: Mapping[str, str], metrics: Sequence[str], space: SearchSpace, path: Path, line: int
) -> Trial:
    try:
        shape = row.get(SHAPE)
        spec = json.loads(shape) if shape else {name: int(row[name]) for name in SIZES}
        return Trial(
            number=int(row["trial"]),
            sub=SubNetwork.from_dict(spec, space.layer_order),
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
