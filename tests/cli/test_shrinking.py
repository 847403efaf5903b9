"""`nas finetune --budgets`: networks that are searched for while they are trained."""

import json

import pytest
import torch
import yaml

from tests.cli.test_finetune import SMALL, assert_same_training, nas, started, text_options, words
from whittle_nas.__main__ import main
from whittle_nas.cli.candidates import choose_candidates
from whittle_nas.cli.selection import space_of
from whittle_nas.data import Part, TextData
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.search.shrinking import Shrinking
from whittle_nas.space import SubNetwork
from whittle_nas.train.sources import load_samples
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
from whittle_nas.weights.counting import parameter_counter

BUDGETS = ["--budgets", "60%, 80%", "--shrink.candidates", 4, "--shrink.samples", 3]


def picks_of(checkpoint_dir, out_dir) -> dict[str, SubNetwork]:
    found = choose_candidates(open_checkpoint(checkpoint_dir), subnetworks=out_dir / "picks.yaml")
    return {one.label: one.subnetwork for one in found}


def history(path) -> dict[int, float]:
    losses = yaml.safe_load((path / "losses.yaml").read_text())["nats_per_token"]
    return {step: found["full"] for step, found in losses.items()}


@pytest.mark.slow
def test_each_network_is_the_best_of_what_was_tried_inside_the_one_before(
    tmp_path, checkpoint_dir, text, capsys
):
    out_dir = tmp_path / "out"
    common = ["--checkpoint_dir", checkpoint_dir, *text_options(text), *SMALL, *BUDGETS]
    common += ["--trainer.logger", "[]"]
    assert nas(*common, "--out_dir", out_dir) == 0
    shown = capsys.readouterr().out
    subs = picks_of(checkpoint_dir, out_dir)
    assert list(subs) == ["num_params-80", "num_params-60"]
    checkpoint = open_checkpoint(checkpoint_dir)
    full, count = SubNetwork.from_config(checkpoint.config), parameter_counter(checkpoint.config)
    found = Shrinking.of(
        space_of(checkpoint, None),
        {name: f"num_params <= {name[-2:]}%" for name in subs},
        lambda sub, _: count(sub),
        candidates=4,
        seed=1337,
    )
    # Scored again, with another function, as parts of the checkpoint that was written before.
    data = TextData(files=text, block_size=32, valid_fraction=0.1)
    before, around = checkpoint_dir, full
    for name, sub in subs.items():
        model = load_supernet(before)
        samples = load_samples(data, before, config=model.config, part=Part.TRAIN).samples[-3:]
        tokens = torch.stack([torch.cat([s.input_ids, s.labels[-1:]]) for s in samples])
        members = found.members(name, around)
        losses = [nats_per_token(model.standalone(m.within(around)), tokens) for m in members]
        assert len(members) == 4
        assert members[losses.index(min(losses))] == sub
        assert f"{name}: {sub}, {count(sub):,} parameters, {min(losses):.3f} nats" in shown
        before, around = out_dir / name, sub
        assert SubNetwork.from_config(open_checkpoint(before).config) == sub.within(sub)
    # It starts from the trained weights of the larger one.
    larger, small = load_supernet(out_dir / "num_params-80"), subs["num_params-60"]
    valid = load_samples(data, before, config=larger.config, part=Part.VALID).samples[:4]
    tokens = torch.stack([torch.cat([s.input_ids, s.labels[-1:]]) for s in valid])
    inside = small.within(subs["num_params-80"])
    start = nats_per_token(larger.standalone(inside), tokens)
    assert history(out_dir / "num_params-60")[0] == pytest.approx(start, rel=1e-5)

    # Interrupted, it goes on with what was found, and with no search if that is there.
    weights = out_dir / "num_params-60" / "lit_model.pth"
    expected, when = torch.load(weights), (out_dir / "num_params-80" / "lit_model.pth").stat()
    weights.unlink()
    assert nas(*common, "--out_dir", out_dir, "--resume", "true") == 0
    again = capsys.readouterr().out
    assert "num_params-80 is trained already" in again
    assert "nats before training" not in again
    assert (out_dir / "num_params-80" / "lit_model.pth").stat().st_mtime_ns == when.st_mtime_ns
    assert all(torch.equal(tensor, expected[n]) for n, tensor in torch.load(weights).items())
    weights.unlink()
    (out_dir / "picks.yaml").unlink()
    assert nas(*common, "--out_dir", out_dir, "--resume", "true") == 0
    assert picks_of(checkpoint_dir, out_dir)["num_params-60"] == small
    assert all(torch.equal(tensor, expected[n]) for n, tensor in torch.load(weights).items())
    # Another budget of the same name is another training.
    other = ["--budgets", '{"num_params-80": "num_params <= 50%"}', "--resume", "true"]
    assert nas(*common, *other, "--out_dir", out_dir) == 2
    assert "num_params-80 of " in (error := capsys.readouterr().err)
    assert "does not fit --budgets and --search_space" in error


@pytest.mark.slow
def test_what_was_tried_was_repaired(tmp_path, monkeypatch, capsys):
    """The bundled model: repair finds nothing to do in one with random weights."""
    monkeypatch.chdir(tmp_path)
    common = ["--checkpoint_dir", "pydoc-1m", "--data.files", "pydoc-1m/train.jsonl", *SMALL]
    common += ["--data.block_size", 64, "--data.valid_fraction", 0.1, "--trainer.logger", "[]"]
    common += ["--trainer.max_steps", 1, "--budgets", "70%", "--shrink.candidates", 3]
    found = {}
    for repair in ("false", "true"):
        assert nas(*common, "--out_dir", repair, "--repair", repair) == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if "before training" in x)
        found[repair] = float(line.split(" nats")[0].split()[-1])
        assert history(tmp_path / repair / "num_params-70")[0] < found[repair] + 1
    assert found["true"] < found["false"] - 0.1
    assert (
        history(tmp_path / "true/num_params-70")[0] < history(tmp_path / "false/num_params-70")[0]
    )


@pytest.mark.slow
def test_budgets_of_one_network_are_one_training(tmp_path, checkpoint_dir, text, capsys):
    """And a dry run of Lightning's writes nothing; a file that it trains from stays."""
    common = ["--checkpoint_dir", checkpoint_dir, *text_options(text), *SMALL]
    common += ["--trainer.logger", "[]", "--shrink.samples", 3, "--out_dir", tmp_path / "out"]
    space = tmp_path / "space.yaml"
    space.write_text("{n_layer: [1, 2, 3]}")
    common += ["--search_space", space]
    given = ["--budgets", "90%, 88%, 80%", "--shrink.candidates", 2]
    assert nas(*common, *given, "--trainer.fast_dev_run", "true") == 0
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert nas(*common, *given) == 0
    shown = capsys.readouterr().out
    assert "num_params-88: the network before it is under this budget as well" in shown
    assert f"trained networks: {tmp_path}/out/num_params-90, {tmp_path}/out/num_params-80" in shown
    layers = {name: sub.n_layer for name, sub in picks_of(checkpoint_dir, tmp_path / "out").items()}
    assert layers == {"num_params-90": 2, "num_params-80": 1}
    picks = tmp_path / "out" / "picks.yaml"
    again = [*common[:-2], "--subnetworks", picks, "--overwrite", "true"]
    assert nas(*again) == 0
    assert picks.is_file()


@pytest.mark.slow
def test_budgets_on_time_read_a_table(tmp_path, checkpoint_dir, text, capsys):
    table = tmp_path / "table.json"
    profile = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "times"]
    assert main(["profile", *map(str, profile), "--table", str(table), "--tokens", "32"]) == 0
    before = table.read_bytes()
    common = [
        "--checkpoint_dir",
        checkpoint_dir,
        *text_options(text),
        *SMALL,
        "--shrink.tokens",
        32,
    ]
    common += ["--trainer.logger", "[]", "--shrink.samples", 3, "--shrink.candidates", 2]
    common += ["--shrink.latency_table", table, "--out_dir", tmp_path / "out"]
    limits = '{fast: "latency_ms <= 90%, num_params <= 80%"}'
    assert nas(*common, "--budgets", limits) == 0
    assert table.read_bytes() == before
    (sub,) = picks_of(checkpoint_dir, tmp_path / "out").values()
    checkpoint = open_checkpoint(checkpoint_dir)
    count = parameter_counter(checkpoint.config)
    assert count(sub) <= 0.8 * count(SubNetwork.from_config(checkpoint.config))
    capsys.readouterr()
    content = json.loads(before)
    table.write_text(json.dumps(content | {"times": content["times"] | {"decode": {}}}))
    before = table.read_bytes()
    assert nas(*common, "--budgets", "decode_ms_per_token <= 80%", "--overwrite", "true") == 2
    assert "a training measures no decode_ms_per_token" in capsys.readouterr().err
    assert table.read_bytes() == before


@pytest.mark.slow
def test_two_processes_find_and_train_the_same_networks(tmp_path, checkpoint_dir, text):
    common = [*BUDGETS, "--trainer.max_steps", 4, "--lora.dropout", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    assert nas(*words(checkpoint_dir, one, text, *common, "--batch_size", 4)) == 0
    shared = ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    assert started(*words(checkpoint_dir, two, text, *common, *shared)).wait() == 0
    assert (one / "picks.yaml").read_text() == (two / "picks.yaml").read_text()
    for name in picks_of(checkpoint_dir, one):
        assert_same_training(*(torch.load(run / name / "lit_model.pth") for run in (two, one)))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--budgets", "80%", "--subnetworks", "picks.yaml"], "picks.yaml names them: leave one"),
        (["--budgets", "80%", "--share", "none"], "which is --share cascade; leave one of the two"),
        (["--budgets", "80%", "--sampler.kind", "random"], "leave `sampler` out"),
        (["--budgets", "80%", "--lora.ranks", "[2, 4]"], "lora.ranks: adapters of networks"),
        (["--budgets", "latency_ms <= 80%"], "a training measures no latency_ms; give --shrink"),
        (["--budgets", "val_loss <= 3"], "val_loss <= 3 must be an upper limit"),
        (["--budgets", "0.1%"], "no sub-network of the search space satisfies it; the nearest"),
        (["--budgets", ","], "--budgets ',' names none"),
        (["--budgets", "80%", "--shrink.tokens", 99999], "--shrink.tokens 99999 must be between"),
        (["--budgets", "80%", "--shrink.samples", 1], "shrink.samples=1 must be at least 2"),
        (["--budgets", "80", "--shrink.candidates", 0], "shrink.candidates=0 must be at least 1"),
    ],
)
def test_wrong_budgets(tmp_path, checkpoint_dir, text, given, sentence, capsys):
    out_dir, picks = tmp_path / "out", tmp_path / "picks.yaml"
    picks.write_text(yaml.safe_dump([{"name": "shallow", "n_layer": 1}]))
    given = [picks if word == "picks.yaml" else word for word in given]
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *text_options(text)]
    assert nas(*common, *SMALL, *given) == 2
    assert sentence in capsys.readouterr().err
    assert not out_dir.exists()
