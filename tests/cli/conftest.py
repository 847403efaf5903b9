"""What several commands are tested with."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [f"{i} is a number, and so is {i * i}, its square. " * 3 for i in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path
