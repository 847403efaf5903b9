"""The text of the task beside this file."""

from importlib.resources import as_file, files
from typing import Any

from datasets import Dataset


def bundled(**_: Any) -> dict[str, Dataset]:
    """The held-out text, wherever `nas` is installed."""
    with as_file(files("whittle_nas") / "assets" / "pydoc-1m" / "test.jsonl") as path:
        return {"test": Dataset.from_json(str(path))}
