"""What stays true of `prune.json` when a training has kept the zeros."""

from __future__ import annotations

import json
from pathlib import Path

from whittle_nas.reading import read_json
from whittle_nas.weights.files import PRUNE_REPORT

# How it was made, not what it measured of weights that are others now.
_CARRIED = ("format", "method", "sparsity", "bits", "group_size", "symmetric", "notes")


def carry_report(source: Path, out_dir: Path) -> None:
    """Let a training's result say how its zeros were made; quantised weights leave their grid.

    Args:
        source: the checkpoint that was trained; nothing is written if `nas prune` did not make it.
        out_dir: existing directory of the result.
    """
    path = source / PRUNE_REPORT
    report = read_json(path) if path.is_file() else {}
    whole = isinstance(report, dict) and set(_CARRIED) <= set(report)
    if whole and not report["bits"]:
        text = json.dumps({key: report[key] for key in _CARRIED}, indent=1)
        (out_dir / PRUNE_REPORT).write_text(f"{text}\n", encoding="utf-8")
