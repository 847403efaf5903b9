"""The page of a search: its front, its trials and its export lines."""

import json
import re

import pytest

from tests.conftest import uniform
from whittle_nas.search.html import render
from whittle_nas.search.trials import Status, Trial
from whittle_nas.space.front import Front, FrontEntry


@pytest.fixture
def data():
    trials = [
        Trial(n, uniform(8 + n, 1, 1, 8, 8, 2, of=2), Status.complete,
              {"val_loss": 4.0 - n, "perplexity": 50.0 - n, "num_params": 100 + n, "flops": 9})
        for n in range(3)
    ]  # fmt: skip
    trials.append(Trial(3, uniform(9, 1, 1, 8, 8, 1, of=2), Status.failed, {"num_params": 5}))
    entries = tuple(FrontEntry(n, t.sub, t.metrics) for n, t in enumerate(trials[:3]))
    front = Front(("val_loss", "num_params"), entries, "a</script>b", {"seed": 1})
    whole = uniform(16, 1, 1, 8, 8, 2, of=2)
    page = render(front, trials, [0.0, 0.5, 0.6, 0.6], "out/front.json", whole=whole)
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_front_and_trials_are_points(data):
    assert [row["label"] for row in data["rows"]] == ["front-0", "front-1", "front-2"]
    assert [row["label"] for row in data["others"]] == [f"trial {n}" for n in range(4)]
    loss, *_ = data["others"][3]["values"]
    assert loss is None  # it failed
    assert (data["x"], data["y"]) == ("num_params", "val_loss")


def test_objectives_come_before_other_metrics_and_sizes(data):
    columns = [(c["name"], c["group"], c["extra"]) for c in data["columns"]]
    assert columns[:5] == [
        ("val_loss", "quality", False),
        ("perplexity", "quality", True),
        ("num_params", "costs", False),
        ("flops", "costs", True),
        ("n_embd", "sizes", False),
    ]


def test_export_lines(data):
    assert data["rows"][1]["command"] == (
        "nas export --checkpoint_dir 'a</script>b' --front out/front.json --index 1 "
        "--out_dir exported-front-1"
    )
    assert "--subnetwork.n_embd 10 " in data["others"][2]["command"]
