"""From finished pairs to files and tables."""

import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.utils import handle_non_serializable

from whittle_nas.evaluate.store import Result

# the parts of lm-eval's result that have one entry per task
PER_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot",
            "higher_is_better", "n-samples")  # fmt: skip


@dataclass(frozen=True)
class Score:
    """One number of one task.

    Args:
        task: Task or group.
        metric: Name of the metric.
        filter: What was applied to answers before.
        value: The number.
        stderr: Its standard error, where there is one.
        higher_is_better: Which way is up, where the task says so.
        n_shot: Examples before each question.
        n_samples: Questions.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    n_shot: int | None
    n_samples: int | None

    @property
    def name(self) -> str:
        """As lm-eval names it."""
        return f"{self.metric},{self.filter}"

    def number(self) -> str:
        """The value with its standard error."""
        return f"{self.value:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")

    def __str__(self) -> str:
        """Metric and number."""
        return f"{self.metric} {self.number()}"


def merge(finished: Sequence[Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """The results of one sub-network in lm-eval's own layout.

    Args:
        finished: One result per task.
        about: What goes into `config`: model, limits, seeds.
    """
    merged: dict[str, Any] = {part: {} for part in PER_TASK}
    for result in finished:
        for part in PER_TASK:
            merged[part].update(result.results.get(part, {}))
    if not merged["groups"]:
        del merged["groups"]  # as lm-eval leaves it out
    merged["config"] = dict(about)
    merged["git_hash"] = _commit()
    merged["date"] = time.time()
    merged["total_evaluation_time_seconds"] = str(sum(result.seconds for result in finished))
    return merged


def dump(results: Mapping[str, Any]) -> str:
    """JSON text of results, numbers and odd values as lm-eval writes them."""
    return json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)


def dump_samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """One JSON line per question, as lm-eval's `samples_<task>.jsonl`."""
    lines = (json.dumps(s, ensure_ascii=False, default=handle_non_serializable) for s in samples)
    return "".join(f"{line}\n" for line in lines)


def scores(results: Mapping[str, Any]) -> Iterator[Score]:
    """Every number in a dictionary of results."""
    for task, metrics in results["results"].items():
        better = results["higher_is_better"].get(task, {})
        samples = results["n-samples"].get(task, {})
        for key, value in metrics.items():
            metric, comma, chain = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chain}")
            yield Score(
                task=task,
                metric=metric,
                filter=chain,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=better.get(metric),
                n_shot=results["n-shot"].get(task),
                n_samples=samples.get("effective", metrics.get("sample_len")),
            )


def _commit() -> str | None:
    """What lm-eval calls `git_hash`, of the current folder; git's complaints are not shown."""
    try:
        command = ["git", "describe", "--always"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
