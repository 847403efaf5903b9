"""`nas search` as a user meets it."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from litgpt import GPT, Config

from tests.cli.test_main import nas
from tests.conftest import fill_random, first_of, tiny_config
from whittle_nas.cli.parser import make_parser
from whittle_nas.cli.search import search
from whittle_nas.search.objectives import parse_objectives
from whittle_nas.space.front import read_front
from whittle_nas.weights.checkpoint import write_checkpoint
from whittle_nas.weights.info import SupernetInfo

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "path", first_of(sorted(ROOT.glob("whittle_nas/configs/*/search.yaml"))), ids=str
)
def test_every_config_is_parsed(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = make_parser("search", search)
    given = yaml.safe_load(path.read_text())
    required = {"checkpoint_dir": "x", "out_dir": "y"}
    missing = [f"--{name}={value}" for name, value in required.items() if name not in given]
    options = parser.instantiate_classes(parser.parse_args([f"--config={path}", *missing]))
    assert parse_objectives(options.objectives)
    finetune = path.with_name("finetune.yaml")
    if "checkpoint_dir" in given:  # the commands are chained by their directories
        assert given["checkpoint_dir"] == yaml.safe_load(finetune.read_text())["out_dir"]


@pytest.fixture
def common(checkpoint_dir, bundled, tmp_path) -> list[object]:
    return [
        "search", "--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out",
        "--data.files", bundled / "valid.jsonl", "--data.block_size", 32, "--data.num_blocks", 4,
        "--search_blocks", 2, "--num_trials", 8,
    ]  # fmt: skip


def test_a_finished_search_names_what_to_train(common, tmp_path, capsys):
    assert nas(*common) == 0
    budgets = re.search(r'again with (--resume true) (--budgets) "(.*)": ', capsys.readouterr().out)
    assert budgets is not None
    trials = (tmp_path / "out" / "trials.csv").read_text()
    assert nas(*common, *budgets[1].split(), budgets[2], budgets[3]) == 0
    assert (tmp_path / "out" / "trials.csv").read_text() == trials
    picks = yaml.safe_load((tmp_path / "out" / "picks.yaml").read_text())
    assert picks[0]["name"] == "num_params-80"


@pytest.mark.usefixtures("pictures")
def test_files_table_and_the_next_command(common, tmp_path, capsys):
    assert nas(*common) == 0
    shown = capsys.readouterr()
    assert "sub-networks are on the front" in shown.out
    out_dir = tmp_path / "out"
    with (out_dir / "trials.csv").open() as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [str(n) for n in range(8)]
    assert (out_dir / "front.png").read_bytes()[1:4] == b"PNG"
    assert "<svg" in (out_dir / "front.html").read_text()
    front = read_front(out_dir / "front.json", range(3))
    assert front.objectives == ("val_loss", "num_params")
    # What is printed is run: it exports the best sub-network under a budget.
    line = next(
        line
        for line in shown.out.splitlines()
        if line.startswith("export the middle one with: nas")
    )
    arguments = shlex.split(
        line.removeprefix("export the middle one with: nas ").replace("<dir>", "x")
    )
    arguments[-1] = str(tmp_path / "exported")
    assert nas(*arguments) == 0
    exported = yaml.safe_load((tmp_path / "exported" / "model_config.yaml").read_text())
    sizes = [entry.subnetwork.sizes() for entry in front.entries]
    assert any(all(exported[name] == size[name] for name in size) for size in sizes)


@pytest.mark.slow
def test_again_resumed_extended_and_overwritten(common, tmp_path, capsys):
    assert nas(*common, "--method", "random") == 0
    trials = tmp_path / "out" / "trials.csv"
    first = trials.read_text()
    assert nas(*common, "--method", "random") == 2
    assert "--resume true" in capsys.readouterr().err
    assert nas(*common, "--method", "random", "--resume", "true", "--num_trials", 10) == 0
    assert trials.read_text().startswith(first)
    assert len(trials.read_text().splitlines()) == 11
    assert nas("search", "--config", tmp_path / "out" / "run.yaml") == 0
    assert nas(*common, "--overwrite", "true", "--method", "stratified") == 0
    assert json.loads((tmp_path / "out" / "search.json").read_text())["method"] == "stratified"
    capsys.readouterr()
    assert nas(*common, "--resume", "true", "--method", "random", "--seed", 3) == 2
    error = capsys.readouterr().err
    assert 'method was "stratified" and is "random"; seed was 1337 and is 3' in error


def test_three_objectives_and_constraints(common, tmp_path, capsys):
    objectives = "--objectives=[perplexity,flops,memory_bytes]"
    assert nas(*common, objectives, "--constraints", "num_params <= 90000") == 0
    front = read_front(tmp_path / "out" / "front.json", range(3))
    assert max(entry.metrics["num_params"] for entry in front.entries) <= 90000
    assert "memory_bytes <=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objectives", "val_loss"], "two or more"),
        (["--objectives", "val_loss,speed"], "unknown metric 'speed'; choose from val_loss"),
        (["--method", "magic"], "surrogate"),
        (["--constraints", "num_params <= 10"], "nearest attainable value is"),
        (["--constraints", "num_params"], "must be a metric, one of"),
        (["--num_trials", "0"], "--num_trials 0"),
        (["--search_space", "nowhere"], "'nowhere' is neither"),
        (["--costs.tokens", "4000"], "--costs.tokens 4000"),
        (["--halving.first_blocks", "2"], "--halving.first_blocks 2"),
        (["--data.files", "missing.txt"], "missing.txt"),
        (["--devices", "0"], "--devices 0"),
        (["--costs.batch", "0"], "--costs.batch 0"),
        (["--recovery.budget", "num_params <= 1e6"], "--recovery.data.files"),
    ],
)
def test_wrong_input_is_one_sentence(common, arguments, words, capsys):
    assert nas(*common, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("nas: ")
    assert words in error


@pytest.mark.slow
def test_sizes_that_were_not_trained_are_named(common, checkpoint_dir, capsys):
    info = SupernetInfo((0, 1, 2), search_space={"n_embd": [24, 48], "n_layer": [2, 3]})
    (checkpoint_dir / "supernet.yaml").write_text(info.dump())
    assert nas(*common) == 0
    assert "not trained" not in capsys.readouterr().err
    assert nas(*common, "--overwrite", "true", "--search_space", "aligned") == 0
    warning = capsys.readouterr().err
    assert re.search(r"warning: .*was not trained for: .*n_embd=\d+", warning)


def test_lm_eval_tasks_as_objectives(checkpoint_dir, tmp_path, capsys):
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [
        {"query": "A cat is", "choices": [" an animal", " a number"], "gold": n % 2}
        for n in range(4)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "tiny_quiz.yaml").write_text(
        "task: tiny_quiz\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'q.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: query\n"
        "doc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    common = [
        "search", "--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out",
        "--num_trials", 4, "--tasks.include_path", folder, "--tasks.limit", 2,
    ]  # fmt: skip
    assert nas(*common, "--objectives", "1 - tiny_quiz.acc, num_params") == 0
    entries = read_front(tmp_path / "out" / "front.json", range(3)).entries
    assert {entry.metrics["1 - tiny_quiz.acc"] for entry in entries} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    capsys.readouterr()
    assert nas(*common, "--overwrite", "true", "--objectives", "1 - tiny_quiz.f1,flops") == 2
    assert "has no metric 'f1'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_latency_table_of_profile_is_used(common, checkpoint_dir, tmp_path, capsys):
    table = tmp_path / "table.json"
    load = ["--batch", 1, "--tokens", 16]
    arguments = ["--checkpoint_dir", checkpoint_dir, "--table", table, "--table_networks", 4]
    assert nas("profile", *arguments, *load) == 0
    shown = capsys.readouterr().out
    assert "rank correlation" in shown
    assert f"nas search --costs.latency_table {table}" in shown
    options = ["--objectives", "val_loss,latency_ms", "--costs.latency_table", table]
    options += ["--num_trials", 4]
    assert nas(*common, *options, "--costs.batch", 1, "--costs.tokens", 16) == 0
    assert "of the latency table: " in capsys.readouterr().out
    assert not (tmp_path / "out" / "latency_table.json").exists()
    assert nas(*common, *options, "--overwrite", "true", "--costs.tokens", 32) == 2
    assert "was measured for" in capsys.readouterr().err


@pytest.mark.slow
def test_times_outlive_a_limit_that_nothing_keeps(common, tmp_path, capsys):
    """They are the model's, whatever the limits: the next search in the directory goes on."""
    out = tmp_path / "out"
    options = ("--objectives", "val_loss,latency_ms", "--costs.calibrate", 0, "--costs.tokens", 8)
    assert nas(*common, *options, "--constraints", "latency_ms <= 1e-9") == 2
    assert "--constraints latency_ms <= 1e-09: no sub-network" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["latency_table.json"]
    before = json.loads((out / "latency_table.json").read_text())["times"]["prefill"]
    limit = ("--constraints", "latency_ms <= 1e9", "--num_trials", 2)
    assert nas(*common, *options, *limit) == 0, capsys.readouterr().err
    after = json.loads((out / "latency_table.json").read_text())["times"]["prefill"]
    assert before.items() <= after.items()


def test_a_search_says_which_networks_transformers_lacks(tmp_path, bundled, capsys):
    source = Config.from_file(bundled / "model_config.yaml")
    words = {name: getattr(source, name) for name in ("vocab_size", "padded_vocab_size")}
    config = tiny_config("pythia-160m", **words)
    folder, out = tmp_path / "checkpoint", tmp_path / "out"
    folder.mkdir()
    write_checkpoint(folder, fill_random(GPT(config)).state_dict(), config=config, source=bundled)
    (tmp_path / "space.yaml").write_text(f"n_embd: [{config.n_embd // 2}, {config.n_embd}]\n")
    options = ("--data.files", bundled / "valid.jsonl", "--data.block_size", 32, "--num_trials", 2)
    options += ("--data.num_blocks", 2, "--search_space", tmp_path / "space.yaml")
    assert nas("search", "--checkpoint_dir", folder, "--out_dir", out, *options) == 0
    shown = capsys.readouterr().out
    sentence = "networks on the front are no model of transformers"
    assert sentence in shown  # the whole model may be on it as well
    assert "gpt_neox needs n_embd = n_head * head_size; nearest: n_embd=" in shown
    assert sentence in (out / "front.html").read_text()
