"""`nas importance` from the command line: files, repeatability, and one sentence per mistake."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT, Config

from tests.conftest import first_of
from whittle_nas.__main__ import main
from whittle_nas.cli.importance import importance
from whittle_nas.cli.parser import make_parser, parse
from whittle_nas.cli.selection import space_of
from whittle_nas.data import load_blocks
from whittle_nas.errors import ConfigError
from whittle_nas.importance.narrowing import narrowed_stream
from whittle_nas.importance.sorting import SortedTensors, read_importance
from whittle_nas.space import SubNetwork
from whittle_nas.space.subnetwork import SIZES
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
from whittle_nas.weights.counting import parameter_counter

CONFIGS = sorted((Path(__file__).parents[2] / "whittle_nas" / "configs").glob("*/importance.yaml"))
QUICK = ["--data.num_blocks", "4", "--data.block_size", "32", "--layer_blocks", "2"]
QUICK += ["--sweep.num_tokens", "0"]


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [f"The {i}th line talks about sorting, weights and {i * i} words." for i in range(60)]
    path.write_text("".join(json.dumps({"text": line * 4}) + "\n" for line in lines))
    return path


def run(checkpoint_dir: Path, out_dir: Path, text: Path, *more: str) -> int:
    where = ["--checkpoint_dir", str(checkpoint_dir), "--out_dir", str(out_dir)]
    return main(["importance", *where, "--data.files", str(text), *QUICK, *more])


def logits(path: Path) -> torch.Tensor:
    model = load_supernet(path).model
    with torch.no_grad():
        return model(ids_of(model.config))


def ids_of(config: Config) -> torch.Tensor:
    return torch.arange(40).unsqueeze(0) * 7 % config.padded_vocab_size


@pytest.mark.usefixtures("pictures")
def test_three_options_are_enough(checkpoint_dir, text, tmp_path, capsys):
    out = tmp_path / "sorted"
    arguments = ["--checkpoint_dir", str(checkpoint_dir), "--data.files", str(text)]
    assert main(["importance", *arguments, "--out_dir", str(out)]) == 0
    before, after = logits(checkpoint_dir), logits(out)
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    checkpoint = open_checkpoint(out)
    assert sorted(checkpoint.info.layer_order) == [0, 1, 2]
    assert checkpoint.info.importance is not None
    assert checkpoint.info.importance["layer_order"] == "greedy"
    assert (out / "importance.png").stat().st_size > 1000
    assert (out / "sweep.png").stat().st_size > 1000
    assert "layers, most important first" in capsys.readouterr().out
    assert checkpoint.info.fitted is not None
    space = space_of(checkpoint, None)
    assert space == space_of(checkpoint, "fitted")
    assert space.largest == SubNetwork.from_config(checkpoint.config)
    with pytest.raises(ConfigError, match="no sweep"):
        space_of(open_checkpoint(checkpoint_dir), "fitted")
    GPT(Config.from_file(out / "model_config.yaml")).load_state_dict(
        torch.load(out / "lit_model.pth", weights_only=True), strict=True
    )


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_the_report_compares_before_and_after(checkpoint_dir, text, tmp_path, capsys):
    out = tmp_path / "sorted"
    assert run(checkpoint_dir, out, text, "--report.num_subnetworks", "5") == 0
    report = json.loads((out / "rpd.json").read_text())
    assert len(report["subnetworks"]) == 5
    full = report["full_perplexity"]
    assert full["after"] == pytest.approx(full["before"], rel=1e-4)
    each = [(s["before"] - s["after"]) / s["before"] for s in report["subnetworks"]]
    assert report["rpd"]["mean"] == pytest.approx(sum(each) / 5)
    assert (out / "rpd.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert f"RPD {report['steps']['permuted']:.3f} permuted" in shown
    assert {"with norm factors", "without norm factors"} & set(report["steps"])


@pytest.mark.slow
def test_same_seed_same_files_byte_for_byte(checkpoint_dir, text, tmp_path):
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        assert run(checkpoint_dir, out, text, "--report.num_subnetworks", "3") == 0
    names = sorted(path.name for path in outs[0].iterdir())
    assert names == sorted(path.name for path in outs[1].iterdir())
    for name in set(names) - {"run.yaml"}:  # which names out_dir
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name


@pytest.mark.slow
def test_a_sorted_checkpoint_is_sorted_again(checkpoint_dir, text, tmp_path, capsys):
    once, again, direct = (tmp_path / name for name in ("once", "again", "direct"))
    orders = ("--basis", "permutation")
    assert run(checkpoint_dir, once, text, "--aggregation", "variance_norm", *orders) == 0
    assert capsys.readouterr().err.count("warning") == 0
    assert run(once, again, text, *orders) == 0
    assert "is sorted already" in capsys.readouterr().err
    assert run(checkpoint_dir, direct, text, *orders) == 0
    twice, single = (read_importance(out / "importance.safetensors") for out in (again, direct))
    assert twice.settings["times_sorted"] == 2
    for name, value in single.scores.to_dict().items():
        torch.testing.assert_close(getattr(twice.scores, name), value, rtol=1e-4, atol=1e-5)
    assert twice.layer_order == single.layer_order
    tensors, wanted = (open_checkpoint(out).state_dict() for out in (again, direct))
    equal = [torch.equal(tensors[name], wanted[name]) for name in tensors]
    # near-equal scores may change places by rounding; anything wrong would show everywhere
    assert sum(equal) > 0.9 * len(equal)


ENOUGH = ("--data.num_blocks", "16")  # 512 tokens for 48 channels


@pytest.mark.slow
def test_a_rotated_checkpoint_is_rotated_again(checkpoint_dir, text, tmp_path):
    """The second file says how the first model becomes the last one."""
    once, again = tmp_path / "once", tmp_path / "again"
    assert run(checkpoint_dir, once, text, "--basis", "rotation", *ENOUGH) == 0
    assert run(once, again, text, "--basis", "rotation", "--data.seed", "1", *ENOUGH) == 0
    torch.testing.assert_close(logits(again), logits(checkpoint_dir), rtol=1e-4, atol=1e-4)
    found = read_importance(again / "importance.safetensors")
    first = open_checkpoint(checkpoint_dir)
    wanted = SortedTensors(first.state_dict, found.bases, first.config)
    for name, tensor in open_checkpoint(again).state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_tied_head_is_untied_and_said_so(checkpoint_dir, text, tmp_path, capsys):
    out, kept = tmp_path / "sorted", tmp_path / "kept"
    tensors = torch.load(checkpoint_dir / "lit_model.pth", weights_only=True)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    torch.save(tensors, checkpoint_dir / "lit_model.pth")
    (checkpoint_dir / "config.json").write_text('{"tie_word_embeddings": true}')
    assert run(checkpoint_dir, kept, text, *ENOUGH) == 0
    assert "unties the head" in capsys.readouterr().out
    assert open_checkpoint(kept).tied
    assert json.loads((kept / "config.json").read_text())["tie_word_embeddings"] is True
    proof = ["--report.num_subnetworks", "3", "--report.repair", "true"]
    proof += ["--report.data.files", str(text)]
    assert run(checkpoint_dir, out, text, *ENOUGH, "--basis", "rotation", *proof) == 0
    assert "the head is untied" in capsys.readouterr().out
    assert not open_checkpoint(out).tied
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    report = json.loads((out / "rpd.json").read_text())
    found = open_checkpoint(out)
    for row in report["subnetworks"]:  # both tables count, and repair is a step of its own
        sub = SubNetwork.uniform(found.info.layer_order, **{name: row[name] for name in SIZES})
        assert row["num_params"] == parameter_counter(found.config)(sub)
    assert set(report["steps"]) >= {"permuted", "repaired"}
    torch.testing.assert_close(logits(out), logits(checkpoint_dir), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_norm_factors_go_where_the_weights_go(checkpoint_dir, text, tmp_path, capsys):
    """Into `supernet.yaml`, the table beside it, slices and exports, until the model is whole."""
    out, small = tmp_path / "sorted", tmp_path / "small"
    rotated = ("--basis", "rotation", *ENOUGH)
    assert run(checkpoint_dir, out, text, "--norm_factors", "on", *rotated) == 0
    supernet = load_supernet(out)
    assert supernet.info.importance is not None
    assert supernet.info.importance["norms_scaled"] is True
    assert supernet.info.norms is not None
    sub = narrowed_stream(supernet.config, 0.75)
    sizes = ["--checkpoint_dir", str(out), "--out_dir", str(small), "--subnetwork.n_embd", "36"]
    assert main(["export", *sizes]) == 0
    torch.testing.assert_close(logits(small), supernet.standalone(sub)(ids_of(supernet.config)))
    torch.testing.assert_close(logits(out), logits(checkpoint_dir), rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert run(checkpoint_dir, tmp_path / "auto", text) == 0
    assert "norms of narrower networks are" in capsys.readouterr().out
    assert run(checkpoint_dir, tmp_path / "off", text, "--norm_factors", "off") == 0
    assert load_supernet(tmp_path / "off").info.norms is None
    assert run(out, tmp_path / "again", text, "--norm_factors", "off") == 0
    assert load_supernet(tmp_path / "again").info.norms is None


@pytest.mark.slow
def test_layer_order_and_neurons_can_be_chosen(checkpoint_dir, text, tmp_path):
    for i, more in enumerate(
        (
            ["--layer_order", "block_drop", "--scope", "global", "--layer_width", "1"],
            ["--layer_order", "block_importance", "--head_activation", "proj_input"],
        )
    ):
        assert run(checkpoint_dir, tmp_path / str(i), text, *more) == 0
        kept = open_checkpoint(tmp_path / str(i)).info.importance
        assert kept is not None
        assert kept["layer_order"] == more[1]


@pytest.mark.slow
def test_a_run_can_be_repeated_from_its_record(checkpoint_dir, text, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(checkpoint_dir, first, text) == 0
    record = ["--config", str(first / "run.yaml"), "--out_dir", str(second)]
    assert main(["importance", *record]) == 0
    for name in ("lit_model.pth", "importance.safetensors", "supernet.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


MISTAKES = {
    "no data": ([], "name a source with data.files"),
    "empty data": (["--data.files", "empty.txt"], "empty.txt holds no text"),
    "short data": (["--data.files", "short.txt"], "one block needs"),
    "missing data": (["--data.files", "nowhere.txt"], "nowhere.txt does not exist"),
    "block size": (["--data.files", "text.txt", "--data.block_size", "4096"], "1..128"),
    "batch size": (["--data.files", "text.txt", "--batch_size", "0"], "--batch_size 0"),
    "micro batch": (["--data.files", "text.txt", "--micro_batch_size", "0"], "at least 1"),
    "min layers": (["--data.files", "text.txt", "--min_layers", "0"], "--min_layers 0"),
    "basis": (["--data.files", "text.txt", "--basis", "random"], "random"),
    "too little text for a rotation": (
        ["--data.files", "text.txt", "--data.num_blocks", "3", "--basis", "rotation"],
        "at least 10 * n_embd = 480 calibration tokens",
    ),
    "layer width": (["--data.files", "text.txt", "--layer_width", "1.5"], "at most 1"),
    "aggregation": (["--data.files", "text.txt", "--aggregation", "median"], "median"),
    "unknown option": (["--data.file", "text.txt"], "data.file"),
    "report text": (
        ["--data.files", "text.txt", "--data.valid_fraction", "0", "--report.num_subnetworks", "2"],
        "--report.data.files",
    ),
    "report space": (
        [
            "--data.files",
            "text.txt",
            "--report.num_subnetworks",
            "2",
            "--report.search_space",
            "no.yaml",
        ],
        "no.yaml",
    ),
    "device": (["--data.files", "text.txt", "--device", "cuda:99"], "cuda:99"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_wrong_input_is_one_sentence(
    checkpoint_dir, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("one two three")
    Path("text.txt").write_text("A text that is long enough for a few blocks.\n" * 300)
    where = ["--checkpoint_dir", str(checkpoint_dir), "--out_dir", "out"]
    assert main(["importance", *where, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_out_dir_is_never_the_source(checkpoint_dir, text, capsys):
    assert run(checkpoint_dir, checkpoint_dir, text, "--overwrite", "true") == 2
    assert "is the --checkpoint_dir" in capsys.readouterr().err
    assert run(checkpoint_dir, checkpoint_dir, text) == 2
    assert "is the --checkpoint_dir" in capsys.readouterr().err


def test_an_overflow_names_the_layer(checkpoint_dir, text, tmp_path, capsys):
    tensors = torch.load(checkpoint_dir / "lit_model.pth", weights_only=True)
    tensors["transformer.h.1.attn.qkv.weight"].fill_(1e30)
    torch.save(tensors, checkpoint_dir / "lit_model.pth")
    assert run(checkpoint_dir, tmp_path / "out", text) == 2
    error = capsys.readouterr().err
    assert "transformer.h.1.attn.proj are not finite" in error
    assert error.strip().count("\n") == 0


def test_a_tokenizer_that_does_not_fit(checkpoint_dir, text, tmp_path, capsys, shared_data):
    (checkpoint_dir / "tokenizer_config.json").write_text('{"tokenizer_class": "X"}')
    (checkpoint_dir / "tokenizer.json").write_bytes(
        (shared_data / "tokenizers" / "gpt2" / "tokenizer.json").read_bytes()
    )
    assert run(checkpoint_dir, tmp_path / "out", text) == 2
    assert "does not fit the model's vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize("path", first_of(CONFIGS), ids=lambda path: path.parent.name)
def test_every_config_is_valid(path):
    options = parse(make_parser("importance", importance), ["--config", str(path)])
    built = make_parser("importance", importance).instantiate_classes(options)
    built.data.parts()
    assert yaml.safe_load(path.read_text())["checkpoint_dir"] == str(options.checkpoint_dir)
    assert Config.from_name(options.checkpoint_dir.name).n_layer > 1


@pytest.mark.slow
def test_the_mixes_are_valid(shared_data, bundled):
    """Both parse; the one of local files is read, and every source is there."""
    folder = Path(__file__).parents[2] / "whittle_nas" / "configs" / "data"
    parser = make_parser("importance", importance)
    needed = ["--checkpoint_dir", "c", "--out_dir", "o"]
    mixes = [
        parser.instantiate_classes(parse(parser, [*needed, "--data", str(folder / name)])).data
        for name in ("v3-mix.yaml", "shared-mix.yaml")
    ]
    assert len(mixes[0].parts()) == 12
    assert all(source.num_documents == 100 for source in mixes[0].parts())
    assert all(str(f).startswith("../shared/data/") for s in mixes[1].parts() for f in s.paths)
    config = Config.from_file(bundled / "model_config.yaml")
    moved = [
        replace(source, files=[shared_data / f.relative_to("../shared/data") for f in source.paths])
        for source in mixes[1].parts()
    ]
    blocks = load_blocks(replace(mixes[1], sources=moved), bundled, config=config)
    assert blocks.num_blocks > 20
