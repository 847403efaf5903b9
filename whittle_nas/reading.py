"""Reading YAML and JSON that anyone may have written: values only, and one sentence if not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from whittle_nas.errors import ConfigError

_MOST = 10**6  # values; aliases make as many of a few lines of YAML as one likes


def read_yaml(path: Path, *, label: str = "") -> Any:
    """Plain values of a YAML file; tags that would make Python objects are refused.

    Args:
        path: the file.
        label: how messages name it, by default its path.

    Raises:
        ConfigError: if it can't be read or is not YAML.
    """
    return _read(path, yaml.safe_load, "YAML", label or str(path))


def read_json(path: Path, *, label: str = "") -> Any:
    """Values of a JSON file; arguments and errors as `read_yaml`."""
    return _read(path, json.loads, "JSON", label or str(path))


def _read(path: Path, parse: Any, language: str, label: str) -> Any:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{label} can't be read: {error.strerror}") from None
    # ValueError: no UTF-8, no JSON, or what looks like a date and is none.
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{label} is not valid {language}: {reason}") from None
    _check_size(content, label)
    return content


def _check_size(content: Any, label: str) -> None:
    left, count = [content], 0
    while left:
        value = left.pop()
        inside = list(value.values()) if isinstance(value, dict) else value
        if isinstance(inside, (list, set)):
            left.extend(inside)
            count += len(inside)
        if count > _MOST:
            raise ConfigError(f"{label} holds more than {_MOST:,} values")
