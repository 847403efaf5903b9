"""Finished pairs of sub-network and task on disk, so that no work is done twice."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable

from whittle_nas.errors import ConfigError
from whittle_nas.reading import read_json
from whittle_nas.space import SubNetwork
from whittle_nas.weights.files import atomic_write_text

PAIRS = "pairs"


@dataclass(frozen=True)
class Pair:
    """What is computed at one go.

    Args:
        subnetwork: Whom to ask.
        task: What to ask, by name.
        key: Everything that the result depends on, as plain values.
    """

    subnetwork: SubNetwork
    task: str
    key: dict[str, Any]

    def path(self, out_dir: Path) -> Path:
        """Where the result is kept; other keys have other files, so nothing is overwritten."""
        text = json.dumps(self.key, sort_keys=True, default=str)
        sizes = "-".join(map(str, self.subnetwork.summary().values()))
        name = f"{self.task.replace('/', '_')}-{sha256(text.encode()).hexdigest()[:12]}.json"
        return out_dir / PAIRS / sizes / name


@dataclass(frozen=True)
class Result:
    """A finished pair.

    Args:
        results: lm-eval's own dictionary of results.
        seconds: What it took.
        samples: Answers to every question, by task, where they were asked for.
    """

    results: dict[str, Any]
    seconds: float
    samples: dict[str, Any] | None = None


def read(pair: Pair, out_dir: Path) -> Result | None:
    """The result of a pair, if it was finished.

    Raises:
        ConfigError: The file is not what `write` wrote.
    """
    path = pair.path(out_dir)
    if not path.is_file():
        return None
    try:
        stored = read_json(path)
        return Result(stored["results"], float(stored["seconds"]), stored.get("samples"))
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it and run again"
        ) from error


def write(pair: Pair, result: Result, out_dir: Path) -> None:
    """Keep a result."""
    path = pair.path(out_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "key": pair.key,
        "seconds": result.seconds,
        "results": result.results,
        "samples": result.samples,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, default=handle_non_serializable)
    atomic_write_text(path, text)
