"""`nas run`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whittle_nas.errors import ConfigError

_LINES = "stages.json"  # the command lines of finished stages, and, by this key:
_AGAIN = "--from"  # the names of those that `--from` asked for and that have not begun since


def run(
    *,
    recipe: Path,
    from_stage: str | None = None,
    until: str | None = None,
    dry_run: bool = False,
) -> None:
    """Run the whole line from one file: sort, search, train, evaluate, export.

    `nas run recipe.yaml` runs the stages of the file in their order, each as the command that
    `--dry_run` prints, with its plan. A finished stage is not run again; one that was interrupted
    goes on. `nas init` writes a commented recipe.

    Args:
        recipe: The file; may be given without the option's name.
        from_stage: `--from`: run this stage and those after it again; when a stage begins, what is
            in its directory goes.
        until: Stop after this stage.
        dry_run: Print the commands, and what each reads, writes, needs and takes, and run nothing.
    """
    from whittle_nas.cli.common import command_line
    from whittle_nas.cli.recipe import chosen_stages

    stages = _read(recipe)
    wanted = chosen_stages(stages, from_stage, until)
    if dry_run:
        for stage in stages[wanted]:
            print(command_line("nas", *stage.words()))
        _show_plans(stages[wanted], recipe, again=from_stage is not None)
        return
    finished = _finished(stages[0].out_dir.parent)
    if from_stage is not None:
        behind = [stage.name for stage in stages[wanted.start :]]  # also what is behind `until`
        finished[_AGAIN] = list(dict.fromkeys([*finished.get(_AGAIN, ()), *behind]))
    for stage in stages[: wanted.start]:
        if not _is_done(stage):
            raise ConfigError(f"--from {from_stage}: stage {stage.name} before it is not finished")
    for stage in stages[wanted]:
        _run(stage, finished)


def _show_plans(stages: Sequence[Any], recipe: Path, *, again: bool) -> None:
    """The plans of stages, of which most read what others are still to write."""
    from whittle_nas.cli.commands import function_of
    from whittle_nas.cli.dry_run import show_plan, time_words
    from whittle_nas.cli.parser import make_parser, parse
    from whittle_nas.cli.planning.source import Source
    from whittle_nas.cli.shipped import config_path
    from whittle_nas.reading import read_yaml

    model = Path(read_yaml(Path(config_path(str(recipe))))["checkpoint_dir"])
    first = Source.of(model)
    seconds, finished = 0.0, _finished(stages[0].out_dir.parent).get(_AGAIN, ())
    for stage in stages:
        print(f"\n-- {stage.name}")
        if _is_done(stage) and not again and stage.name not in finished:
            print(f"{stage.out_dir} is there already")
            continue
        parser = make_parser(stage.command, function_of(stage.command))
        options = parser.instantiate_classes(parse(parser, stage.words()[1:]))
        made = (
            stage.options["checkpoint_dir"] == str(model)
            or (Path(str(options.checkpoint_dir)) / "model_config.yaml").is_file()
        )
        try:
            seconds += show_plan(stage.command, options, None if made else first)
        except ConfigError as error:
            print(f"no plan before the stages above have run: {error}")
            continue
        if not made:
            print(f"note: {options.checkpoint_dir} is not there yet: the recipe's model is counted")
    print(f"\nall of it: at least {time_words(seconds)}; dry run: nothing was run or written")


def _read(path: Path) -> list[Any]:
    from whittle_nas.cli.commands import COMMANDS
    from whittle_nas.cli.defaults import model_config, stage_defaults
    from whittle_nas.cli.recipe import check_recipe, read_stages
    from whittle_nas.cli.shipped import config_path
    from whittle_nas.reading import read_yaml

    path = Path(config_path(str(path)))
    recipe = read_yaml(path, label=f"--recipe {path}")
    check_recipe(recipe, str(path))
    config = model_config(recipe["checkpoint_dir"])
    commands = [name for name in COMMANDS if name not in ("run", "init")]
    stages = read_stages(recipe, commands, stage_defaults(config), str(path))
    if not stages:
        raise ConfigError(f"{path} has no stages")
    for stage in stages:
        _check(stage, path)
    return stages


def _check(stage: Any, path: Path) -> None:
    """Every stage's options, before the first stage runs for hours."""
    from whittle_nas.cli.commands import function_of
    from whittle_nas.cli.parser import make_parser, parse

    try:
        parse(make_parser(stage.command, function_of(stage.command)), stage.words()[1:])
    except ConfigError as error:
        raise ConfigError(f"{path}: stage {stage.name}: {error}") from None


def _run(stage: Any, finished: dict[str, Any]) -> None:
    from whittle_nas.cli.common import command_line
    from whittle_nas.weights.files import contents, hold_directory, remove_run

    words = stage.words()
    again = stage.name in finished.get(_AGAIN, ())
    if _is_done(stage) and not again:
        if finished.get(stage.name, words) != words:
            raise ConfigError(
                f"stage {stage.name} is finished with other options: run it and what follows "
                f"again with --from {stage.name}, or give the recipe another out_dir"
            )
        print(f"-- {stage.name} is there already", flush=True)
        return
    print(f"-- {command_line('nas', *words)}", flush=True)
    if again:  # interrupted from now on, it goes on, and what is behind it is still to be run
        _save(stage.out_dir.parent, finished)
        with hold_directory(stage.out_dir):
            remove_run(stage.out_dir, contents(stage.out_dir))
        finished[_AGAIN].remove(stage.name)
        finished.pop(stage.name, None)
        _save(stage.out_dir.parent, finished)
    options = ["--overwrite", "true"] if _left(stage) else []
    _call([*words, *options], stage.name)
    finished[stage.name] = words
    _save(stage.out_dir.parent, finished)


def _save(out_dir: Path, finished: dict[str, Any]) -> None:
    from whittle_nas.weights.files import atomic_write_text

    out_dir.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in finished.items() if name != _AGAIN or value}
    atomic_write_text(out_dir / _LINES, json.dumps(kept, indent=2) + "\n")


def _call(words: Sequence[str], name: str) -> None:
    """A command in a process of its own, whose memory is free afterwards."""
    process = subprocess.Popen([sys.executable, "-m", "whittle_nas", *words])
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to both
        process.terminate()
        process.wait()
        raise KeyboardInterrupt("interrupted; run the same command again to go on") from None
    if status:
        raise ConfigError(f"stage {name} did not end well; its last line says why")


def _is_done(stage: Any) -> bool:
    return (stage.out_dir / "run.yaml").is_file()


def _left(stage: Any) -> bool:
    """Whether an interruption left something that the command would not go on with."""
    return stage.command in ("importance", "export", "profile") and stage.out_dir.exists()


def _finished(out_dir: Path) -> dict[str, Any]:
    from whittle_nas.reading import read_json

    path = out_dir / _LINES
    return read_json(path) if path.is_file() else {}
