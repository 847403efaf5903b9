"""`nas evaluate` as a user meets it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.test_main import nas
from tests.conftest import first_of, resized
from tests.evaluate.conftest import task_folder  # noqa: F401 - a fixture
from whittle_nas import api
from whittle_nas.errors import ConfigError
from whittle_nas.space import SubNetwork
from whittle_nas.space.front import Front, FrontEntry
from whittle_nas.space.samplers import Grid, GridMember
from whittle_nas.weights.checkpoint import open_checkpoint


@pytest.fixture
def common(checkpoint_dir, task_folder, tmp_path) -> list[object]:  # noqa: F811
    return [
        "--checkpoint_dir", checkpoint_dir, "--include_path", task_folder,
        "--out_dir", tmp_path / "out", "--bootstrap_iters", 10,
    ]  # fmt: skip


@pytest.fixture
def front_file(checkpoint_dir, tmp_path) -> Path:
    full = SubNetwork.from_config(open_checkpoint(checkpoint_dir).config)
    entries = []
    for index, n_layer in enumerate((1, 2)):
        sub = resized(full, n_layer=n_layer)
        metrics = {"val_loss": 3.0 - index, "latency_ms": 5.0 + index}
        entries.append(FrontEntry(index, sub, metrics))
    path = tmp_path / "front.json"
    path.write_text(Front(("val_loss",), tuple(entries), str(checkpoint_dir)).dump())
    return path


def rows(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_front_on_tasks_and_text(common, front_file, tmp_path, bundled, capsys, pictures):
    out_dir = tmp_path / "out"
    arguments = [
        *common, "--front", front_file, "--include_full", "true", "--log_samples", "true",
        "--tasks", "tiny_choice,tiny_text", "--data.files", bundled / "valid.jsonl",
        "--data.num_blocks", 2, "--data.block_size", 32,
    ]  # fmt: skip
    assert nas("evaluate", *arguments) == 0
    shown = capsys.readouterr()
    assert all(word in shown.out for word in ("front-0", "front-1", "full", "acc", "±"))
    found = rows(out_dir)
    assert {row["task"] for row in found} == {"text", "tiny_choice", "tiny_text"}
    assert {row["subnetwork"] for row in found} == {"front-0", "front-1", "full"}
    assert {row["latency_ms"] for row in found} == {"5.0", "6.0", ""}
    for label in ("front-0", "front-1", "full"):
        results = json.loads((out_dir / label / "results.json").read_text())
        assert set(results["results"]) == {"text", "tiny_choice", "tiny_text"}
        assert len((out_dir / label / "samples_tiny_choice.jsonl").read_text().splitlines()) == 8
    for name in ("text.png", "tiny_choice.png", "tiny_text.png"):
        assert (out_dir / name).read_bytes()[1:4] == b"PNG"

    pictures.undo()  # the same pictures four times more
    # again: nothing is computed, and the answer is the same
    assert nas("evaluate", *arguments) == 0
    shown_again = capsys.readouterr()
    assert "9 of 9 pairs are finished already" in shown_again.err
    assert shown_again.out == shown.out
    # and with another task only that one is
    arguments[arguments.index("tiny_choice,tiny_text")] = "tiny_choice,tiny_document"
    assert nas("evaluate", *arguments) == 0
    assert "6 of 9 pairs" in capsys.readouterr().err
    # the settings can be given as the file that the run left
    assert nas("evaluate", "--config", out_dir / "run.yaml") == 0
    assert "9 of 9 pairs" in capsys.readouterr().err
    # unless they are wanted anew
    assert nas("evaluate", "--config", out_dir / "run.yaml", "--overwrite", "true") == 0
    assert "finished already" not in capsys.readouterr().err


def test_a_module_is_scored_on_its_validation_split(common, tmp_path, capsys):
    rows = [{"instruction": f"Add {i}.", "output": f"Sum {i}"} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = json.dumps({"json_path": str(tmp_path / "rows.json"), "val_split_fraction": 0.25})
    source = f'[{{"module": "JSON", "module_args": {arguments}}}]'
    for given in (["--data.module", "JSON", "--data.module_args", arguments],
                  ["--data.sources", source]):  # fmt: skip
        assert nas("evaluate", *common, *given, "--data.block_size", 64) == 0
        assert "text is JSON (validation split)" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "full" / "results.json").read_text())
    about = found["configs"]["text"]
    assert about["splits"] == ["validation split"]
    assert about["block_bos"] is True
    whole = 40 * 60 // 64  # about 60 tokens each
    assert about["num_blocks"] < whole / 2


@pytest.mark.slow
def test_every_way_to_choose_has_its_labels(common, front_file, checkpoint_dir, tmp_path):
    def labels(*options: object) -> set[str]:
        assert nas("evaluate", *common, "--tasks", "tiny_choice", *options) == 0
        return {row["subnetwork"] for row in rows(tmp_path / "out")}

    assert labels() == {"full"}
    assert labels("--subnetwork.n_layer", 2) == {"subnetwork"}
    assert labels("--front", front_file, "--index", 1) == {"front-1"}
    assert labels("--front", front_file, "--index", "[1, 0]") == {"front-0", "front-1"}
    subnetworks = tmp_path / "some.yaml"
    subnetworks.write_text("[{name: short, n_layer: 1}, {n_embd: 32}]")
    assert labels("--subnetworks", subnetworks) == {"short", "sub-1"}
    full = SubNetwork.from_config(open_checkpoint(checkpoint_dir).config)
    grid = Grid((GridMember(full, cost=7.0, score=0.5),))
    subnetworks.write_text(yaml.safe_dump(grid.to_dict()))
    assert labels("--subnetworks", subnetworks) == {"sub-0"}


@pytest.mark.slow
def test_an_exported_checkpoint_gives_the_numbers_of_its_source(common, checkpoint_dir, tmp_path):
    sizes = ["--subnetwork.n_layer", 2, "--subnetwork.n_embd", 32]
    exported = tmp_path / "exported"
    source = ["--checkpoint_dir", checkpoint_dir]
    assert nas("export", *source, "--out_dir", exported, *sizes) == 0
    tasks = ["--tasks", "tiny_choice,tiny_text,tiny_document"]
    assert nas("evaluate", *common, *sizes, *tasks) == 0
    in_place = [row["value"] for row in rows(tmp_path / "out")]
    common[common.index("--checkpoint_dir") + 1] = exported
    common[common.index("--out_dir") + 1] = tmp_path / "again"
    assert nas("evaluate", *common, *tasks) == 0
    assert [row["value"] for row in rows(tmp_path / "again")] == in_place


def fails(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert nas("evaluate", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--tasks"),
        (["--tasks", "tiny_choice", "--subnetwork.n_layer", 99], "n_layer=99"),
        (["--tasks", "tiny_choice", "--limit", 0], "--limit"),
        (["--tasks", "tiny_choice", "--num_fewshot", -1], "--num_fewshot"),
        (["--tasks", "tiny_choice", "--batch_size", 0], "--batch_size"),
        (["--tasks", "tiny_choice", "--index", 0], "needs --front"),
        (["--tasks", "tiny_choice", "--front", "none.json"], "none.json"),
        (["--tasks", "tiny_choice", "--subnetworks", "none.yaml"], "none.yaml"),
        (["--tasks", "tiny_choice", "--max_length", 4096], "--max_length"),
        (["--tasks", "tiny_choice", "--apply_chat_template", "true"], "chat template"),
        (["--tasks", "tiny_text", "--gen_kwargs", '{"max_gen_toks": 128}'], "max_gen_toks"),
        (["--data.files", "none.txt"], "none.txt"),
        (["--tasks", "tiny_choice", "--include_path", "none"], "--include_path"),
        (["--tasks", "tiny_choice", "--device", "warp"], "--device"),
    ],
)
def test_bad_input_is_one_sentence(common, capsys, options, message):
    assert message in fails(capsys, *common, *options)


@pytest.mark.slow
def test_a_front_of_other_weights_is_refused(common, front_file, tmp_path, capsys):
    options = [*common, "--tasks", "tiny_choice", "--front", front_file]
    assert "--index 7" in fails(capsys, *options, "--index", 7)
    both = [*options, "--subnetwork.n_layer", 1]
    assert "--subnetwork and --front" in fails(capsys, *both)
    # a copy of the checkpoint is the same checkpoint, one with other weights is not
    content = json.loads(front_file.read_text())
    content["checkpoint_dir"] = str(_other_weights(Path(content["checkpoint_dir"]), tmp_path))
    front_file.write_text(json.dumps(content))
    assert "belongs to another checkpoint" in fails(capsys, *options)
    # where the directory is gone, layers tell that another order was searched
    content["checkpoint_dir"] = "/gone"
    front_file.write_text(json.dumps(content))
    assert nas("evaluate", *options) == 0
    content["front"][0]["layers"] = [2]
    front_file.write_text(json.dumps(content))
    assert "belongs to another checkpoint" in fails(capsys, *options)
    where = ["--checkpoint_dir", common[1], "--out_dir", tmp_path / "exported"]
    assert nas("export", *where, "--front", front_file, "--index", 0) == 2
    assert "belongs to another checkpoint" in capsys.readouterr().err
    assert nas("profile", *where[:2], "--front", front_file, "--measure", "false") == 2
    capsys.readouterr()
    for reader in (["--subnetworks", front_file], ["--sampler.kind", "fixed",
                                                   "--sampler.file", front_file]):  # fmt: skip
        assert nas("finetune", *where, "--data.files", front_file, *reader) == 2
        told = capsys.readouterr().err
        assert f"{reader[-2]} {front_file} belongs to another checkpoint" in told
    with pytest.raises(ConfigError, match="belongs to another checkpoint"):
        api.Front.read(front_file, common[1])


def test_a_front_fits_what_became_of_its_checkpoint_by_training(
    checkpoint_dir, front_file, tmp_path
):
    from dataclasses import replace

    from whittle_nas.weights.info import FILE_NAME

    trained = _other_weights(checkpoint_dir, tmp_path)
    where = ["--checkpoint_dir", trained, "--front", front_file, "--index", 0]
    assert nas("export", *where, "--out_dir", tmp_path / "no") == 2
    info = replace(open_checkpoint(trained).info, training={"steps": 1})
    (trained / FILE_NAME).write_text(info.dump())
    assert nas("export", *where, "--out_dir", tmp_path / "yes") == 0


def _other_weights(checkpoint_dir: Path, tmp_path: Path) -> Path:
    import shutil

    import torch

    other = Path(shutil.copytree(checkpoint_dir, tmp_path / "other"))
    state = torch.load(other / "lit_model.pth", weights_only=True)
    state["transformer.wte.weight"] += 1
    torch.save(state, other / "lit_model.pth")
    return other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid YAML"),
        ("3", "list of sizes"),
        ("[]", "list of sizes"),
        ("[4]", "entry 0"),
        ("[{n_layers: 2}]", "n_layers"),
        ("[{n_layer: 99}]", "entry 0"),
        ("[{name: a, n_layer: 1}, {name: a, n_layer: 2}]", "twice"),
        ("[{name: a/b, n_layer: 1}]", "a/b"),
        ("[{n_layer: two}]", "entry 0"),
    ],
)
def test_bad_list_of_subnetworks(common, tmp_path, capsys, content, message):
    path = tmp_path / "some.yaml"
    path.write_text(content)
    assert message in fails(capsys, *common, "--tasks", "tiny_choice", "--subnetworks", path)


def test_missing_tokenizer(common, checkpoint_dir, capsys):
    (checkpoint_dir / "tokenizer.json").unlink()
    assert "tokenizer" in fails(capsys, *common, "--tasks", "tiny_choice")


def test_folder_with_other_files(common, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    assert "not empty" in fails(capsys, *common, "--tasks", "tiny_choice")


def test_chat_template_options_reach_lm_eval(common, checkpoint_dir, tmp_path, bundled):
    import shutil

    shutil.copyfile(bundled / "config.json", checkpoint_dir / "config.json")
    (checkpoint_dir / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    options = ["--tasks", "tiny_choice", "--log_samples", "true", "--num_fewshot", 1]
    options += ["--apply_chat_template", "true", "--system_instruction", "be brief"]

    def prompt(*more: object) -> str:
        assert nas("evaluate", *common, *options, *more) == 0
        lines = (tmp_path / "out" / "full" / "samples_tiny_choice.jsonl").read_text().splitlines()
        return json.loads(lines[0])["arguments"][0][0]

    turns = prompt()
    assert turns.startswith("[system] be brief\n[user] def f")
    assert turns.count("[user]") == 2
    assert prompt("--fewshot_as_multiturn", "false").count("[user]") == 1


@pytest.mark.slow
def test_two_processes_share_the_work(common, front_file, tmp_path):
    options = [*common, "--tasks", "tiny_choice,tiny_text", "--front", front_file]
    assert nas("evaluate", *options) == 0
    alone = (tmp_path / "out" / "results.csv").read_text()
    options[options.index("--out_dir") + 1] = tmp_path / "shared"
    command = [sys.executable, "-m", "whittle_nas", "evaluate", *map(str, options)]
    run = subprocess.run(
        [*command, "--devices", "2"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("front-0") == 1  # one process reports
    without_time = [line.rpartition(",")[0] for line in alone.splitlines()]
    shared = (tmp_path / "shared" / "results.csv").read_text().splitlines()
    assert [line.rpartition(",")[0] for line in shared] == without_time


CONFIGS = sorted((Path(__file__).parents[2] / "whittle_nas" / "configs").glob("*/evaluate.yaml"))


@pytest.mark.parametrize("path", first_of(CONFIGS), ids=lambda path: path.parent.name)
def test_every_config_is_understood(path):
    from whittle_nas.cli.evaluate import evaluate
    from whittle_nas.cli.parser import make_parser, parse

    parser = make_parser("evaluate", evaluate)
    options = parser.instantiate_classes(parse(parser, ["--config", str(path)]))
    assert options.checkpoint_dir
    assert options.tasks
    search = path.with_name("search.yaml")
    if options.front is not None and search.is_file():  # chained by their directories
        searched = yaml.safe_load(search.read_text())
        assert str(options.checkpoint_dir) == searched["checkpoint_dir"]
        assert str(options.front.parent) == searched["out_dir"]


@pytest.mark.slow
def test_config_of_the_bundled_checkpoint_runs(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    config = root / "whittle_nas" / "configs" / "pydoc-1m" / "evaluate.yaml"
    options = ["--config", config, "--out_dir", tmp_path / "out", "--limit", 2]
    assert nas("evaluate", *options, "--data.num_blocks", 2) == 0
    assert {row["task"] for row in rows(tmp_path / "out")} == {"text", "pydoc"}


def test_the_task_that_ships_is_asked_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--checkpoint_dir", "pydoc-1m", "--out_dir", "out"]
    tasks = ["--tasks", "pydoc", "--include_path", "pydoc-1m/tasks", "--limit", 2]
    assert nas("evaluate", *common, *tasks) == 0
    (row,) = rows(tmp_path / "out")[-1:]
    assert row["task"] == "pydoc"
    assert float(row["value"]) > 0
