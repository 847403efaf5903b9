"""`nas candidates` and `nas search --method ilp` from end to end on a small model."""

import csv
import json
from shutil import copytree

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.cli.test_main import nas
from whittle_nas.candidates.library import open_library
from whittle_nas.cli.candidates import library_of
from whittle_nas.data import TextData, load_blocks
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.export.checkpoint import plan_export
from whittle_nas.export.deci import Engine
from whittle_nas.search.ilp import overlap
from whittle_nas.space.front import read_front
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint

BLOCKS = ("--data.num_blocks", 8, "--data.block_size", 32)


@pytest.fixture(scope="module")
def library(small_checkpoint, bundled, tmp_path_factory):
    """A library beside its checkpoint; for reading only."""
    out = tmp_path_factory.mktemp("candidates") / "library"
    copytree(small_checkpoint, out.parent / "checkpoint")
    text = ("--data.files", bundled / "valid.jsonl", *BLOCKS)
    words = ("--checkpoint_dir", out.parent / "checkpoint", "--out_dir", out, *text, "--rank", 8)
    assert nas("candidates", *words) == 0
    return out


def search(library, out_dir, bundled, *options):
    where = ("--checkpoint_dir", library.parent / "checkpoint", "--candidates", library)
    text = ("--data.files", bundled / "valid.jsonl", *BLOCKS, "--search_blocks", 4)
    return nas("search", "--method", "ilp", *where, "--out_dir", out_dir, *text, *options)


def rows(out_dir):
    return list(csv.DictReader((out_dir / "trials.csv").read_text().splitlines()))


@pytest.mark.slow
def test_rounds_use_the_model_that_this_process_has(library, bundled, tmp_path, monkeypatch):
    def second(*_, **__):
        raise AssertionError("a second copy of the model")

    monkeypatch.setattr("whittle_nas.search.rounds.load_supernet", second)
    limits = ("--constraints", "num_params <= 80%", "--num_solutions", 1, "--ilp_rounds", 1)
    assert search(library, tmp_path / "out", bundled, *limits) == 0
    (found,) = json.loads((tmp_path / "out" / "ilp.json").read_text())["programs"]
    assert found["rounds"]


@pytest.mark.slow
def test_solutions_keep_budgets_and_overlap_and_are_what_is_measured(library, bundled, tmp_path):
    out = tmp_path / "out"
    limits = ("--budgets", "90%,70%", "--constraints", "memory_bytes <= 95%, flops <= 0.95x")
    several = ("--num_solutions", 3, "--overlap", 0.5, "--ilp_rounds", 1)
    assert search(library, out, bundled, *limits, *several) == 0
    checkpoint = open_checkpoint(library.parent / "checkpoint")
    known, net = open_library(library, checkpoint), load_supernet(checkpoint.path)
    front = read_front(out / "front.json", range(3))
    assert front.candidates == str(library)
    data = TextData(files=bundled / "valid.jsonl", block_size=32, num_blocks=8)
    tokens = load_blocks(data, checkpoint.path, config=checkpoint.config).tokens
    whole = front.whole["metrics"]
    for entry in front.entries:
        model = net.standalone(entry.subnetwork, known.patch(entry.subnetwork))
        assert entry.metrics["val_loss"] == pytest.approx(nats_per_token(model, tokens), rel=1e-5)
        assert entry.metrics["num_params"] == sum(p.numel() for p in model.parameters())
    for row in rows(out):
        assert float(row["memory_bytes"]) <= 0.95 * whole["memory_bytes"]
        assert float(row["flops"]) <= 0.95 * whole["flops"]
        assert float(row["num_params"]) <= 0.9 * whole["num_params"]
    report = json.loads((out / "ilp.json").read_text())["programs"]
    assert [found["budget"] for found in report] == ["num_params-90", "num_params-70"]
    for found in report:
        subs = [known.subnetwork(known.solution(_sub(one, known))) for one in found["solutions"]]
        pairs = [(known.solution(a), known.solution(b)) for a in subs for b in subs if a != b]
        assert all(overlap(a, b) <= 3 for a, b in pairs)
        assert found["rounds"]
        assert all(one["after"] <= one["before"] for one in found["rounds"])
    hidden = torch.arange(20)[None]
    for index in (0, len(front.entries) - 1):
        exported = tmp_path / f"exported-{index}"
        source = ("--checkpoint_dir", checkpoint.path, "--front", out / "front.json")
        assert nas("export", *source, "--index", index, "--out_dir", exported) == 0
        sub = front.entries[index].subnetwork
        expected = net.standalone(sub, known.patch(sub))(hidden)
        found = load_supernet(exported)
        torch.testing.assert_close(found.standalone(found.full)(hidden), expected)
    picks = yaml.safe_load((out / "picks.yaml").read_text())
    assert {pick["candidates"] for pick in picks} == {str(library)}


@pytest.mark.slow
def test_linear_maps_are_chosen_exported_and_generated_from(checkpoint_dir, bundled, tmp_path):
    text = ("--data.files", bundled / "valid.jsonl", *BLOCKS)
    library = tmp_path / "library"
    grid = ("--grid.linear", "true", "--grid.heads", "", "--grid.neurons", "")
    words = ("--checkpoint_dir", checkpoint_dir, "--out_dir", library, *text, *grid)
    assert nas("candidates", *words) == 0
    out, limits = tmp_path / "out", ("--constraints", "num_params <= 95%")
    assert search(library, out, bundled, *limits, "--num_solutions", 2, "--overlap", 0.8) == 0
    checkpoint = open_checkpoint(checkpoint_dir)
    known, net = open_library(library, checkpoint), load_supernet(checkpoint_dir)
    front = read_front(out / "front.json", range(3))
    sub = front.entries[0].subnetwork
    assert any(any(block.forms) for block in sub.blocks)
    model, ids = net.standalone(sub, known.patch(sub)), torch.arange(20)[None]
    own = sum(parameter.numel() for parameter in model.parameters())
    assert front.entries[0].metrics["num_params"] == own
    chosen = ("--checkpoint_dir", checkpoint_dir, "--front", out / "front.json", "--index", 0)
    assert nas("export", *chosen, "--out_dir", tmp_path / "own") == 0
    torch.testing.assert_close(load_supernet(tmp_path / "own").model(ids), model(ids))
    assert nas("generate", *chosen, "--prompt", "a", "--max_new_tokens", 3) == 0
    assert nas("export", *chosen, "--out_dir", tmp_path / "hf", "--format", "hf") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-5)
    scored = ("--data.files", bundled / "valid.jsonl", *BLOCKS)
    assert nas("evaluate", *chosen, *scored, "--out_dir", tmp_path / "scores") == 0


@pytest.mark.slow
def test_every_network_of_a_search_for_an_engine_runs_there(library, bundled, tmp_path, capsys):
    out, limits = tmp_path / "out", ("--constraints", "num_params <= 90%", "--num_solutions", 3)
    assert search(library, out, bundled, *limits, "--targets", "vllm") == 0
    source = open_checkpoint(library.parent / "checkpoint")
    tried = [SubNetwork.from_dict(json.loads(row["shape"]), range(3)) for row in rows(out)]
    assert len(tried) > 3
    for sub in tried:
        plan_export(source, sub, to_hf=True, targets={Engine.vllm})
    # Its widths are no multiples of 256.
    assert search(library, tmp_path / "cpp", bundled, *limits, "--targets", "llama.cpp") == 2
    assert "--targets llama.cpp: no candidate of" in capsys.readouterr().err


def _sub(one, library):
    return SubNetwork.from_dict(one["subnetwork"], range(len(library.parts) // 2))


@pytest.mark.slow
def test_an_interrupted_program_search_ends_as_a_whole_one(library, bundled, tmp_path):
    options = ("--constraints", "num_params <= 80%", "--num_solutions", 3)
    assert search(library, tmp_path / "whole", bundled, *options) == 0
    copytree(tmp_path / "whole", tmp_path / "cut")
    kept = rows(tmp_path / "whole")
    lines = (tmp_path / "cut" / "trials.csv").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "trials.csv").write_text("".join(lines[:3]) + lines[3][:20])
    (tmp_path / "cut" / "ilp.json").unlink()
    assert search(library, tmp_path / "cut", bundled, *options, "--resume", "true") == 0
    found = rows(tmp_path / "cut")
    assert [{**row, "seconds": ""} for row in found] == [{**row, "seconds": ""} for row in kept]


WRONG = (
    (("--constraints", "num_params <= 1000"), "has num_params <= 1000; the smallest has"),
    (("--constraints", "num_params >= 1000"), "takes upper limits only"),
    ((), "needs a budget"),
    (("--constraints", "num_params <= 80%", "--overlap", 1.5), "--overlap 1.5 must be"),
    (("--constraints", "num_params <= 80%", "--num_solutions", 0), "--num_solutions 0 must"),
    (("--constraints", "num_params <= 80%", "--targets", "mlx"), "--targets mlx: choose from"),
    (("--objectives", "flops,num_params", "--constraints", "flops <= 80%"), "put val_loss or"),
    (("--constraints", "flops <= 80%", "--search_space", "aligned"), "those of --candidates"),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_several_processes_make_a_library_that_opens(library, bundled, tmp_path, capsys):
    pytest.importorskip("ray")
    checkpoint, out = library.parent / "checkpoint", tmp_path / "library"
    words = ("--checkpoint_dir", checkpoint, "--out_dir", out, "--rank", 8, "--devices", 2)
    assert nas("candidates", *words, "--data.files", bundled / "valid.jsonl", *BLOCKS) == 0
    assert "rise of the loss" in capsys.readouterr().out
    found, known = (open_library(path, open_checkpoint(checkpoint)) for path in (out, library))
    assert [len(choices) for choices in found.candidates] == [len(c) for c in known.candidates]
    assert found.about["made"]["loss"] == pytest.approx(known.about["made"]["loss"])


def test_what_a_killed_process_left_is_no_obstacle(library, bundled, tmp_path, capsys):
    out = tmp_path / "library"
    copytree(library, out)
    (out / "library.json").unlink()
    (out / "run.yaml").unlink()
    half = out / ".layer-001.safetensors.123.partial"
    half.write_bytes(b"half")
    words = ("--checkpoint_dir", library.parent / "checkpoint", "--out_dir", out, "--rank", 8)
    assert nas("candidates", *words, "--data.files", bundled / "valid.jsonl", *BLOCKS) == 0
    assert "layers are there already" in capsys.readouterr().out
    assert not half.exists()
    assert (out / "library.json").read_text() == (library / "library.json").read_text()


def test_a_library_stays_until_its_successor_can_begin(library, bundled, tmp_path, monkeypatch):
    out = tmp_path / "library"
    copytree(library, out)

    def missing():
        raise ConfigError("--devices needs Ray")

    monkeypatch.setattr("whittle_nas.cluster._import_ray", missing)
    words = ("--checkpoint_dir", library.parent / "checkpoint", "--out_dir", out, "--rank", 8)
    options = ("--devices", 2, "--overwrite", "true", "--data.files", bundled / "valid.jsonl")
    assert nas("candidates", *words, *options, *BLOCKS) == 2
    assert (out / "library.json").is_file()


def test_what_does_not_go_is_one_sentence(library, bundled, tmp_path, capsys):
    for options, sentence in WRONG:
        assert search(library, tmp_path / "out", bundled, *options) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_parts_of_a_library_are_not_repaired(library, tmp_path, capsys):
    checkpoint = open_checkpoint(library.parent / "checkpoint")
    known = open_library(library, checkpoint)
    row = {"name": "one", **known.subnetwork((1, *known.original[1:])).to_dict()}
    file = tmp_path / "one.yaml"
    whole = SubNetwork.from_config(checkpoint.config)
    plain = {"name": "plain", **SubNetwork(whole.n_embd - 8, whole.blocks).to_dict()}
    file.write_text(yaml.safe_dump([{**row, "candidates": str(library)}, plain]))
    words = ("--checkpoint_dir", checkpoint.path, "--subnetworks", file, "--out_dir")
    text = ("--data.files", file, "--repair", "true")
    for command, name in (("export", ("--name", "one")), ("evaluate", ())):
        assert nas(command, *words, tmp_path / "out", *text, *name) == 2
        error = capsys.readouterr().err
        assert f"--subnetworks {file} has networks of the candidates {library}" in error
        assert error.count("\n") == 1


def test_parts_of_few_bits_are_not_trained(library, bundled, tmp_path, capsys):
    library = copytree(library.parent, tmp_path / "copy") / "library"
    spec = json.loads((library / "library.json").read_text())
    first = spec["parts"][0]["candidates"]
    first.append({**first[0], "sizes": [*first[0]["sizes"], "8bit"]})
    (library / "library.json").write_text(json.dumps(spec))
    checkpoint = open_checkpoint(library.parent / "checkpoint")
    known = open_library(library, checkpoint)
    out, data = tmp_path / "out", ("--data.files", bundled / "train.jsonl", *BLOCKS)
    file = tmp_path / "picks.yaml"
    sub = known.subnetwork((len(first) - 1, *known.original[1:]))
    row = {"name": "eight", **sub.to_dict(), "candidates": str(library)}
    file.write_text(yaml.safe_dump([row]))
    words = ("--checkpoint_dir", checkpoint.path, "--subnetworks", file, "--out_dir", out)
    assert nas("finetune", *words, *data) == 2
    assert f"--subnetworks {file} has 8bit parts" in capsys.readouterr().err
    limit = ("--constraints", "num_params <= 80%", "--recovery.budget", "num_params <= 80%")
    text = ("--recovery.data.files", bundled / "train.jsonl")
    assert search(library, out, bundled, *limit, *text) == 2
    assert f"--recovery.budget: --candidates {library} has 8bit parts" in capsys.readouterr().err
    assert not out.exists()


def test_a_library_of_another_checkpoint_is_refused(library, bundled, tmp_path, capsys):
    library = copytree(library.parent, tmp_path / "copy") / "library"
    weights = library.parent / "checkpoint" / "lit_model.pth"
    tensors = {name: tensor.clone() for name, tensor in torch.load(weights).items()}
    tensors["lm_head.weight"] += 1
    weights.unlink()
    torch.save(tensors, weights)
    options = ("--constraints", "num_params <= 80%")
    assert search(library, tmp_path / "out", bundled, *options) == 2
    assert "belongs to another checkpoint" in capsys.readouterr().err
    words = ("--checkpoint_dir", library.parent / "checkpoint", "--out_dir", library)
    text = ("--data.files", bundled / "valid.jsonl", *BLOCKS)
    assert nas("candidates", *words, *text) == 2
    assert "holds a finished library" in capsys.readouterr().err


@pytest.mark.slow
def test_local_search_starts_from_solutions_and_keeps_to_the_library(library, bundled, tmp_path):
    limits = ("--constraints", "num_params <= 80%", "--num_solutions", 2, "--ilp_rounds", 0)
    assert search(library, tmp_path / "ilp", bundled, *limits) == 0
    start = ("--start_from", tmp_path / "ilp" / "front.json", "--num_trials", 8)
    local = ("--method", "local_search", *limits[:2])
    assert search(library, tmp_path / "local", bundled, *local, *start) == 0
    known = open_library(library, open_checkpoint(library.parent / "checkpoint"))
    front = read_front(tmp_path / "ilp" / "front.json", range(3))
    tried = [json.loads(row["shape"]) for row in rows(tmp_path / "local")]
    inside = [e.subnetwork.to_dict() for e in front.entries if e.subnetwork.n_layer == 3]
    assert tried[: len(inside)] == inside
    for shape in tried:
        known.solution(SubNetwork.from_dict(shape, range(3)))


@pytest.mark.slow
def test_training_starts_from_candidates(library, bundled, tmp_path):
    """The best of a budget are ranked again, and the picked one is finished."""
    out, data = tmp_path / "out", ("--data.files", bundled / "train.jsonl", *BLOCKS)
    again = [word.replace("--data", "--recovery.data") for word in map(str, data)]
    short = ("--recovery.candidates", 2, "--recovery.steps", 1, "--recovery.budget")
    limit = "num_params <= 80%"
    options = ("--num_solutions", 3, "--ilp_rounds", 0, "--budgets", "80%")
    assert search(library, out, bundled, *options, *again, *short, limit) == 0
    trials = {row["shape"]: float(row["val_loss"]) for row in rows(out)}
    checkpoint = open_checkpoint(library.parent / "checkpoint")
    net, known = load_supernet(checkpoint.path), open_library(library, checkpoint)
    data_ = TextData(files=bundled / "valid.jsonl", block_size=32, num_blocks=8)
    tokens = load_blocks(data_, checkpoint.path, config=checkpoint.config).tokens
    recovered = read_front(out / "recovery.json", range(3))
    assert len(recovered.entries) == 2
    for entry in recovered.entries:
        sub = entry.subnetwork
        assert json.dumps(sub.to_dict()) in trials
        before = nats_per_token(net.standalone(sub, known.patch(sub)), tokens)
        assert entry.metrics["val_loss"] == pytest.approx(before, rel=1e-4)
    trained = tmp_path / "trained"
    words = ("--subnetworks", out / "picks.yaml", "--out_dir", trained, "--trainer.max_steps", 1)
    valid = ("--valid.files", bundled / "valid.jsonl", "--valid.num_blocks", 8)
    where = ("--checkpoint_dir", checkpoint.path, "--valid.block_size", 32, "--batch_size", 2)
    assert nas("finetune", *where, *data, *words, *valid) == 0
    history = yaml.safe_load((trained / "num_params-80" / "losses.yaml").read_text())
    first = history["nats_per_token"][0]["full"]
    best = yaml.safe_load((out / "picks.yaml").read_text())[0]
    sub = SubNetwork.from_dict(
        {k: best[k] for k in best if k not in ("name", "candidates")}, range(3)
    )
    expected = nats_per_token(net.standalone(sub, known.patch(sub)), tokens)
    assert first == pytest.approx(expected, rel=1e-4)


def test_a_file_of_plain_and_made_networks_gives_each_its_own(library, tmp_path):
    checkpoint = open_checkpoint(library.parent / "checkpoint")
    known = open_library(library, checkpoint)
    made = known.subnetwork((1,) * len(known.parts))
    full = SubNetwork.from_config(checkpoint.config)
    plain = SubNetwork(full.n_embd - 8, full.blocks)  # the library keeps the width
    file = tmp_path / "mixed.yaml"
    rows_ = [
        {"name": "plain", **plain.to_dict()},
        {"name": "made", **made.to_dict(), "candidates": str(library)},
        {"name": "sliced", **made.to_dict()},
    ]
    file.write_text(yaml.safe_dump(rows_[:2]))
    found = library_of(checkpoint, subnetworks=file)
    assert not found.patch(plain)
    assert found.patch(made).names() == known.patch(made).names() != set()
    assert found.identity() == known.identity()
    file.write_text(yaml.safe_dump(rows_))
    assert library_of(checkpoint, subnetworks=file, name="plain") is None
    assert library_of(checkpoint, subnetworks=file, name="sliced") is None
    assert library_of(checkpoint, subnetworks=file, name="made").patch(made)
    words = ("--checkpoint_dir", checkpoint.path, "--subnetworks", file, "--max_new_tokens", 2)
    assert nas("generate", *words, "--name", "plain", "--prompt", "a") == 0


@pytest.mark.slow
def test_what_a_library_made_is_timed_as_it_is_and_not_trained_as_slices(
    library, bundled, tmp_path, capsys
):
    path = library.parent / "checkpoint"
    words = ("--data.files", bundled / "valid.jsonl", *BLOCKS, "--grid.linear", "true")
    made = tmp_path / "linear"
    assert nas("candidates", "--checkpoint_dir", path, "--out_dir", made, *words) == 0
    known = open_library(made, open_checkpoint(path))
    linear = [["linear" in one.sizes for one in part].index(True) for part in known.candidates]
    file = tmp_path / "picks.yaml"
    row = {"name": "maps", **known.subnetwork(tuple(linear)).to_dict(), "candidates": str(made)}
    file.write_text(yaml.safe_dump([row]))
    common = ("--checkpoint_dir", path, "--subnetworks", file)
    capsys.readouterr()
    assert nas("profile", *common, "--tokens", 8, "--repeats", 1) == 0
    assert "maps" in capsys.readouterr().out
    learn = ("finetune", *common, "--out_dir", tmp_path / "out", *words[:2])
    for options, words in (
        (("--share", "all"), "made of parts of a library"),
        (("--repair", "true"), "are fitted already: leave --repair out"),
    ):
        assert nas(*learn, "--data.valid_fraction", 0.1, *options) == 2
        error = capsys.readouterr().err
        assert " ".join(options) in error
        assert words in error
