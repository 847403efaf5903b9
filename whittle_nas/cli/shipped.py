"""What ships with `nas` is found from any folder: configs, and the bundled model with its texts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

_ROOT = Path(str(files("whittle_nas")))
# Options that read; those that write must never reach into the package.
_READ = ("checkpoint_dir", "include_path", "files")


def config_path(given: str) -> str:
    """The file that `--config` means: `Llama-3.1-8B/finetune` is one that ships with `nas`."""
    shipped = _ROOT / "configs" / given
    for path in (shipped, shipped.with_name(f"{shipped.name}.yaml")):
        if not Path(given).exists() and path.is_file():
            return str(path)
    return given


def with_shipped_configs(arguments: Sequence[str]) -> list[str]:
    """Command-line words with the paths of shipped configs."""
    words = list(arguments)
    for at, word in enumerate(words):
        if word == "--config" and at + 1 < len(words):
            words[at + 1] = config_path(words[at + 1])
        elif _is_config(word):
            words[at] = f"--config={config_path(word.partition('=')[2])}"
    return words


def config_folders(arguments: Sequence[str]) -> list[Path]:
    """Where the files of `--config` lie."""
    after = itertools.pairwise([*arguments, ""])
    given = [word.partition("=")[2] or value for word, value in after if _is_config(word)]
    return [Path(path).parent for path in given]


def _is_config(word: str) -> bool:
    return word.partition("=")[0] == "--config"


def read_path(name: str, value: Any, *, beside: Sequence[Path] = ()) -> Any:
    """The value of an option that reads: what is not here is looked for elsewhere.

    Args:
        name: of the option.
        value: what was given, for instance `pydoc-1m/train.jsonl`, which ships with `nas`.
        beside: folders in which a relative path may begin as well, those of config files.
    """
    if name.rpartition(".")[2] not in _READ:
        return value
    if isinstance(value, list):
        return [read_path(name, item, beside=beside) for item in value]
    if not isinstance(value, (str, Path)) or Path(value).exists() or Path(value).is_absolute():
        return value
    for path in (folder / value for folder in beside):
        if path.exists():
            return type(value)(str(path)) if isinstance(value, str) else path
    for folder in ("assets", "configs"):
        path = _ROOT / folder / value
        if path.exists() and ".." not in Path(value).parts and str(value) not in ("", "."):
            return type(value)(str(path)) if isinstance(value, str) else path
    return value
