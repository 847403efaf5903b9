"""`nas export`: what comes out is an ordinary checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.test_main import nas
from tests.conftest import uniform
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint

SUB = uniform(40, 4, 4, 8, 50, 2)
SIZES = [item for name, value in SUB.to_dict().items() for item in (f"--subnetwork.{name}", value)]


def test_litgpt_export_equals_the_subnetwork(checkpoint_dir, tmp_path):
    out_dir = tmp_path / "small"
    assert nas("export", "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *SIZES) == 0
    small = load_supernet(out_dir)
    assert small.full.sizes() == SUB.sizes()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(
        small.model(ids), load_supernet(checkpoint_dir).standalone(SUB)(ids), rtol=0, atol=1e-5
    )
    for name in ("tokenizer.json", "prompt_style.yaml", "generation_config.json", "run.yaml"):
        assert (out_dir / name).is_file()
    described = json.loads((out_dir / "config.json").read_text())
    assert described["hidden_size"] == SUB.n_embd
    assert not (out_dir / "supernet.yaml").exists()


def test_hf_export_loads_in_transformers(checkpoint_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    out_dir = tmp_path / "hf"
    arguments = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, "--format", "hf"]
    assert nas("export", *arguments, *SIZES) == 0
    model = AutoModelForCausalLM.from_pretrained(out_dir).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = model(ids).logits
    expected = load_supernet(checkpoint_dir).standalone(SUB)(ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("format", "library"), [("litgpt", "litgpt"), ("hf", "transformers")])
def test_model_card_and_licence_go_along(checkpoint_dir, tmp_path, format, library):
    out_dir = tmp_path / "out"
    config = yaml.safe_load((checkpoint_dir / "model_config.yaml").read_text())
    (checkpoint_dir / "LICENSE.txt").write_text("terms")
    arguments = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, "--format", format]
    assert nas("export", *arguments, *SIZES) == 0
    assert (out_dir / "LICENSE.txt").read_text() == "terms"
    _, header, text = (out_dir / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["pruned"],
        "base_model": "meta-llama/Meta-Llama-3.1-8B",
    }
    assert f"{num_params(open_checkpoint(checkpoint_dir).config):,}" in text
    for name, size in SUB.summary().items():
        assert f"| {name} | {size} | {config[name]} |" in text
    assert "`LICENSE.txt`" in text
    assert "weights were not changed" in text


@pytest.mark.parametrize("format", ["litgpt", "peft"])
def test_targets_are_engines_of_the_hugging_face_format(checkpoint_dir, tmp_path, format, capsys):
    words = ("--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", "--format", format)
    assert nas("export", *words, "--targets", "vllm") == 2
    assert f"--targets vllm has no meaning with --format {format}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extreme", ["smallest", "largest"])
def test_the_smallest_and_the_largest_of_a_space_are_exported(checkpoint_dir, tmp_path, extreme):
    from whittle_nas.space import load_space

    out_dir = tmp_path / "out"
    arguments = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, "--extreme", extreme]
    assert nas("export", *arguments, "--dtype", "bfloat16") == 0
    space = load_space("aligned", open_checkpoint(checkpoint_dir).config)
    exported = load_supernet(out_dir)
    assert exported.full.sizes() == getattr(space, extreme).sizes()
    assert exported.model.lm_head.weight.dtype == torch.bfloat16


def front_file(path: Path) -> Path:
    entries = [
        {
            "index": at,
            "subnetwork": {**SUB.summary(), "n_layer": layers},
            "layers": list(range(layers)),
            "metrics": {"val_loss": 3.0 - layers, "num_params": 1000 * layers},
        }
        for at, layers in enumerate((1, 2, 3))
    ]
    front = {"format": 1, "objectives": ["val_loss", "num_params"], "front": entries}
    path.write_text(json.dumps({**front, "checkpoint_dir": "x", "how_measured": {}}))
    return path


@pytest.mark.parametrize(
    ("choice", "layers"),
    [(["--index", 1], 2), (["--pick", "num_params <= 2500"], 2), (["--pick", "val_loss <= 9"], 1)],
)
def test_an_entry_of_a_front_is_exported(checkpoint_dir, tmp_path, choice, layers):
    front = front_file(tmp_path / "front.json")
    out_dir = tmp_path / "out"
    arguments = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, "--front", front]
    assert nas("export", *arguments, *choice) == 0
    assert load_supernet(out_dir).full.n_layer == layers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--subnetwork", "--front", "--extreme"]),
        (["--extreme", "smallest", "--subnetwork.n_layer", 1], ["--subnetwork and --extreme"]),
        (["--subnetwork.n_embd", 999], ["n_embd=999", "48"]),
        (["--subnetwork.n_layer", 0], ["n_layer=0"]),
        (["--subnetwork.n_head", 6], ["n_head=6", "n_query_groups=4"]),
        (["--subnetwork.head_size", 3], ["head_size=3", "rotary"]),
        (["--subnetwork.n_layer", "two"], ["n_layer"]),
        (["--front", "none.json", "--index", 0], ["none.json"]),
        (["--front", "none.json"], ["--index or --pick"]),
        (["--extreme", "middle"], ["middle"]),
        (["--extreme", "smallest", "--search_space", "nowhere"], ["nowhere", "aligned"]),
        (["--extreme", "smallest", "--format", "gguf"], ["gguf"]),
    ],
)
def test_wrong_choices_write_nothing(checkpoint_dir, tmp_path, arguments, words, capsys):
    out_dir = tmp_path / "out"
    assert nas("export", "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *arguments) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    for word in words:
        assert word in shown, shown
    assert not out_dir.exists()


def test_out_dir_is_never_written_over(checkpoint_dir, tmp_path, capsys):
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / "precious").write_text("x")
    arguments = ["--checkpoint_dir", checkpoint_dir, "--extreme", "smallest", "--out_dir"]
    assert nas("export", *arguments, out_dir) == 2
    assert "not empty" in capsys.readouterr().err
    assert nas("export", *arguments, checkpoint_dir, "--overwrite", "true") == 2
    assert "is the --checkpoint_dir" in capsys.readouterr().err
    assert nas("export", *arguments, out_dir, "--overwrite", "true") == 0
    assert not (out_dir / "precious").exists()


@pytest.mark.slow
def test_litgpts_own_conversion_runs_on_an_export(checkpoint_dir, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    out_dir, converted = tmp_path / "small", tmp_path / "converted"
    sizes = ["--subnetwork.n_embd", 40, "--subnetwork.n_layer", 2]
    assert nas("export", "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *sizes) == 0
    command = [Path(sys.executable).with_name("litgpt"), "convert_from_litgpt", out_dir, converted]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out_dir)).eval()
    weights = torch.load(converted / "model.pth", weights_only=True)
    model.load_state_dict(weights, strict=False)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits, load_supernet(out_dir).model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_litgpt_generates_from_an_export(shared_data, tmp_path):
    source = shared_data / "checkpoints" / "stories260K"
    out_dir = tmp_path / "small"
    sizes = ["--subnetwork.n_layer", 4, "--subnetwork.intermediate_size", 160]
    assert nas("export", "--checkpoint_dir", source, "--out_dir", out_dir, *sizes) == 0
    command = [Path(sys.executable).with_name("litgpt"), "generate", out_dir, "--prompt", "Once"]
    done = subprocess.run(
        [*map(str, command), "--max_new_tokens", "12"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Once" in done.stdout
