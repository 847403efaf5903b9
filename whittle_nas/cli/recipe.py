"""A recipe: the whole line in one file, as command lines. Pure: nothing is read, run or printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whittle_nas.errors import ConfigError

_KEYS = ("checkpoint_dir", "out_dir", "text", "stages")
_TEXTS = ("train", "valid", "test")
# What a stage does with the chain: commands whose result is the next checkpoint, those that choose
# from the front of the last search, and those that go on after an interruption if told to.
CHECKPOINTS = ("importance", "finetune", "finetune-supernet", "prune")
_FROM_FRONT = ("evaluate", "export", "profile")
_RESUMABLE = ("finetune", "finetune-supernet", "search")
_MAPPINGS = ("gen_kwargs", "budgets")  # options that are mappings, not groups of options
_FILES = {"checkpoint_dir": "", "front": "front.json", "subnetworks": "picks.yaml"}
_HELD_OUT = 0.1  # of the training text, where there is no validation text


@dataclass(frozen=True)
class Stage:
    """One command of a recipe.

    Attributes:
        name: of the stage, and of its directory.
        command: of `nas`.
        options: of the command, flat, by their names on the command line.
        out_dir: what it writes.
    """

    name: str
    command: str
    options: Mapping[str, Any]
    out_dir: Path

    def words(self) -> list[str]:
        """The command line behind `nas`."""
        flags = [word for name, value in self.options.items() for word in option_words(name, value)]
        return [self.command, *flags, "--out_dir", str(self.out_dir)]


def read_stages(
    recipe: Any, commands: Iterable[str], defaults: Mapping[str, Mapping[str, Any]], label: str
) -> list[Stage]:
    """The stages of a recipe, with everything that follows from their order filled in.

    Args:
        recipe: content of the file.
        commands: names of the commands of `nas`.
        defaults: options by command that fit the model's size; those of the recipe replace them.
        label: how messages name the file.

    Raises:
        ConfigError: naming the file, the key and what would be right.
    """
    check_recipe(recipe, label)
    stages: list[Stage] = []
    for name, given in recipe["stages"].items():
        given = dict(given or {})
        command = given.pop("command", name)
        if command not in commands:
            raise ConfigError(
                f"{label}: stage {name} has command {command!r}; choose from {', '.join(commands)}"
            )
        chained = _chained(command, recipe, stages)
        chosen = {"subnetwork", "front", "extreme", "subnetworks"} & {
            k.split(".")[0] for k in given
        }
        if (chosen or _is_inside(given.get("checkpoint_dir"), stages)) and "front" not in given:
            chained.pop("front", None)
        own = _resolved(flat(given), stages)
        options = {**_fitting(defaults.get(command, {}), own), **chained, **own}
        train = (recipe.get("text") or {}).get("train")
        if command == "export" and own.get("repair") and train and "data.files" not in own:
            options["data.files"] = train  # what repair calibrates with
        if "tasks" in own and not any(key.split(".")[0] == "data" for key in own):
            options.pop("data.files", None)
        if {"data.module", "data.hub"} & own.keys():
            options = {k: v for k, v in options.items() if k in own or not k.endswith(".files")}
        if not {"data", "data.files", "data.module", "data.hub", "config"} & options.keys():
            options = {k: v for k, v in options.items() if k in own or not k.startswith("data.")}
        if "config" in own:  # before everything that replaces what it says
            options = {"config": own["config"], **options}
        out_dir = Path(recipe["out_dir"]) / name
        stages.append(Stage(name, command, options, out_dir))
    return stages


def check_recipe(recipe: Any, label: str) -> None:
    """Refuse a file that is no recipe; its options are checked by their commands."""
    if not isinstance(recipe, dict) or not isinstance(recipe.get("stages"), dict):
        raise ConfigError(f"{label} must hold checkpoint_dir, out_dir and stages, as of `nas init`")
    if unknown := [key for key in recipe if key not in _KEYS]:
        raise ConfigError(f"{label}: unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    for key in ("checkpoint_dir", "out_dir"):
        if not isinstance(recipe.get(key), str):
            raise ConfigError(f"{label}: {key} must name a directory")
    text = recipe.get("text") or {}
    if not isinstance(text, dict) or (set(text) - set(_TEXTS)):
        raise ConfigError(f"{label}: text must be files by {', '.join(_TEXTS)}")
    for name, given in recipe["stages"].items():
        if not isinstance(given, (dict, type(None))) or "out_dir" in (given or {}):
            raise ConfigError(f"{label}: stage {name} must hold options, without out_dir")
        if Path(str(name)).name != name or str(name).startswith("."):
            raise ConfigError(f"{label}: stage {name!r} must be the name of a directory")


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names, as on the command line."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict) and value and prefix + name not in _MAPPINGS:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def chosen_stages(stages: Sequence[Stage], start: str | None, end: str | None) -> slice:
    """Which stages `--from` and `--until` mean, both inclusive.

    Raises:
        ConfigError: naming the option and the stages there are.
    """
    names = [stage.name for stage in stages]
    for option, name in (("--from", start), ("--until", end)):
        if name is not None and name not in names:
            raise ConfigError(f"{option} {name} is not a stage; choose from {', '.join(names)}")
    first = 0 if start is None else names.index(start)
    last = len(names) - 1 if end is None else names.index(end)
    if last < first:
        raise ConfigError(f"--until {end} comes before --from {start}")
    return slice(first, last + 1)


def _chained(command: str, recipe: Mapping[str, Any], before: Sequence[Stage]) -> dict[str, Any]:
    """What a stage takes from those before it, and from the recipe's texts."""
    # Chosen networks become a checkpoint each, which is named: trained/<name>.
    trained = [
        stage
        for stage in before
        if stage.command in CHECKPOINTS
        and (
            not {"subnetworks", "budgets"} & {*stage.options} or stage.options.get("share") == "all"
        )
    ]
    searched = [stage for stage in before if stage.command == "search"]
    source = trained[-1].out_dir if trained else recipe["checkpoint_dir"]
    options: dict[str, Any] = {"checkpoint_dir": str(source)}
    if searched and command in _FROM_FRONT:
        options["front"] = str(searched[-1].out_dir / "front.json")
    if command in _RESUMABLE:
        options["resume"] = True
    return options | _texts(command, recipe.get("text") or {})


def _fitting(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that the recipe leaves standing: a group is replaced as a whole, or turned on."""
    if "config" in own:
        return {}
    groups = {name.split(".")[0] for name in own if "." in name}
    return {
        name: value
        for name, value in defaults.items()
        if name not in groups and name.split(".")[0] not in own
    }


def _texts(command: str, text: Mapping[str, str]) -> dict[str, Any]:
    train, valid = text.get("train"), text.get("valid")
    if train is None:
        return {}
    held_out = {"data.valid_fraction": _HELD_OUT} if valid is None else {}
    if command == "importance":
        return {"data.files": train, "data.valid_fraction": _HELD_OUT if valid is None else 0.0}
    if command in ("finetune", "finetune-supernet"):
        return {"data.files": train, **(held_out or {"valid.files": valid})}
    if command == "search":
        return {"data.files": valid or train, **held_out}
    if command == "evaluate":
        return {"data.files": text.get("test") or valid or train, **held_out}
    return {"data.files": train} if command == "prune" else {}


def _is_inside(checkpoint_dir: str | None, before: Sequence[Stage]) -> bool:
    """Whether this is one of the networks that a stage has trained: no front is about it."""
    first, _, rest = str(checkpoint_dir).partition("/")
    return bool(rest) and first in {stage.name for stage in before}


def _resolved(options: Mapping[str, Any], before: Sequence[Stage]) -> dict[str, Any]:
    """A checkpoint, front or list of choices may be named by the stage that writes it."""
    found = dict(options)
    places = {stage.name: stage.out_dir for stage in before}
    for key, file in _FILES.items():
        first, _, rest = str(found.get(key)).partition("/")
        if first in places and (not rest or key == "checkpoint_dir"):
            found[key] = str(places[first] / (rest or file))
    return found


def option_words(name: str, value: Any) -> list[str]:
    """An option as words of a command line."""
    if isinstance(value, (str, Path)):
        return [f"--{name}", str(value)]
    # JSON is YAML, which the commands read: null, true, numbers, lists and mappings.
    return [f"--{name}", json.dumps(value)]
