"""Tasks of the LM Evaluation Harness: found, loaded once, and reused for every sub-network."""

import contextlib
import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.presets import TaskChoice


@dataclass(frozen=True)
class TaskOptions:
    """What changes the questions that a task asks.

    Args:
        limit: Documents per task: a count, or a share below 1; None: all.
        seed: Of few-shot examples and of sampled answers.
        apply_chat_template: Wrap prompts in the checkpoint's chat template.
        system_instruction: What stands before every prompt.
        fewshot_as_multiturn: Examples as turns of a conversation.
        gen_kwargs: Changes to the generation options of the tasks.
    """

    limit: float | None = None
    seed: int = 1337
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    gen_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedTask:
    """A task or group with its documents.

    Args:
        choice: What was asked for.
        parts: What `lm_eval.evaluator.evaluate` takes: leaf tasks and groups by name.
        fingerprint: Hash of everything that decides the questions and the metrics.
    """

    choice: TaskChoice
    parts: Any
    fingerprint: str

    @property
    def leaves(self) -> dict[str, Task]:
        """The tasks that are asked, by name."""
        return self.parts["tasks"]


def load_tasks(
    choices: Sequence[TaskChoice], options: TaskOptions, *, include_path: Path | None = None
) -> list[LoadedTask]:
    """Find tasks and load their documents.

    Args:
        choices: What to load; a tag becomes all tasks that carry it.
        options: Limit, seed and prompt.
        include_path: Folder with task files of one's own, which come before lm-eval's.

    Raises:
        ConfigError: An unknown task, or a data set that can't be had.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include_path {include_path} is not a folder")
    if options.limit is not None and not options.limit > 0:
        raise ConfigError(f"--limit {options.limit} must be above 0: a count, or a share below 1")
    if not choices:
        return []
    manager = _manager([choice.name for choice in choices], include_path)
    loaded: dict[str, LoadedTask] = {}
    for choice in choices:
        for found in _load(manager, choice):
            name = next(iter(found["groups"] or found["tasks"]))
            if name in loaded:
                continue
            _configure(found["tasks"].values(), choice, options)
            one = TaskChoice(name, choice.num_fewshot, choice.metric)
            loaded[name] = LoadedTask(one, found, _fingerprint(found["tasks"], options))
    return list(loaded.values())


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """An index of the tasks; of all of lm-eval's 14,000 files, 12 s, only where a name needs it.

    Groups and tags do: what belongs to them may be in any folder. A task is in one file.
    """
    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    elif folders := {folder for name in names if (folder := _folder(name)) is not None}:
        few = TaskManager(include_path=sorted(folders), include_defaults=False)
        if set(names) <= set(few.all_subtasks):
            return few
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            raise ConfigError(_unknown(name, manager.all_tasks))
    return manager


def _folder(name: str) -> str | None:
    """lm-eval's folder that is named like a task, or like its beginning: `arc` of `arc_easy`."""
    root, words = Path(lm_eval.tasks.__file__).parent, name.split("_")
    paths = (root / "_".join(words[:count]) for count in range(len(words), 0, -1))
    return next((str(path) for path in paths if path.parent == root and path.is_dir()), None)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    near += [other for other in known if name in other][: 4 - len(near)]
    hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else "see `lm-eval ls tasks`"
    return f"--tasks: unknown task {name!r}; {hint} (tasks of your own: --include_path)"


def _load(manager: TaskManager, choice: TaskChoice) -> Iterator[Any]:
    """One entry for a task or a group, one per task for a tag."""
    try:
        found = manager.load([choice.name])
    except ImportError as error:
        raise ConfigError(
            f"task {choice.name!r} needs a package that is missing: {error}"
        ) from error
    except Exception as error:
        # A data set that can't be had ends in a dozen kinds of errors, some bare RuntimeErrors.
        raise ConfigError(_no_data(manager, choice.name, error)) from error
    if found.get("groups"):
        yield found
        return
    for name, task in found["tasks"].items():
        yield {"tasks": {name: task}, "groups": {}, "group_map": {}}


def _no_data(manager: TaskManager, name: str, error: Exception) -> str:
    settings = _settings(manager, name)
    data_set, files = settings.get("dataset_path"), settings.get("dataset_kwargs") or {}
    reason = " ".join(str(error).split())[:200]
    if files.get("data_files"):
        return (
            f"task {name!r} reads {json.dumps(files['data_files'])}, which can't be read from the "
            f"current folder {Path.cwd()}: {reason}"
        )
    if data_set is None:
        return f"task {name!r} can't be loaded: {type(error).__name__}: {reason}"
    offline = any(os.environ.get(key) == "1" for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return (
        f"task {name!r} needs the data set {data_set!r} from the Hugging Face hub, which can't be "
        f"loaded{' while HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set' if offline else ''} "
        f"({type(error).__name__}: {reason}): run once with a network, or copy the task's file "
        "into a folder for --include_path with `dataset_path: json` and `dataset_kwargs: "
        "{data_files: ...}` pointing to local files"
    )


def _settings(manager: TaskManager, name: str) -> dict[str, Any]:
    """The YAML of a task, or of the first task of a group or tag."""
    entry = manager.task_index.get(name)
    for _ in range(5):  # groups of groups
        if entry is None or (entry.cfg or {}).get("dataset_path"):
            break
        below = [*(entry.cfg or {}).get("task", []), *sorted(entry.tags)]
        below += [e.name for e in manager.task_index.values() if name in e.tags][:1]
        names = [b if isinstance(b, str) else b.get("task", "") for b in below]
        entry = next((manager.task_index[n] for n in names if n in manager.task_index), None)
    return (entry.cfg if entry is not None else None) or {}


def _configure(tasks: Any, choice: TaskChoice, options: TaskOptions) -> None:
    """Few-shot numbers, seeds and generation options, by the rules of lm-eval's own front end."""
    for task in tasks:
        own_shots = task.get_config("num_fewshot")
        if own_shots is None:
            task.set_config("num_fewshot", choice.num_fewshot or 0)
        elif own_shots != 0 and choice.num_fewshot is not None:  # a task's own 0 is meant
            task.set_config("num_fewshot", choice.num_fewshot)
        if options.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", options.gen_kwargs, update=True)
        task.set_fewshot_seed(seed=options.seed)
        # built for the first sub-network, asked again of all others
        task.build_all_requests = partial(_build_once, task, task.build_all_requests)


def _build_once(task: Task, build: Any, **options: Any) -> None:
    if getattr(task, "_instances", None) is None:
        with _no_bar():
            build(**options)
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Hide lm-eval's progress bar, which can't be turned off, from log files."""
    if sys.stderr.isatty():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def _fingerprint(tasks: dict[str, Task], options: TaskOptions) -> str:
    """Hash of settings and documents: the same files give the same hash in every process."""
    digest = sha256()
    for name, task in tasks.items():
        settings = dict(task.dump_config())
        settings["metadata"] = {"version": task.VERSION}  # lm-eval adds the path of the file
        settings.pop("dataset_kwargs", None)  # more paths; what the files hold is hashed below
        text = json.dumps(settings, sort_keys=True, default=handle_non_serializable)
        digest.update(re.sub(r"0x[0-9a-f]+", "", f"{name}{text}").encode())
        shots = task.get_config("num_fewshot")
        for docs in (task.eval_docs, task.fewshot_docs() if shots else []):
            for number, doc in enumerate(docs or []):
                if options.limit is not None and 1 <= options.limit <= number and not shots:
                    break
                digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
