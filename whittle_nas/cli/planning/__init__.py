"""`--dry_run`: from the options of a command to its `Plan`. Nothing is loaded or written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from whittle_nas.cli.common import check_least
from whittle_nas.cli.planning import calibration, running, scoring, training
from whittle_nas.cli.planning.source import Source
from whittle_nas.errors import ConfigError
from whittle_nas.metrics.plan import Plan


def plan_of(command: str, options: Any, source: Source | None = None) -> Plan:
    """The plan of a command.

    Args:
        command: its name.
        options: its options, as its function gets them.
        source: what it reads, where a stage before it is still to write that.

    Raises:
        ConfigError: for a checkpoint that nothing is known of, or options that do not fit it.
    """
    check_least(1, devices=getattr(options, "devices", 1))
    return PLANNERS[command](source or _source(options), options)


def _source(options: Any) -> Source:
    name = getattr(options, "model_name", None)
    if (name is None) == (options.checkpoint_dir is None):
        if name is None and not hasattr(options, "model_name"):
            raise ConfigError("--checkpoint_dir is required")
        raise ConfigError("give either --checkpoint_dir or --model_name")
    if name is None:
        return Source.of(Path(options.checkpoint_dir))
    return replace(Source.of(Path(name)), stored=torch.float32)  # its weights are random


PLANNERS: dict[str, Callable[[Source, Any], Plan]] = {
    "importance": calibration.importance,
    "finetune": training.finetune,
    "finetune-supernet": training.finetune,
    "candidates": calibration.candidates,
    "search": scoring.search,
    "evaluate": scoring.evaluate,
    "export": calibration.export,
    "prune": calibration.prune,
    "profile": running.profile,
    "generate": running.generate,
}
