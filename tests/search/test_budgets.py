"""Budgets as shares of the whole model, and the file with the best under each."""

import json

import pytest
import yaml

from tests.cli.test_main import nas
from tests.conftest import uniform
from whittle_nas.errors import ConfigError
from whittle_nas.search.budgets import check_budgets, nested_picks, parse_budgets
from whittle_nas.space.front import FrontEntry


def test_budgets_are_shares_numbers_or_limits():
    assert parse_budgets("90%, 1e6,latency_ms <= 0.7x") == {
        "num_params-90": "num_params <= 90%",
        "num_params-1e6": "num_params <= 1e6",
        "latency_ms-0.7x": "latency_ms <= 0.7x",
    }
    assert parse_budgets(None) == {}
    both = {"small": "latency_ms <= 0.7x, num_params <= 60%"}
    assert parse_budgets(both) == both
    check_budgets(both, ["val_loss", "latency_ms"])
    with pytest.raises(ConfigError, match="add latency_ms to --objectives"):
        check_budgets(both, ["val_loss"])
    for wrong in ({"a/b": "flops <= 60%"}, {"small": "60%"}, {"small": ""}):
        with pytest.raises(ConfigError, match="--budgets: "):
            parse_budgets(wrong)
    with pytest.raises(ConfigError, match="--budgets: 'half'"):
        parse_budgets("90%, half")


def test_picks_are_nested_where_that_costs_little():
    """Fewer neurons, or a layer less: what is near to the best is taken for its being a part."""

    def entry(index: int, loss: float, params: int, width: int, layers: int) -> FrontEntry:
        sub = uniform(48, 4, 4, 8, width, layers)
        return FrontEntry(index, sub, {"val_loss": loss, "num_params": params})

    large, shallow = entry(0, 2.0, 90, 40, 3), entry(1, 3.0, 70, 60, 2)
    near, far = entry(2, 3.2, 70, 40, 2), entry(3, 3.4, 70, 30, 3)
    picks = nested_picks({"small": [shallow, near, far], "large": [large]}, "val_loss")
    assert picks == {"small": near, "large": large}
    assert nested_picks({"small": [shallow, far], "large": [large]}, "val_loss")["small"] == shallow
    # A worse large one would make both nested, and costs more than they gain.
    deep = entry(4, 2.3, 90, 60, 3)
    found = nested_picks({"large": [large, deep], "small": [shallow, far]}, "val_loss")
    assert found == {"large": large, "small": shallow}


@pytest.fixture(scope="module")
def searched(tmp_path_factory, bundled):
    """A search of the bundled model, whose limits are shares."""
    out_dir = tmp_path_factory.mktemp("budgets") / "search"
    status = nas(
        "search", "--checkpoint_dir", bundled, "--out_dir", out_dir,
        "--data.files", bundled / "valid.jsonl", "--data.block_size", 32, "--data.num_blocks", 4,
        "--search_blocks", 2, "--num_trials", 12, "--method", "stratified",
        "--constraints", "num_params <= 95%", "--budgets", "90%,60%,0.1%",
    )  # fmt: skip
    assert status == 0
    return out_dir


@pytest.mark.slow
def test_the_best_under_each_budget_is_written(searched):
    front = json.loads((searched / "front.json").read_text())
    whole = front["whole"]["metrics"]
    assert {"val_loss", "num_params", "flops"} <= set(whole)
    assert front["how_measured"]["constraints"] == ["num_params <= 95%"]
    assert all(e["metrics"]["num_params"] <= 0.95 * whole["num_params"] for e in front["front"])
    picks = {row.pop("name"): row for row in yaml.safe_load((searched / "picks.yaml").read_text())}
    assert set(picks) == {"num_params-90", "num_params-60"}  # nothing is below a thousandth
    for name, share in (("num_params-90", 0.9), ("num_params-60", 0.6)):
        under = [e for e in front["front"]
                 if e["metrics"]["num_params"] <= share * whole["num_params"]]  # fmt: skip
        best = min(under, key=lambda entry: entry["metrics"]["val_loss"])
        sizes = {key: value for key, value in picks[name].items() if key != "layers"}
        assert sizes == {k: v for k, v in best["subnetwork"].items() if k != "layers"}


@pytest.mark.slow
def test_other_commands_read_the_file(searched, bundled, tmp_path, capsys):
    source = ["--checkpoint_dir", bundled, "--subnetworks", searched / "picks.yaml"]
    assert nas("profile", *source, "--measure", "false") == 0
    shown = capsys.readouterr().out
    assert "num_params-90" in shown
    assert "num_params-60" in shown
    assert nas("export", *source, "--out_dir", tmp_path / "a") == 2
    assert "give one of num_params-90, num_params-60 as --name" in capsys.readouterr().err
    assert nas("export", *source, "--name", "num_params-60", "--out_dir", tmp_path / "a") == 0
    pick = ["--front", searched / "front.json", "--pick", "num_params <= 60%"]
    assert nas("export", *source[:2], *pick, "--out_dir", tmp_path / "b") == 0
    assert (
        nas("export", *source[:2], *pick[:3], "num_params <= 0.6x", "--out_dir", tmp_path / "c")
        == 0
    )
    weights = [(tmp_path / name / "lit_model.pth").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] == weights[2]


def test_the_sampler_reads_the_file(searched, bundled):
    from whittle_nas.cli.candidates import choose_candidates
    from whittle_nas.reading import read_yaml
    from whittle_nas.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(bundled)
    found = choose_candidates(checkpoint, subnetworks=searched / "picks.yaml")
    assert [one.label for one in found] == ["num_params-90", "num_params-60"]
    whole = choose_candidates(checkpoint, subnetworks=searched / "front.json")
    assert {one.label for one in whole} >= {"front-0", "front-1"}
    assert {one.subnetwork for one in found} <= {one.subnetwork for one in whole}
    from whittle_nas.space.samplers import Grid

    order = open_checkpoint(bundled).info.layer_order
    picks = read_yaml(searched / "picks.yaml")
    grid = Grid.from_dict(picks, cost=lambda _: 1.0, layer_order=order)
    assert set(grid.subs) == {one.subnetwork for one in found}


def test_a_share_that_is_not_known_is_one_sentence(searched, bundled, tmp_path, capsys):
    front = json.loads((searched / "front.json").read_text())
    del front["whole"]
    (tmp_path / "front.json").write_text(json.dumps(front))
    source = ["--checkpoint_dir", bundled, "--out_dir", tmp_path / "out"]
    pick = ["--front", tmp_path / "front.json", "--pick", "num_params <= 60%"]
    assert nas("export", *source, *pick) == 2
    assert "is a share of the whole model's num_params" in capsys.readouterr().err
    limit = ["--constraints", "val_loss <= 1.1x", "--data.files", bundled / "valid.jsonl"]
    assert nas("search", *source, *limit, "--data.block_size", 32) == 2
    assert "val_loss <= 110% is a share" in capsys.readouterr().err
