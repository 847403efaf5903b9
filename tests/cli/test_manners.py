"""What users type, and what they are told."""

from pathlib import Path

import pytest

from tests.cli.test_main import nas
from whittle_nas.cli.common import print_table, resolve_device, resolve_devices
from whittle_nas.cli.evaluate import evaluate
from whittle_nas.cli.finetune import finetune
from whittle_nas.cli.parser import make_parser, parse
from whittle_nas.cli.spelling import spelled_out
from whittle_nas.errors import ConfigError

NEEDED = ["--checkpoint_dir", "c", "--out_dir", "o"]


def options_of(*words):
    return parse(make_parser("finetune", finetune), spelled_out("finetune", [*NEEDED, *words]))


def test_devices_that_are_not_here_are_not_offered(monkeypatch):
    for count, offered in ((0, "auto, cpu"), (2, "auto, cpu, cuda:0, cuda:1")):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        with pytest.raises(ConfigError, match=rf"cuda:7 is not there; here are {offered}$"):
            resolve_device("cuda:7")
        with pytest.raises(ConfigError, match=rf"cuda:7 is not there; here are {offered}$"):
            resolve_devices("cpu,cuda:7")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("auto,cpu", "--device auto,cpu: auto stands alone"),
        ("cpu, auto", "--device cpu, auto: auto stands alone"),
        ("cpu,", "--device cpu,: a name is missing"),
        ("", "--device : a name is missing"),
    ],
)
def test_names_of_devices_that_say_nothing_are_refused(given, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        resolve_devices(given)


def test_a_command_for_one_device_refuses_several():
    assert [str(device) for device in resolve_devices("cpu, cpu")] == ["cpu", "cpu"]
    with pytest.raises(ConfigError, match="--device cpu,cpu: this command runs on one device"):
        resolve_device("cpu,cpu")


def test_a_long_and_wide_table_is_neither_cut_nor_printed_whole(capsys):
    columns = [f"a long name of column {at}" for at in range(12)]
    print_table(columns, [[row, *columns[1:]] for row in range(44)], all_in="all.csv")
    head, *lines = capsys.readouterr().out.splitlines()
    cells = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert (cells[0], cells[-1]) == ("0", "43")
    assert len(cells) < 20
    assert lines[-1] == f"{len(cells)} of 44; all are in all.csv"
    assert all(line.count(name) == 1 for line in lines if "│ 43 " in line for name in columns[1:])


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["serach"], "did you mean search?"),
        (["export", "--pik", "x"], "did you mean --pick?"),
        (["finetune", "--lr", "1e-3"], "did you mean --optimizer.lr?"),
        (["search", "--num_trails", "3"], "did you mean --num_trials?"),
    ],
)
def test_the_nearest_name_is_suggested(words, near, capsys):
    assert nas(*words) == 2
    assert near in capsys.readouterr().err


def test_text_on_the_command_line_replaces_that_of_a_config(bundled, tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("data: {module: Alpaca, block_size: 64}\nbatch_size: 3\n")
    text = str(bundled / "train.jsonl")
    found = options_of("--config", str(config), "--data.files", text)
    assert (found.data.module, found.data.block_size, found.batch_size) == (None, 64, 3)
    assert found.data.files == [text] or str(found.data.files) == text
    assert options_of("--config", str(config)).data.module == "Alpaca"


def test_what_ships_is_found_from_any_folder(bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert options_of("--config", "Llama-3.1-8B/finetune").search_space == "v1-llama-3.1"
    found = options_of("--checkpoint_dir", "pydoc-1m", "--data.files", "pydoc-1m/train.jsonl")
    assert str(found.checkpoint_dir) == str(bundled)
    assert str(found.data.files).startswith(str(bundled))
    scored = [*NEEDED, "--include_path", "pydoc-1m/tasks"]
    found = parse(make_parser("evaluate", evaluate), spelled_out("evaluate", scored))
    assert Path(found.include_path).is_dir()
    with pytest.raises(ConfigError, match=r"data\.files: pydoc-1m/none\.jsonl does not exist"):
        options_of("--data.files", "pydoc-1m/none.jsonl")


def test_paths_of_a_config_may_begin_beside_it(tmp_path, monkeypatch):
    (tmp_path / "mine" / "tasks").mkdir(parents=True)
    (tmp_path / "mine" / "text.txt").write_text("words")
    config = tmp_path / "mine" / "evaluate.yaml"
    config.write_text("include_path: tasks\ndata: {files: text.txt}\n")
    monkeypatch.chdir(tmp_path)
    for given in (["--config", "mine/evaluate.yaml"], ["--config=mine/evaluate.yaml"]):
        found = parse(make_parser("evaluate", evaluate), [*NEEDED, *given])
        assert Path(found.include_path).resolve() == tmp_path / "mine" / "tasks"
        assert Path(str(found.data.files)).resolve() == tmp_path / "mine" / "text.txt"
    with pytest.raises(ConfigError, match="--include_path tasks is not a folder"):
        parse(make_parser("evaluate", evaluate), [*NEEDED, "--include_path", "tasks"])


def test_loggers_have_short_names(bundled):
    text = ["--data.files", str(bundled / "train.jsonl")]
    path = "lightning.pytorch.loggers.WandbLogger"
    assert options_of(*text, "--logger", "wandb").trainer.logger == [{"class_path": path}]
    assert options_of(*text, "--logger", "none").trainer.logger == []
    with pytest.raises(ConfigError, match=r"--logger wand is none of csv, tensorboard, wandb"):
        options_of(*text, "--logger=wand")


def test_whoever_describes_adapters_gets_them(bundled, tmp_path):
    """Also by the numbers that they have by default; a file of all options does not describe."""

    def weights(*words):
        return options_of("--data.files", str(bundled / "train.jsonl"), *words).weights.value

    for words in (["--lora.r", "32"], ["--lora.alpha=16"], ["--lora", "{r: 32}"]):
        assert weights(*words) == "adapters"
        assert weights("--weights", "auto", *words) == "adapters"
        assert weights("--weights=all", *words) == "all"
    (tmp_path / "run.yaml").write_text("lora: {r: 32}\nweights: auto\n")
    for words in ([], ["--lora", "null"], ["--config", str(tmp_path / "run.yaml")]):
        assert weights(*words) == "auto"
