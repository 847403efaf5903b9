"""`search.json`: what a search was started with, so that `--resume` goes on with the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.reading import read_json
from whittle_nas.resuming import changes
from whittle_nas.weights.files import atomic_write_text

FILE_NAME = "search.json"


def write_settings(out_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new search."""
    atomic_write_text(out_dir / FILE_NAME, json.dumps(settings, indent=2) + "\n")


def read_settings(out_dir: Path) -> dict[str, Any]:
    """Settings of the search that a directory holds.

    Raises:
        ConfigError: if the file can't be read.
    """
    path = out_dir / FILE_NAME
    found = read_json(path, label=f"--resume: {path}")
    if not isinstance(found, dict):
        raise ConfigError(f"--resume: {path} holds no settings of a search")
    return found


def check_settings(out_dir: Path, settings: Mapping[str, Any]) -> None:
    """Compare with the settings of the search that is to be resumed.

    Raises:
        ConfigError: naming every setting that differs, with both values.
    """
    path, old = out_dir / FILE_NAME, read_settings(out_dir)
    if differing := changes(old, json.loads(json.dumps(settings))):
        raise ConfigError(
            f"--resume: {differing} (use the settings of {path}, or another --out_dir)"
        )
