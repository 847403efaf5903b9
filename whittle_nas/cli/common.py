"""What every command needs: devices, seeds, tables and progress bars."""

from __future__ import annotations

import os
import random
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from whittle_nas.cli.options import DType
from whittle_nas.errors import ConfigError
from whittle_nas.progress import bar

if TYPE_CHECKING:
    import torch


def is_first_process() -> bool:
    """Whether this is the one process of a run that holds and writes `out_dir`.

    Lightning, torchrun and Slurm start the others with the same command line.
    """
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def resolve_device(device: str) -> torch.device:
    """`auto` takes a GPU if there is one.

    Raises:
        ConfigError: if the device is unknown or not there, or if these are several.
    """
    found, *others = resolve_devices(device)
    if others:
        raise ConfigError(f"--device {device}: this command runs on one device, name one of them")
    return found


def resolve_devices(device: str) -> tuple[torch.device, ...]:
    """One device, or those that a model is shared out between: names with commas between them.

    Raises:
        ConfigError: if one is unknown or not there, if a name is empty, or if `auto` is one of
            several.
    """
    import torch

    names = [name.strip() for name in device.split(",")]
    if names == ["auto"]:
        return (torch.device("cuda" if torch.cuda.is_available() else "cpu"),)
    if "auto" in names:
        raise ConfigError(f"--device {device}: auto stands alone; name each device, or none")
    if not all(names):
        raise ConfigError(f"--device {device}: a name is missing beside a comma")
    return tuple(map(_found, names))


def _found(device: str) -> torch.device:
    import torch

    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        gpus = [f"cuda:{at}" for at in range(torch.cuda.device_count())]
        raise ConfigError(
            f"--device {device} is not there; here are {', '.join(['auto', 'cpu', *gpus])}"
        ) from None
    return found


def resolve_dtype(dtype: DType) -> torch.dtype | None:
    """torch's number format, None to keep the stored one."""
    import torch

    return None if dtype is DType.stored else getattr(torch, dtype.value)


def seed_everything(seed: int) -> None:
    """Seed every random generator that the libraries use."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_least(least: int, **options: int | None) -> None:
    """Refuse numbers that are too small; None is an option that was not given.

    Raises:
        ConfigError: naming the option and its value.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value} must be at least {least}")


def progress_bar(items: Iterable[Any], label: str, total: int) -> Iterable[Any]:
    """Show how far a loop is and the time left, on stderr; see `whittle_nas.progress`."""
    with bar(label, total) as shown:
        for item in items:
            yield item
            shown.update(1)


def command_line(*words: object) -> str:
    """A command to copy; what the user has to fill in comes as `<word>` and stays unquoted."""
    texts = map(str, words)
    return " ".join(text if text.startswith("<") else shlex.quote(text) for text in texts)


_MOST = 12  # rows of a long table that are printed


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    title: str = "",
    *,
    all_in: object = None,
) -> None:
    """A table for people, numbers to the right; no cell is cut, also where there is no terminal.

    Args:
        columns: their names.
        rows: their cells.
        title: above the table.
        all_in: file with all rows, of which then only some are printed, evenly spread.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for at, column in enumerate(columns):
        number = bool(rows) and not isinstance(rows[0][at], str)
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    shown = len(rows) if all_in is None else min(len(rows), _MOST)
    places = [round(at * (len(rows) - 1) / max(1, shown - 1)) for at in range(shown)]
    for row in (rows[place] for place in places):
        table.add_row(*(_cell(value) for value in row))
    needed = Console(width=10_000, force_jupyter=False).measure(table).maximum
    # in a notebook rich would show it past a redirected stdout
    Console(width=max(Console().width, needed), force_jupyter=False).print(table)
    if shown < len(rows):
        print(f"{shown} of {len(rows)}; all are in {all_in}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def warn(sentence: str) -> None:
    """Say something beside the output, where pipes do not take it."""
    print(f"nas: warning: {sentence}", file=sys.stderr)
