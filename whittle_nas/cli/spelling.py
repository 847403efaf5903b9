"""What a user types and what the parser wants: short forms, and the nearest name of a wrong one."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Sequence

from whittle_nas.errors import ConfigError

_SOURCES = ("files", "hub", "module", "sources")
_LOGGERS = {
    "csv": "CSVLogger",
    "tensorboard": "TensorBoardLogger",
    "wandb": "WandbLogger",
    "mlflow": "MLFlowLogger",
    "none": None,
}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names what is nearest; empty if nothing is near."""
    options = [name for name in known if len(name) > 2]
    # A last part that is right is the best hint: `--lr` is `--optimizer.lr`.
    last = [name for name in options if name.rpartition(".")[2] == word.lstrip("-")]
    near = last or difflib.get_close_matches(word, options, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def spelled_out(command: str, arguments: Sequence[str]) -> list[str]:
    """Words for the parser.

    `nas run recipe.yaml --from x --dry_run` has what Python's names do not allow; `--logger wandb`
    is short for a list of Lightning's classes; `--lora.r 32` asks for adapters.

    Raises:
        ConfigError: for a logger that has no short name.
    """
    given = list(arguments)
    if command.startswith("finetune"):
        return _with_adapters(_with_logger(given))
    if command not in ("run", "init"):
        return given
    if given and not given[0].startswith("-"):
        given.insert(0, "--recipe")
    given = [
        word.replace("--from", "--from_stage", 1) if word.split("=")[0] == "--from" else word
        for word in given
    ]
    if "--dry_run" in given:
        after = given.index("--dry_run") + 1
        if after == len(given) or given[after].startswith("-"):
            given.insert(after, "true")
    return given


def _with_logger(given: list[str]) -> list[str]:
    words: list[str] = []
    rest = iter(given)
    for word in rest:
        option, _, value = word.partition("=")
        if option != "--logger":
            words.append(word)
            continue
        name = value or next(rest, "")
        if name not in _LOGGERS:
            raise ConfigError(
                f"--logger {name} is none of {', '.join(_LOGGERS)}; give any other of Lightning's "
                "by --trainer.logger"
            )
        path = _LOGGERS[name]
        classes = [{"class_path": f"lightning.pytorch.loggers.{path}"}] if path else []
        words += ["--trainer.logger", json.dumps(classes)]
    return words


def _with_adapters(given: list[str]) -> list[str]:
    """Who describes adapters wants them, also with the numbers that they have by default.

    Only the line tells these apart: a file such as `run.yaml` holds every option.
    """
    split = [word.partition("=") for word in [*given, ""]]
    values = [
        (option, value or after) for (option, _, value), (after, *_) in itertools.pairwise(split)
    ]
    described = any(
        option.startswith("--lora.") or (option == "--lora" and value != "null")
        for option, value in values
    )
    chosen = any(option == "--weights" and value != "auto" for option, value in values)
    return [*given, "--weights", "adapters"] if described and not chosen else given


def data_of_the_line(words: Sequence[str], known: Sequence[str]) -> list[str]:
    """Text that is named on the command line replaces that of a config file.

    A source has one kind: without this, `--data.files` would be added to the file's `data.module`,
    and refused.
    """
    found: list[str] = []
    configs = [at for at, word in enumerate(words) if word.split("=")[0] == "--config"]
    named = {word.split("=")[0] for word in words}
    for at, word in enumerate(words):
        option = word.split("=")[0]
        group, _, kind = option.rpartition(".")
        if configs and at > configs[-1] and kind in _SOURCES and option.startswith("--"):
            others = [f"{group}.{other}" for other in _SOURCES]
            for other in others:
                if other in known and other not in named:
                    found += [other, "[]" if other.endswith("sources") else "null"]
        found.append(word)
    return found
