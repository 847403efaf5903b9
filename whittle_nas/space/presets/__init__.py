"""The search spaces that ship with the package: `aligned`, and those of the papers (v1, v3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.reading import read_yaml


def preset_names() -> list[str]:
    """Names that `--search_space` accepts beside a path."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def read_space_file(name: str) -> Any:
    """The dictionary form of a preset or of a user's YAML file.

    Raises:
        ConfigError: if there is no such preset or file, or if it is not YAML.
    """
    path = Path(__file__).parent / f"{name}.yaml" if name in preset_names() else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"search space {name!r} is neither a YAML file nor one of the presets "
            f"{', '.join(preset_names())}"
        )
    return read_yaml(path, label=f"search space file {path}")
