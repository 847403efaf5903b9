"""`docs/files.md` names every column and key."""

import json
from dataclasses import fields
from pathlib import Path

from tests.cli.test_main import nas
from tests.conftest import tiny_config
from whittle_nas.cli.evaluation_report import COLUMNS
from whittle_nas.importance.report import Improvement
from whittle_nas.importance.scores import Scores
from whittle_nas.metrics.latency_correction import Accuracy
from whittle_nas.search.halving import FIRST
from whittle_nas.search.objectives import ANALYTIC, MEASURED, QUALITY
from whittle_nas.search.recovery import RECOVERED
from whittle_nas.search.trials import columns
from whittle_nas.space import load_space
from whittle_nas.space.front import Front
from whittle_nas.weights.info import SupernetInfo

TEXT = (Path(__file__).parents[1] / "docs" / "files.md").read_text(encoding="utf-8")


def test_every_column_and_key_is_documented():
    per_layer = load_space({"per_layer": ["n_head"]}, tiny_config("Llama-3.1-8B"))
    assert per_layer.per_layer
    trials = columns((*QUALITY, *ANALYTIC, *MEASURED), per_layer)
    names = {*COLUMNS, *trials, FIRST, RECOVERED}
    for value in (Improvement, Accuracy, SupernetInfo, Front):
        names |= {field.name for field in fields(value)}
    names |= {f"scores.{field.name}" for field in fields(Scores)}
    names -= {
        "path",
        "entries",
        "norms",
    }  # of a `Front` and a `SupernetInfo`, but not of their files
    assert not {name for name in names if f"`{name}`" not in TEXT}


def test_every_cost_of_a_profile_is_documented(checkpoint_dir, tmp_path):
    where = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out"]
    assert nas("profile", *where, "--tokens", 8, "--repeats", 1) == 0
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert not {n for n in [*found, *found["subnetworks"][0]] if f"`{n}`" not in TEXT}
