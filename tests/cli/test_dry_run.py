"""Plans before the work: of every config that ships, and of a directory without weights."""

from pathlib import Path

import pytest
import torch
from litgpt import Config

from tests.cli.test_main import nas
from whittle_nas.cli.commands import PLANNED, function_of
from whittle_nas.cli.parser import make_parser, parse
from whittle_nas.cli.planning import PLANNERS, plan_of
from whittle_nas.errors import ConfigError
from whittle_nas.metrics.plan import forward_flops
from whittle_nas.weights.axes import num_params

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "whittle_nas" / "configs").glob("*/finetune.yaml"))
SLOW = pytest.mark.slow
LARGE = 80e9  # bytes of a device
FAST = ("Llama-3.1-70B", "SmolLM2-1.7B")  # a second each, two thirds of it options
FOLDERS = [
    pytest.param(path.parent, id=path.parent.name, marks=() if path.parent.name in FAST else SLOW)
    for path in CONFIGS
    if path.parent.name != "pydoc-1m"  # which is in no list of litgpt
]
PROMISED = (
    "Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.2-1B", "Qwen3-0.6B", "Qwen3-8B", "Qwen3-32B",
    "SmolLM2-135M", "SmolLM2-1.7B", "Gemma-3-1b-it", "phi-4",
)  # fmt: skip
TEXT = ("--data.module", "Alpaca")
COMMANDS = ("importance", "finetune", "search", "evaluate")


def plan(command, *words):
    parser = make_parser(command, function_of(command))
    options = parse(parser, list(map(str, words)))
    options.pop("dry_run")
    return plan_of(command, parser.instantiate_classes(options))


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_what_ships_fits_80_gb(folder, tmp_path, monkeypatch):
    """One device, or as many as the config names; what runs on the host needs no device."""
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        path = folder / f"{command}.yaml"
        found = plan(command, "--config", path, "--dry_run", "true")
        assert found.config.name == folder.name
        if "device: cpu" not in path.read_text():
            assert found.memory_total < 0.95 * LARGE, (command, found.memory)
        assert found.flops > 0 or command == "evaluate"
    assert not list(tmp_path.iterdir())


def test_current_models_have_a_config_for_every_stage():
    found = {path.parent.name: path.parent for path in CONFIGS}
    assert set(PROMISED) <= set(found)
    for name in PROMISED:
        assert not [c for c in COMMANDS if not (found[name] / f"{c}.yaml").is_file()], name


def test_70b_with_adapters_on_eight_devices():
    found = plan("finetune", "--config", "Llama-3.1-70B/finetune")
    config = Config.from_name("Llama-3.1-70B")
    with torch.device("meta"):
        from litgpt import GPT

        count = sum(p.numel() for p in GPT(config).parameters())
    assert found.devices == 8
    assert found.memory["weights"] == 2 * count // 8
    assert found.memory["optimizer"] == 2 * found.memory["gradients"]
    assert found.memory_total < LARGE / 2
    # per token a forward and an input-gradient pass of the full network, and half as much at least
    tokens = 2000 * 8 * 8 * 512
    whole = forward_flops(config, tokens, 512)
    assert whole == pytest.approx(2 * (count - 128256 * 8192) * tokens, rel=0.02)  # and attention
    assert found.work["teacher"] == pytest.approx(whole)
    assert 1.5 * whole < found.work["forward passes"] < 4 * whole


def test_a_name_of_litgpts_list_is_enough():
    found = plan("finetune", "--checkpoint_dir", "x/SmolLM2-135M", "--out_dir", "y", *TEXT)
    assert found.config.name == "SmolLM2-135M"
    assert found.memory_total < LARGE


def test_networks_that_are_trained_alone_have_a_teacher_beside_them(tmp_path):
    words = ("--checkpoint_dir", "x/SmolLM2-135M", "--out_dir", "y", *TEXT, "--weights", "adapters")
    together, unknown = plan("finetune", *words), tmp_path / "unknown.yaml"
    whole = plan("finetune", *words, "--subnetworks", unknown)
    assert whole.memory["teacher"] > together.memory.get("teacher", 0)
    tokens = whole.work["teacher"] / forward_flops(whole.config, 1, 512)
    assert whole.work["forward passes"] == pytest.approx(forward_flops(whole.config, tokens, 512))
    (tmp_path / "two.yaml").write_text("[{name: a, n_layer: 15}, {name: b, n_layer: 30}]")
    two = plan("finetune", *words, "--subnetworks", tmp_path / "two.yaml")
    assert two.work["teacher"] == pytest.approx(2 * whole.work["teacher"])
    layers = 1 - 2 * 576 * 49152 * tokens / whole.work["forward passes"]  # without the head
    assert two.work["forward passes"] == pytest.approx(
        whole.work["forward passes"] * (2 - layers / 2), rel=0.01
    )
    assert two.writes["checkpoints"] > 1.5 * whole.writes["checkpoints"]


def test_networks_of_budgets_are_planned_as_large_as_they_may_be():
    words = ("--checkpoint_dir", "x/SmolLM2-135M", "--out_dir", "y", *TEXT, "--weights", "adapters")
    found = plan("finetune", *words, "--budgets", "80%, 60%")
    whole = plan("finetune", *words, "--subnetworks", "unknown.yaml")
    assert found.work["teacher"] == pytest.approx(2 * whole.work["teacher"])
    bytes_ = found.writes["checkpoints"] / whole.writes["checkpoints"]
    assert 1.3 < bytes_ <= 1.4
    assert "networks of --budgets: 2 trained one by one" in found.notes
    with pytest.raises(ConfigError, match="no sub-network of the search space satisfies it"):
        plan("finetune", *words, "--budgets", "1%")


def test_integer_programs_measure_around_their_best():
    words = ("--checkpoint_dir", "x/SmolLM2-135M", "--out_dir", "y", "--method", "ilp", *TEXT)
    words += ("--candidates", "z", "--num_solutions", "5", "--budgets", "90%,80%")
    found = plan("search", *words, "--search_blocks", 8)
    still = plan("search", *words, "--search_blocks", 8, "--ilp_rounds", 0)
    # A round tries four programs beside the five solutions, and two neighbours of sixty parts.
    assert found.work["trials"] == pytest.approx(still.work["trials"] * (5 + 4) / 5)
    assert found.work["measuring around"] == pytest.approx(still.work["trials"] / 10 * 120)
    assert still.work["measuring around"] == 0
    assert not [note for note in found.notes if "one more copy" in note]
    shared = plan("search", *words, "--devices", 2)
    assert [note for note in shared.notes if "one more copy" in note]
    with pytest.raises(ConfigError, match="give --candidates"):
        plan("search", *words[:-6])


def test_a_search_over_latency_holds_one_model_and_what_is_timed():
    words = ("--checkpoint_dir", "x/Qwen3-32B", "--out_dir", "y", *TEXT, "--objectives")
    one = plan("search", *words, "val_loss,flops", "--time_front", "false")
    front, timed = (plan("search", *words, f"val_loss,{cost}") for cost in ("flops", "latency_ms"))
    more = timed.memory.pop("what is timed")
    assert front.memory.pop("what is timed") < more  # no parts, but whole networks at the end
    assert front.memory == one.memory
    assert timed.memory == one.memory
    assert 3 * 2 * 151_936 * 5120 < more < one.memory["weights"] / 10  # table, head, its copy
    limit = ("--constraints", "decode_ms_per_token <= 40")
    assert plan("search", *words, "val_loss,flops", *limit).memory["what is timed"] == more


def test_processes_that_share_layers_each_run_the_text():
    words = ("--checkpoint_dir", "x/SmolLM2-135M", "--out_dir", "y", *TEXT)
    one, many = plan("candidates", *words), plan("candidates", *words, "--devices", 99)
    assert (one.devices, many.devices) == (1, 30)
    assert many.work.pop("calibration") == pytest.approx(30 * one.work.pop("calibration"))
    assert many.work == one.work
    with pytest.raises(ConfigError, match="--devices 0"):
        plan("candidates", *words, "--devices", 0)


@pytest.mark.parametrize("command", sorted(set(PLANNED) - {"finetune-supernet"}))
def test_a_config_is_enough(command, tmp_path, bundled, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "whittle_nas.metrics.measured.time.perf_counter", iter(range(10**6)).__next__
    )
    source = tmp_path / "model"
    source.mkdir()
    (source / "model_config.yaml").write_bytes((bundled / "model_config.yaml").read_bytes())
    words = ["--checkpoint_dir", source, "--dry_run", "true"]
    words += [] if command == "generate" else ["--out_dir", "out"]
    more = {
        "generate": ["--prompt", "def f(x):"],
        "profile": [],
        "export": ["--extreme", "smallest"],
        "prune": ["--method", "gptq", "--data.files", bundled / "calibration.jsonl"],
    }
    text = more.get(command, ["--data.files", bundled / "valid.jsonl"])
    assert nas(command, *words, *text) == 0
    said = capsys.readouterr().out
    assert "reads: checkpoint" in said
    assert "total" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_profiles_and_texts_take_more_of_more():
    where = ("--checkpoint_dir", "x/SmolLM2-135M")
    whole = 2 * num_params(Config.from_name("SmolLM2-135M"))
    one, ten = (plan("profile", *where, "--repeats", count) for count in (5, 50))
    assert one.memory["weights"] == one.reads["checkpoint"] == whole
    assert ten.work["decoding"] == pytest.approx(one.work["decoding"] * (2 + 10) / (2 + 1))
    assert (ten.memory, ten.writes) == (one.memory, {})
    counted = plan("profile", *where, "--measure", "false", "--out_dir", "y")
    assert (counted.reads, counted.memory, counted.work) == ({}, {}, {})
    random = plan("profile", "--model_name", "SmolLM2-135M")
    assert random.memory["weights"] == 2 * whole  # float32
    assert random.reads == {}
    with pytest.raises(ConfigError, match="either --checkpoint_dir or --model_name"):
        plan("profile")
    table = plan("profile", *where, "--table", "t.json")
    assert table.memory["a whole network"] == whole
    texts = [plan("generate", *where, "--prompt", "x" * n, "--top_k", 5) for n in (40, 4000)]
    assert [found.memory["weights"] for found in texts] == [whole, whole]
    assert texts[1].work["prompt"] > 99 * texts[0].work["prompt"]
    assert texts[1].memory["cache"] == texts[0].memory["cache"] * (1000 + 50) // (10 + 50)
    half = plan("generate", *where, "--prompt", "x" * 40, "--subnetwork.n_layer", 15)
    assert half.memory["cache"] * 2 == texts[0].memory["cache"]
    later = plan("generate", *where, "--prompt", "x" * 40, "--front", "no/front.json", "--index", 0)
    assert later.work == texts[0].work
    assert "no/front.json is not there yet: the whole model is counted" in later.notes


def test_what_names_no_model_is_one_sentence(tmp_path, capsys):
    where = ["--checkpoint_dir", tmp_path / "x", "--out_dir", tmp_path / "y"]
    assert nas("importance", *where, "--dry_run", "true") == 2
    assert "is no checkpoint here" in capsys.readouterr().err


def test_every_planner_is_a_command():
    assert set(PLANNERS) == set(PLANNED)
