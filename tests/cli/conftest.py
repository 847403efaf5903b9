"""What several commands are tested with, and what need not be done again for each test."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whittle_nas.weights.files import atomic_file


@pytest.fixture
def pictures() -> None:
    """For tests that look at pictures."""


@pytest.fixture(autouse=True)
def _few_pictures(request, monkeypatch) -> None:
    """Half of the time of a small command goes into its pictures.

    Slow tests draw them, and those that ask for `pictures`: one at least for each kind.
    """
    if "pictures" in request.fixturenames or request.node.get_closest_marker("slow"):
        return

    def save(_figure: Any, path: Path) -> None:
        with atomic_file(path) as partial:
            partial.write_bytes(b"\x89PNG")

    monkeypatch.setattr("whittle_nas.plots._save", save)


@pytest.fixture(autouse=True, scope="session")
def _one_estimate_of_each_model() -> Iterator[None]:
    """Most trainings here are of the same model; what they need follows from the sizes alone."""
    from whittle_nas.train import memory

    measure, known = memory._saved_bytes, {}

    def saved_bytes(*sizes: Any) -> int:
        key = repr(sizes)
        if key not in known:
            known[key] = measure(*sizes)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_saved_bytes", saved_bytes)
        yield


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [f"{i} is a number, and so is {i * i}, its square. " * 3 for i in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path
