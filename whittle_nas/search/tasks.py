"""lm-eval tasks as objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whittle_nas.data import load_tokenizer
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate import report, running, tasks
from whittle_nas.evaluate.encoding import TextEncoder
from whittle_nas.evaluate.harness import LitGPTHarness
from whittle_nas.evaluate.presets import TaskChoice
from whittle_nas.search.objectives import task_of
from whittle_nas.search.options import TaskOptions


class TaskScorer:
    """Asks sub-networks the tasks of some objectives; the questions are loaded once."""

    def __init__(
        self,
        objectives: Sequence[str],
        checkpoint_dir: Path,
        config: Any,
        options: TaskOptions,
        batch_size: int | None,
    ) -> None:
        """Load the tasks.

        Args:
            objectives: names of the form `1 - <task>.<metric>`.
            checkpoint_dir: directory with the tokenizer.
            config: litgpt config of the model.
            options: how to ask.
            batch_size: sequences per batch; None: chosen for the device.

        Raises:
            ConfigError: for an unknown task or metric, or a task whose data can't be had.
        """
        self._wanted = {name: wanted for name in objectives if (wanted := task_of(name))}
        self._asked = options
        self._loaded: dict[float | None, list[tasks.LoadedTask]] = {}
        for task in self._load(options.limit):
            for name, leaf in task.leaves.items():
                self._check(name, leaf.higher_is_better() or {})
        tokenizer = load_tokenizer(checkpoint_dir, config)
        self._encoder = TextEncoder(tokenizer, checkpoint_dir)
        self._batch_size = batch_size

    def __call__(self, model: Any, *, whole: bool) -> dict[str, float]:
        """Values of the objectives.

        Args:
            model: a plain litgpt model.
            whole: ask all questions, whatever the limit is.
        """
        harness = LitGPTHarness(model, self._encoder, batch_size=self._batch_size)
        limit = None if whole else self._asked.limit
        options = tasks.TaskOptions(limit=limit)
        run = running.RunOptions(bootstrap_iters=0)
        found: dict[tuple[str, str], float] = {}
        for task in self._load(limit):
            result = running.run_task(harness, task, options, run)
            for score in report.scores(result.results):
                found.setdefault((score.task, score.metric), score.value)
        return {name: 1.0 - found[key] for name, key in self._wanted.items()}

    def _load(self, limit: float | None) -> list[tasks.LoadedTask]:
        """The tasks; lm-eval keeps the questions with them, so there is a set for each limit."""
        if limit not in self._loaded:
            names = dict.fromkeys(task for task, _ in self._wanted.values())
            choices = [TaskChoice(name, self._asked.num_fewshot) for name in names]
            options, folder = tasks.TaskOptions(limit=limit), self._asked.include_path
            self._loaded[limit] = tasks.load_tasks(choices, options, include_path=folder)
        return self._loaded[limit]

    def _check(self, task: str, metrics: Mapping[str, bool]) -> None:
        """Refuse metrics that a task lacks or that grow with the error."""
        for name, (wanted, metric) in self._wanted.items():
            if wanted == task and not metrics.get(metric):
                useful = [known for known, better in metrics.items() if better]
                raise ConfigError(
                    f"--objectives {name!r}: task {task} has no metric {metric!r} of which more is "
                    f"better; it has {', '.join(useful) or 'none'}"
                )
