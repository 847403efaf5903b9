"""`--dry_run`: from the options of a command to its `Plan`. Nothing is loaded or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from whittle_nas.cli.common import check_least
from whittle_nas.cli.planning import calibration, scoring, training
from whittle_nas.cli.planning.source import Source
from whittle_nas.metrics.plan import Plan


def plan_of(command: str, options: Any) -> Plan:
    """The plan of a command.

    Args:
        command: its name.
        options: its options, as its function gets them.

    Raises:
        ConfigError: for a checkpoint that nothing is known of, or options that do not fit it.
    """
    check_least(1, devices=getattr(options, "devices", 1))
    return PLANNERS[command](Source.of(Path(options.checkpoint_dir)), options)


PLANNERS: dict[str, Callable[[Source, Any], Plan]] = {
    "importance": calibration.importance,
    "finetune": training.finetune,
    "finetune-supernet": training.finetune,
    "candidates": calibration.candidates,
    "search": scoring.search,
    "evaluate": scoring.evaluate,
    "export": calibration.export,
    "prune": calibration.prune,
}
