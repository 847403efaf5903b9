"""`nas run` and `nas init`: one file, the whole line."""

import json
import shlex
import shutil

import pytest
import torch
import yaml

from tests.cli.test_main import nas
from whittle_nas.cli.init import _text
from whittle_nas.cli.recipe import Stage, chosen_stages, read_stages
from whittle_nas.errors import ConfigError
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.checkpoint import open_checkpoint

COMMANDS = ("importance", "finetune", "search", "evaluate", "export", "prune", "profile")
RECIPE = {
    "checkpoint_dir": "model",
    "out_dir": "runs",
    "text": {"train": "a.jsonl", "valid": "b.jsonl"},
    "stages": {
        "sorted": {"command": "importance"},
        "supernet": {"command": "finetune", "lora": {"r": 4}},
        "search": None,
        "small": {"command": "export", "pick": "num_params <= 60%"},
        "half": {"command": "export", "checkpoint_dir": "sorted", "subnetwork.n_layer": 2},
    },
}


def stages(changes=None, defaults=None):
    recipe = {**RECIPE, **({"stages": changes} if changes else {})}
    return {s.name: s for s in read_stages(recipe, COMMANDS, defaults or {}, "recipe.yaml")}


def test_each_stage_reads_what_the_ones_before_it_wrote():
    found = stages()
    assert found["sorted"].options["checkpoint_dir"] == "model"
    assert found["supernet"].options["checkpoint_dir"] == "runs/sorted"
    assert found["search"].options["checkpoint_dir"] == "runs/supernet"
    assert found["small"].options["front"] == "runs/search/front.json"
    assert found["half"].options["checkpoint_dir"] == "runs/sorted"
    assert "front" not in found["half"].options  # its sizes are the choice
    assert found["supernet"].options["valid.files"] == "b.jsonl"
    assert found["search"].options["data.files"] == "b.jsonl"
    assert found["search"].words()[-2:] == ["--out_dir", "runs/search"]


def test_a_network_that_was_trained_alone_is_read_by_name_and_has_no_front():
    one = {"command": "finetune", "subnetworks": "search"}
    found = stages({
        "sorted": {"command": "importance"}, "search": {"budgets": {"small": "num_params <= 60%"}},
        "trained": one, "together": {**one, "share": "all"},
        "scores": {"command": "evaluate", "checkpoint_dir": "trained/small"},
        "front": {"command": "evaluate"},
    })  # fmt: skip
    assert found["search"].options["budgets"] == {"small": "num_params <= 60%"}
    assert found["trained"].options["subnetworks"] == "runs/search/picks.yaml"
    assert found["together"].options["checkpoint_dir"] == "runs/sorted"  # trained is many
    assert found["scores"].options["checkpoint_dir"] == "runs/trained/small"
    assert "front" not in found["scores"].options
    assert found["front"].options["checkpoint_dir"] == "runs/together"
    assert found["front"].options["front"] == "runs/search/front.json"


def test_the_recipe_replaces_defaults_whole_groups_too():
    defaults = {"finetune": {"lora": None, "batch_size": 8, "data.block_size": 64}}
    options = stages(defaults=defaults)["supernet"].options
    assert "lora" not in options
    assert (options["lora.r"], options["batch_size"]) == (4, 8)
    own = {"supernet": {"command": "finetune", "config": "x.yaml", "batch_size": 2}}
    words = stages(own, defaults)["supernet"].words()
    assert words[:3] == ["finetune", "--config", "x.yaml"]
    assert "--data.block_size" not in words
    tasks_only = stages({"e": {"command": "evaluate", "tasks": "x", "data.module": "Alpaca"}})
    assert "data.files" not in tasks_only["e"].options


def test_part_of_the_stages():
    rows = [Stage(name, "search", {}, None) for name in "abcd"]
    assert [row.name for row in rows[chosen_stages(rows, "b", "c")]] == ["b", "c"]
    with pytest.raises(ConfigError, match="--from x is not a stage; choose from a, b, c, d"):
        chosen_stages(rows, "x", None)
    with pytest.raises(ConfigError, match="--until a comes before --from b"):
        chosen_stages(rows, "b", "a")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": None}, "must hold checkpoint_dir, out_dir and stages"),
        ({"stage": {}}, "unknown key 'stage'"),
        ({"stages": {"a": {"command": "sort"}}}, "stage a has command 'sort'"),
        ({"stages": {"search": {"num_trial": 3}}}, "stage search: "),
        ({"stages": {"../x": {"command": "search"}}}, "must be the name of a directory"),
        ({"text": {"training": "a"}}, "text must be files by"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(
    changes, sentence, checkpoint_dir, tmp_path, capsys
):
    path = tmp_path / "recipe.yaml"
    recipe = {**RECIPE, "checkpoint_dir": str(checkpoint_dir), "out_dir": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump({**recipe, **changes}))
    assert nas("run", path) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def quick_clock(monkeypatch):
    """The device's rate is measured once for each plan, and not for a while."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("whittle_nas.metrics.measured.time.perf_counter", ticks.__next__)


@pytest.mark.usefixtures("quick_clock")
def test_init_writes_a_recipe_that_run_reads(checkpoint_dir, tmp_path, capsys):
    path, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    text.write_text("words " * 100)
    given = ("init", path, "--checkpoint_dir", checkpoint_dir, "--train", text)
    assert nas(*given, "--out_dir", tmp_path / "runs", "--device", "cpu") == 0
    assert nas(*given) == 2
    capsys.readouterr()
    assert nas("run", path, "--until", "exported", "--dry_run") == 0
    shown = capsys.readouterr().out
    commands, *plans = shown.split("\n\n")
    lines = [shlex.split(line) for line in commands.splitlines()]
    assert [line[1] for line in lines] == ["importance", "search", "finetune", "evaluate", "export"]
    pairs = [dict(zip(line[2::2], line[3::2], strict=True)) for line in lines]
    _, _, trained, evaluated, exported = pairs
    runs = tmp_path / "runs"
    assert trained["--checkpoint_dir"] == str(runs / "sorted")
    assert trained["--subnetworks"] == str(runs / "search" / "picks.yaml")
    for options in (evaluated, exported):  # the trained network, whole: no front is about it
        assert options["--checkpoint_dir"] == str(runs / "trained" / "chosen")
        assert "--front" not in options
    *plans, total = plans
    names = ["sorted", "search", "trained", "evaluated", "exported"]
    assert [plan.splitlines()[0] for plan in plans] == [f"-- {name}" for name in names]
    for plan in plans:
        assert "reads: checkpoint" in plan
        assert "no plan" not in plan
    note = f"note: {runs / 'sorted'} is not there yet: the recipe's model is counted"
    assert ["note: " in plan and note in plan for plan in plans] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert total.startswith("all of it: at least ")
    assert not runs.exists()
    assert nas(*given, "--overwrite", "true", "--memory_gib", 0.001) == 0
    assert "does not fit" in capsys.readouterr().out
    assert stages_of(path) == ["sorted", "search", "evaluated", "exported", "exported_hf"]
    assert yaml.safe_load(path.read_text())["stages"]["exported"]["repair"]


def test_init_says_what_it_would_write(checkpoint_dir, tmp_path, capsys):
    path = tmp_path / "new" / "recipe.yaml"
    given = ("init", path, "--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "runs")
    before = {*tmp_path.rglob("*")}
    assert nas(*given, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert f"would write {path}" in shown
    assert "sorted, search, trained, evaluated, exported, exported_hf" in shown
    assert {*tmp_path.rglob("*")} == before
    assert nas(*given) == 0
    assert f"{len(path.read_bytes())} bytes" in shown
    assert nas(*given, "--dry_run") == 2  # as the command itself


def stages_of(path):
    return list(yaml.safe_load(path.read_text())["stages"])


@pytest.mark.parametrize("memory", [[], ["--memory_gib", 80]])
def test_a_recipe_is_for_one_device(checkpoint_dir, tmp_path, capsys, memory):
    recipe = tmp_path / "recipe.yaml"
    given = ("init", recipe, "--checkpoint_dir", checkpoint_dir, "--device", "cpu,cpu")
    assert nas(*given, *memory) == 2
    said = "nas: --device cpu,cpu: a recipe trains on one device, name one of them\n"
    assert capsys.readouterr().err == said
    assert not recipe.exists()


def test_init_for_many_sizes_trains_first(checkpoint_dir, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    given = ("init", path, "--checkpoint_dir", checkpoint_dir, "--route", "supernet")
    assert nas(*given[:-1], "cascade") == 2
    sentence = "--route cascade must be one of chosen, supernet, nothing (see nas init --help)"
    assert sentence in capsys.readouterr().err
    assert nas(*given) == 0
    assert stages_of(path)[:3] == ["sorted", "supernet", "search"]
    lines = _text("c", None, None, None, "cuda:1", [("t", "finetune", "", {})], "").splitlines()
    assert lines[-2:] == ["    trainer.accelerator: cuda", "    trainer.devices: 1,"]
    assert yaml.safe_load(path.read_text())["stages"]["exported"]["pick"] == "num_params <= 60%"


@pytest.mark.usefixtures("quick_clock")
def test_init_searches_over_what_the_budget_names(checkpoint_dir, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    given = ("init", tmp_path / "recipe.yaml", "--checkpoint_dir", checkpoint_dir, "--train", text)
    assert nas(*given, "--budget", "latency_ms <= 0.7x, num_params <= 60%") == 0
    stages = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["stages"]
    assert stages["search"]["objectives"] == "val_loss,latency_ms,num_params"
    assert stages["search"]["budgets"] == {"chosen": "latency_ms <= 0.7x, num_params <= 60%"}
    assert nas("run", tmp_path / "recipe.yaml", "--until", "search", "--dry_run") == 0
    line = shlex.split(capsys.readouterr().out.split("\n\n")[0].splitlines()[-1])
    assert json.loads(line[line.index("--budgets") + 1]) == stages["search"]["budgets"]
    wrong = {
        "60%": "--budget: '60%' must be a metric",
        "speed <= 2": "--budget: unknown metric 'speed'",
        " , ": "--budget is empty",
    }
    for budget, sentence in wrong.items():
        assert nas(*given, "--overwrite", "true", "--budget", budget) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_init_counts_a_tied_table_once(bundled, tmp_path, capsys):
    """In a litgpt directory, where the weights say it, and in one of Hugging Face."""
    tied, exported = tmp_path / "tied", tmp_path / "exported"
    shutil.copytree(bundled, tied)
    weights = torch.load(bundled / "lit_model.pth")
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    torch.save(weights, tied / "lit_model.pth")
    table = weights["transformer.wte.weight"].numel()
    whole = sum(tensor.numel() for tensor in weights.values())
    largest = ("--subnetwork.n_layer", open_checkpoint(tied).config.n_layer)
    assert nas("export", "--checkpoint_dir", tied, "--format", "hf", *largest,
               "--out_dir", exported) == 0  # fmt: skip
    for directory in (tied, exported):
        recipe = tmp_path / f"{directory.name}.yaml"
        assert nas("init", recipe, "--checkpoint_dir", directory) == 0
        assert f"{whole - table:,} parameters" in capsys.readouterr().out
    assert nas("init", tmp_path / "untied.yaml", "--checkpoint_dir", bundled) == 0
    assert f"{whole:,} parameters" in capsys.readouterr().out


@pytest.mark.slow
def test_init_says_how_many_parameters_a_rotation_leaves(shared_data, tmp_path, capsys):
    tied = shared_data / "checkpoints" / "stories260K"
    text = ("--data.files", shared_data / "tinystories" / "valid.jsonl", "--data.num_blocks", 16)
    assert nas("importance", "--checkpoint_dir", tied, *text, "--out_dir", tmp_path / "sorted") == 0
    after = num_params(open_checkpoint(tmp_path / "sorted").config)
    for number, directory in enumerate((tied, tmp_path / "sorted")):
        assert nas("init", tmp_path / f"{number}.yaml", "--checkpoint_dir", directory) == 0
        said = capsys.readouterr().out
        assert f"{after:,} parameters" in said
        assert ("shares of a budget are of these" in said) == (directory == tied)


class Here:
    """A command in this process, which is warm; the pages of the documentation start real ones."""

    def __init__(self, line: list[str]) -> None:
        self._words = line[line.index("whittle_nas") + 1 :]

    def wait(self) -> int:
        return nas(*self._words)


@pytest.mark.slow
def test_finished_stages_are_kept_and_changed_ones_refused(
    checkpoint_dir, bundled, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("whittle_nas.cli.run.subprocess.Popen", Here)
    path = tmp_path / "recipe.yaml"
    few = {"data.num_blocks": 4, "data.block_size": 32}
    stages = {
        "sorted": {"command": "importance", **few, "layer_blocks": 2},
        "small": {"command": "export", "extreme": "smallest"},
    }

    def write():
        recipe = {
            "checkpoint_dir": str(checkpoint_dir),
            "out_dir": str(tmp_path / "out"),
            "text": {"train": str(bundled / "valid.jsonl")},
            "stages": stages,
        }
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))

    write()
    assert nas("run", path, "--until", "sorted") == 0
    assert not (tmp_path / "out/small").exists()
    made = (tmp_path / "out/sorted/run.yaml").stat().st_mtime_ns
    assert nas("run", path) == 0
    assert "-- sorted is there already" in capfd.readouterr().out
    assert (tmp_path / "out/small/lit_model.pth").is_file()
    assert (tmp_path / "out/sorted/run.yaml").stat().st_mtime_ns == made
    stages["small"]["extreme"] = "largest"
    write()
    assert nas("run", path) == 2
    assert "stage small is finished with other options" in capfd.readouterr().err
    assert nas("run", path, "--from", "small") == 0
    assert "extreme: largest" in (tmp_path / "out/small/run.yaml").read_text()
    # Interrupted in the first stage that is run again: it is not taken for done, and goes on first.
    stages["sorted"]["device"] = "cuda:99"
    write()
    assert nas("run", path, "--from", "sorted", "--until", "sorted") == 2
    assert not (tmp_path / "out/sorted/run.yaml").exists()
    del stages["sorted"]["device"]
    write()
    made = (tmp_path / "out/small/run.yaml").stat().st_mtime_ns
    assert nas("run", path) == 0
    assert (tmp_path / "out/sorted/run.yaml").is_file()
    assert (tmp_path / "out/small/run.yaml").stat().st_mtime_ns > made
    # `--from sorted` that was interrupted before it came to `small`: that is still to be run again.
    left, run_file = tmp_path / "out/stages.json", tmp_path / "out/small/run.yaml"
    left.write_text(json.dumps({**json.loads(left.read_text()), "--from": ["small"]}))
    made = run_file.stat().st_mtime_ns
    assert nas("run", path) == 0
    assert run_file.stat().st_mtime_ns > made
    assert set(json.loads(left.read_text())) == {"sorted", "small"}
