"""The commands as functions: objects back, nothing printed."""

import subprocess
import sys

import pytest
import torch

import whittle_nas as nas
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.perplexity import nats_per_token


def test_importing_loads_nothing_and_names_are_there():
    script = (
        "import sys, whittle_nas as nas; heavy = {'torch', 'litgpt', 'jsonargparse', 'yaml'}; "
        "assert not heavy & set(sys.modules); assert 'search' in dir(nas); "
        "import whittle_nas.search.options; assert callable(nas.search); "
        "assert nas.search.options.Method; nas.Front; print(nas.load.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "load", done.stderr


@pytest.fixture(scope="module")
def sorted_one(tmp_path_factory):
    options = {"data": {"num_blocks": 4, "block_size": 64}, "layer_blocks": 2}
    text = nas.load("pydoc-1m").path / "calibration.jsonl"
    options["data"]["files"] = str(text)
    return nas.importance("pydoc-1m", out_dir=tmp_path_factory.mktemp("x") / "s", **options)


@pytest.mark.slow
def test_from_a_checkpoint_to_an_export(sorted_one, bundled, tmp_path, capfd):
    text = {"files": bundled / "valid.jsonl", "block_size": 64, "num_blocks": 4}
    front = nas.search(sorted_one, text, num_trials=8, search_blocks=2, method="stratified")
    table = front.to_pandas()
    assert list(table.index) == [choice.entry.index for choice in front]
    assert {"val_loss", "num_params", "n_embd"} <= set(table.columns)
    budget = float(table["num_params"].median())
    best = front.best(f"num_params <= {budget}")
    fitting = table[table["num_params"] <= budget]
    assert best.metrics["val_loss"] == fitting["val_loss"].min()
    made = nas.load(nas.export(best, tmp_path / "small"))
    assert made.num_params == best.metrics["num_params"]
    scored = nas.evaluate(best, text, out_dir=tmp_path / "scores")
    loss = scored[scored["metric"] == "nats_per_token"]["value"]
    assert loss.tolist() == pytest.approx([best.metrics["val_loss"]], abs=1e-4)
    with pytest.raises(ConfigError, match="num_params"):
        front.best("num_params <= 1")
    with pytest.raises(ConfigError, match="num_trials"):
        nas.search(sorted_one, text, num_trials=0)
    assert capfd.readouterr().out == ""
    assert f"Front({len(front)} sub-networks" in repr(front)
    assert "<table" in front._repr_html_()
    assert "pydoc-1m" in repr(sorted_one)


def test_a_sub_network_runs_like_litgpts_models(sorted_one):
    supernet, sub = sorted_one.supernet(), sorted_one.subnetwork(n_layer=2)
    whole = sorted_one.config
    assert (sub.n_layer, sub.n_embd, sub.sizes()["n_head"]) == (2, whole.n_embd, whole.n_head)
    ids = torch.randint(3, 1000, (3, 33))
    model, alone = supernet.subnet(sub), supernet.standalone(sub)
    assert torch.equal(model(ids.int()), alone(ids))
    for tokens in (ids, ids.int()):  # litgpt's tokenizer gives int32
        assert nats_per_token(model, tokens) == pytest.approx(nats_per_token(alone, ids), abs=1e-6)
