"""From a typed function to a command: options, `--config`, `--print_config`, `run.yaml`."""

from __future__ import annotations

import importlib
import itertools
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import cache
from importlib import metadata
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from whittle_nas import __version__
from whittle_nas.cli.commands import PLAN, PLANNED
from whittle_nas.cli.common import is_first_process
from whittle_nas.cli.shipped import config_folders, read_path, with_shipped_configs
from whittle_nas.cli.spelling import data_of_the_line, did_you_mean, spelled_out
from whittle_nas.errors import AGAIN, ConfigError, Terminated, disk_errors
from whittle_nas.reading import read_yaml
from whittle_nas.weights.files import RUN_FILE, WEIGHTS, hold_directory

_UNION = re.compile(
    r'key "([\w.]+)": Does not validate against any of the Union subtypes '
    r"Subtypes: \[(.*)\] Errors: .*(?:Got|Given) value: (.*)"
)
_KINDS = {
    "NoneType": "null", "int": "a whole number", "float": "a number", "str": "text",
    "bool": "true or false", "list": "a list", "dict": "a mapping", "pathlib.Path": "a path",
}  # fmt: skip
_MEMBER = re.compile(r'key "([\w.]+)": Expected a member of <enum [^>]+>: {(.+?)}. Got value: (.*)')
_UNKNOWN = re.compile(r"Unrecognized arguments: (--[\w.]+)")
_REQUIRED = re.compile(r'Key "([\w.]+)" is required')


def run(name: str, command: Callable[..., None], arguments: Sequence[str]) -> None:
    """Parse the options of a command, run it and note in its `out_dir` how to repeat it.

    Raises:
        ConfigError: for an unknown option or a value of the wrong type, if another run holds
            `out_dir`, or if the disk does not take what is written.
        KeyboardInterrupt: with a sentence for the user.
    """
    parser = make_parser(name, command)
    options = parse(parser, spelled_out(name, arguments))
    # `run` and `init` have plans of their own
    if name in PLANNED and options.pop("dry_run", False):
        from whittle_nas.cli.dry_run import dry_run

        dry_run(name, parser.instantiate_classes(options))
        return
    if name != "init":  # it only looks
        _make_litgpt(options)
    record = _record(name, parser, options)
    built = parser.instantiate_classes(options)
    given = options.get("out_dir")
    out_dir = None if given is None else Path(str(given))
    again = AGAIN if options.get("resume", True) else f"{AGAIN} with --resume true"
    try:
        with (
            disk_errors(out_dir, again=again),
            _held(out_dir, record),
        ):
            command(**{key: value for key, value in vars(built).items() if key != "config"})
    except Terminated:
        raise Terminated(f"stopped by SIGTERM; {again}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {again}") from None


def _held(out_dir: Path | None, record: str) -> AbstractContextManager[None]:
    if out_dir is None or not is_first_process():
        return nullcontext()
    return hold_directory(out_dir, note=record)


@cache
def make_parser(name: str, command: Callable[..., None]) -> ArgumentParser:
    """The parser of one command; every option is named.

    Made once: reading signatures and docstrings takes longer than small commands of the library.
    """
    parser = ArgumentParser(
        prog=f"nas {name}",
        description=(command.__doc__ or "").split("\nArgs:")[0].split("\n    Args:")[0].strip(),
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with the options below.")
    parser.add_function_arguments(command, as_group=False, as_positional=False)
    if name in PLANNED:
        parser.add_argument("--dry_run", type=bool, default=False, help=PLAN)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse options; whatever is wrong becomes one sentence.

    Raises:
        ConfigError: naming the option and the value.
    """
    # A starting file that explains itself.
    commented = {"--print_config": "--print_config=comments"}
    words = with_shipped_configs([commented.get(given, given) for given in arguments])
    _check_config_files(words)
    try:
        options = parser.parse_args(data_of_the_line(words, list(parser._option_string_actions)))
    except ArgumentError as error:
        vars(parser).pop("print_config", None)  # asked for by the line that was wrong
        reason = " ".join(str(error).replace("error:", "").split())
        if missing := _REQUIRED.search(reason):
            reason = f"--{missing[1]} is required"
        elif union := _UNION.search(reason):
            reason = _none_of(*union.groups())
        elif member := _MEMBER.search(reason):
            name, members, value = member.groups()
            reason = f"--{name} {value} must be one of {members.replace(',', ', ')}"
        elif unknown := _UNKNOWN.search(reason):
            reason += did_you_mean(unknown[1], list(parser._option_string_actions))
        raise ConfigError(f"{reason} (see {parser.prog} --help)") from None
    for name, value in vars(options.as_flat()).items():
        _check_value(name, value)
        if (found := read_path(name, value, beside=config_folders(words))) != value:
            options[name] = found
        _check_files(name, found)
    _check_directories(options)
    return options


def _none_of(name: str, kinds: str, value: str) -> str:
    """A sentence for a value that is of none of the kinds that an option takes."""
    words = []
    for cls, generic in re.findall(r"<class '([\w.]+)'>|(list|dict)\[", kinds):
        module, _, kind = cls.rpartition(".")
        if known := _KINDS.get(cls or generic):
            words.append(known)
        else:  # a dataclass
            first = fields(getattr(importlib.import_module(module), kind))[0].name
            words.append(f"options of its own, such as --{name}.{first}")
    *most, last = words
    choice = f"{', '.join(most)} or {last}" if most else last
    return f"--{name} {value} must be {choice}"


def _check_config_files(arguments: Sequence[str]) -> None:
    """Read them here first: the parser does not name the file in which something is wrong."""
    for option, value in itertools.pairwise([*arguments, ""]):
        name, _, given = option.partition("=")
        path = Path(given or value)
        if name == "--config" and path.is_file():
            content = read_yaml(path, label=f"--config {path}")
            if not isinstance(content, dict):
                raise ConfigError(f"--config {path} must hold options, such as `seed: 1`")


def _check_value(name: str, value: object) -> None:
    """What no type says: paths that no system has, and seeds that generators do not take."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, (str, Path)) and "\0" in str(item):
            raise ConfigError(f"--{name} {str(item)!r} holds a null character")
    if name.rpartition(".")[2] == "seed" and isinstance(value, int) and not 0 <= value < 2**63:
        raise ConfigError(f"--{name} {value} must be at least 0 and below 2^63")


def _check_files(name: str, value: object) -> None:
    """Missing files are said before the libraries are loaded, which takes seconds."""
    last = name.rpartition(".")[2]
    if last == "files":
        for path in value if isinstance(value, list) else [value]:
            if path is not None and not Path(str(path)).exists():
                raise ConfigError(f"{name}: {path} does not exist")
    if last == "include_path" and value is not None and not Path(str(value)).is_dir():
        raise ConfigError(f"--{name} {value} is not a folder")


def _check_directories(options: Namespace) -> None:
    """What is written must not replace what is read."""
    out_dir, checkpoint_dir = options.get("out_dir"), options.get("checkpoint_dir")
    if out_dir is None or checkpoint_dir is None:
        return
    target, source = (Path(os.path.realpath(str(path))) for path in (out_dir, checkpoint_dir))
    if target == source or (target in source.parents and source.is_dir()):
        what = "is" if target == source else "holds"
        raise ConfigError(
            f"--out_dir {out_dir} {what} the --checkpoint_dir that is read; give another one"
        )


def _make_litgpt(options: Namespace) -> None:
    """Every command reads litgpt's format, also of a Hugging Face directory or an id of the hub."""
    for name in ("checkpoint_dir", "loss.teacher"):
        given = options.get(name)
        if given is None or (Path(str(given)) / WEIGHTS).is_file():
            continue
        if name == "loss.teacher" and not Path(given).is_dir():
            continue  # `original`, `in_place`; what is neither is refused where it is used
        from whittle_nas.export.hf_in import litgpt_directory

        with disk_errors(None):
            options[name] = type(given)(litgpt_directory(Path(str(given)), _say))


def _say(sentence: str) -> None:
    print(sentence, flush=True)


def _record(name: str, parser: ArgumentParser, options: Namespace) -> str:
    """Resolved options, below the versions that they ran with, as a file for `--config`."""
    packages = ("torch", "litgpt", "lightning", "lm_eval", "syne-tune", "transformers", "datasets")
    versions = [f"{package} {version}" for package in packages if (version := _version(package))]
    header = [
        f"nas {name} --config {RUN_FILE} repeats this run",
        f"whittle_nas {__version__}{_commit()}, Python {platform.python_version()}",
        ", ".join(versions),
    ]
    resolved = parser.dump(options, skip_none=False, skip_validation=True)
    return "".join(f"# {line}\n" for line in header) + resolved


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _commit() -> str:
    """The commit of a development checkout; nothing for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return f" ({done.stdout.strip()})"
    except (OSError, subprocess.CalledProcessError):
        return ""
