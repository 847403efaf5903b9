"""The page of an evaluation: every score with its error, costs, and export lines."""

import json
import re
import shlex

from tests.cli.test_main import nas
from tests.conftest import uniform
from tests.evaluate.conftest import task_folder  # noqa: F401 - a fixture
from whittle_nas.cli.evaluation_page import render
from whittle_nas.evaluate.report import Score
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import open_checkpoint

SUB, WHOLE = uniform(8, 2, 1, 4, 16, 2, of=2), uniform(8, 2, 1, 4, 32, 2, of=2)


def content(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def score(task: str, metric: str, value: float, stderr: float | None, chain: str = "none") -> Score:
    return Score(task, metric, chain, value, stderr, metric.startswith("acc"), 0, 8)


def test_scores_costs_and_sizes_are_columns():
    first = [score("arc", "acc", 0.5, 0.1), score("wiki", "loss", 3.0, None)]
    second = [*first, score("arc", "acc", 0.25, None, "strict")]
    data = content(
        render(
            "ckpt",
            {"a": SUB, "full": WHOLE},
            whole=WHOLE,
            costs=[{"num_params": 7, "latency_ms": None, "flops": 3, "val_loss": 2.0},
                   {"num_params": 9, "latency_ms": None}],
            scores=[first, second],
            headlines={"arc": "acc,none", "wiki": "loss,none"},
            about={},
        )
    )  # fmt: skip
    columns = {c["name"]: c for c in data["columns"]}
    assert list(columns)[:6] == [
        "arc acc", "arc acc (strict)", "wiki loss", "num_params", "flops", "val_loss",
    ]  # fmt: skip
    assert [name for name, c in columns.items() if c["extra"]] == [
        "arc acc (strict)", "flops", "val_loss",
    ]  # fmt: skip
    assert columns["arc acc"]["lower_is_better"] is False
    assert columns["wiki loss"]["lower_is_better"] is True
    assert data["rows"][0]["values"][:6] == [0.5, None, 3.0, 7, 3, 2.0]
    assert data["rows"][0]["stderrs"][:3] == [0.1, None, None]
    assert data["rows"][1]["values"][:6] == [0.5, 0.25, 3.0, 9, None, None]
    assert (data["x"], data["y"]) == ("num_params", "arc acc")
    assert data["original"] == data["rows"][1]


def test_a_task_without_numbers_is_no_obstacle():
    what = {"costs": [{"num_params": 7}], "scores": [[]], "headlines": {}, "about": {}}
    data = content(render("c", {"a": SUB}, whole=WHOLE, **what))
    assert data["y"] == "num_params"
    assert data["original"] is None


def test_command_leaves_the_page_and_its_lines_run(
    checkpoint_dir,
    task_folder,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.chdir(tmp_path)
    common = ["--checkpoint_dir", checkpoint_dir, "--include_path", task_folder]
    options = ["--tasks", "tiny_choice", "--subnetwork.n_layer", 2, "--subnetwork.n_embd", 32]
    assert nas("evaluate", *common, *options, "--out_dir", "out", "--include_full", "true") == 0
    data = content((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert [row["label"] for row in data["rows"]] == ["subnetwork", "full"]
    assert data["y"].startswith("tiny_choice acc")
    assert data["original"]["label"] == "full"
    words = shlex.split(data["rows"][0]["command"])
    assert nas(*words[1:]) == 0
    exported = SubNetwork.from_config(open_checkpoint(tmp_path / "exported-subnetwork").config)
    assert (exported.n_layer, exported.n_embd) == (2, 32)
