"""What a search minimises: names, and which of them are known without running the model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from whittle_nas.errors import ConfigError

QUALITY = ("val_loss", "perplexity")
ANALYTIC = ("num_params", "num_params_non_embedding", "flops", "weight_bytes", "memory_bytes")
MEASURED = ("latency_ms", "decode_ms_per_token")
REPAIR = "repair_seconds"  # what the repair of a trial took, not an objective
_TASK = re.compile(r"^1\s*-\s*(?P<task>[^\s.]+)\.(?P<metric>[^\s.]+)$")


def parse_objectives(text: str | Sequence[str]) -> tuple[str, ...]:
    """Read `"val_loss, num_params"`, or a list of names.

    Raises:
        ConfigError: for an unknown name, a repeated one, or fewer than two.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    names = tuple(check_metric(part.strip(), "--objectives") for part in parts if part.strip())
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(
            f"--objectives {', '.join(names) or '(none)'} must be two or more different names, for "
            "instance val_loss,num_params"
        )
    return names


def check_metric(name: str, option: str) -> str:
    """The normal form of a metric's name.

    Raises:
        ConfigError: listing the choices.
    """
    if name in (*QUALITY, *ANALYTIC, *MEASURED):
        return name
    if match := _TASK.match(name):
        return f"1 - {match['task']}.{match['metric']}"
    known = ", ".join((*QUALITY, *ANALYTIC, *MEASURED))
    raise ConfigError(
        f"{option}: unknown metric {name!r}; choose from {known} "
        "or '1 - <lm-eval task>.<metric>', for instance '1 - arc_easy.acc_norm'"
    )


def task_of(name: str) -> tuple[str, str] | None:
    """The lm-eval task and its metric that an objective stands for, None if it is no task."""
    match = _TASK.match(name)
    return (match["task"], match["metric"]) if match else None


def is_cost(name: str) -> bool:
    """Whether a metric follows from the sizes (and the latency table) alone."""
    return name in ANALYTIC or name in MEASURED
