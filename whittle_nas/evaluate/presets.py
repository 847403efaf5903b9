"""The task lists of the papers, and which number of a task is its headline."""

from dataclasses import dataclass

from whittle_nas.errors import ConfigError


@dataclass(frozen=True)
class TaskChoice:
    """One task to run.

    Args:
        name: Name in lm-eval: a task, a group of tasks, or a tag.
        num_fewshot: Examples before each question; None: as the task says itself.
        metric: Its headline, `metric` or `metric,filter`; None: see `headline`.
    """

    name: str
    num_fewshot: int | None = None
    metric: str | None = None


# The papers' lists, with their shots and metrics (README.md, Sources).
PRESETS = {
    "v1": (
        TaskChoice("winogrande", 0, "acc"),
        TaskChoice("arc_challenge", 0, "acc_norm"),
        TaskChoice("mmlu", 0, "acc"),
        TaskChoice("hellaswag", 0, "acc_norm"),
        TaskChoice("truthfulqa_mc2", 0, "acc"),
    ),
    "v3": (
        TaskChoice("winogrande", 5, "acc"),
        TaskChoice("hellaswag", 10, "acc_norm"),
        TaskChoice("arc_challenge", 25, "acc_norm"),
        TaskChoice("arc_easy", 0, "acc_norm"),
        TaskChoice("piqa", 0, "acc"),
        TaskChoice("boolq", 0, "acc"),
        TaskChoice("truthfulqa_mc2", 0, "acc"),
        TaskChoice("gsm8k", 5, "exact_match,strict-match"),
        TaskChoice("mmlu", 5, "acc"),
        TaskChoice("lambada_openai", 0, "acc"),
        TaskChoice("mathqa", 0, "acc_norm"),
    ),
}

# the first of these that a task has is what a picture of it shows
HEADLINES = ("acc", "exact_match", "acc_norm", "f1", "bits_per_byte", "nats_per_token")


def choose_tasks(names: list[str], num_fewshot: int | None = None) -> list[TaskChoice]:
    """The tasks behind names, presets spelled out, each task once.

    Args:
        names: Names of lm-eval tasks, groups or tags, or of presets.
        num_fewshot: Overrides what presets and tasks say.

    Raises:
        ConfigError: A negative `num_fewshot`.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"--num_fewshot {num_fewshot} must be 0 or more")
    chosen: dict[str, TaskChoice] = {}
    for name in names:
        for task in PRESETS.get(name, (TaskChoice(name),)):
            shots = task.num_fewshot if num_fewshot is None else num_fewshot
            chosen.setdefault(task.name, TaskChoice(task.name, shots, task.metric))
    return list(chosen.values())


def headline(metrics: list[str], wanted: str | None = None) -> str | None:
    """Which of a task's metrics, named `metric,filter`, stands for it.

    Args:
        metrics: What the task reports.
        wanted: `metric` or `metric,filter` that a preset asks for.
    """
    for name in (wanted, *HEADLINES):
        for metric in metrics:
            if name and name in (metric, metric.partition(",")[0]):
                return metric
    return metrics[0] if metrics else None
