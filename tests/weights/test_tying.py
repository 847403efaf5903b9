"""A head that is the token table: counted once, and one parameter through every command."""

import json
from dataclasses import replace

import pytest
import torch
from litgpt import GPT

from tests.conftest import fill_random, tiny_config, uniform
from whittle_nas.__main__ import main
from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.metrics.latency_parts import Load
from whittle_nas.search.costs import Costs
from whittle_nas.space import load_space
from whittle_nas.train import lora
from whittle_nas.train.choices import SamplerOptions
from whittle_nas.train.memory import estimate_memory
from whittle_nas.train.options import LoraOptions, LossOptions
from whittle_nas.train.prepare import TrainedTensors, load_trainable
from whittle_nas.train.sampling import make_sampler
from whittle_nas.weights import axes
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
from whittle_nas.weights.counting import matmul_counter, parameter_counter
from whittle_nas.weights.tying import HEAD, TABLE, untied

SUB = uniform(24, 4, 2, 8, 40, 2)
LEAST = ["--trainer.max_steps", 2, "--batch_size", 2, "--trainer.accelerator", "cpu",
         "--trainer.enable_progress_bar", "false", "--validation.num_networks", 2,
         "--validation.num_samples", 2, "--optimizer.lr", 0.01]  # fmt: skip


def nas(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [f"{i} is a number, and so is {i * i}, its square. " * 3 for i in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def tied_dir(checkpoint_dir):
    """A file that holds the same table twice."""
    return tie(checkpoint_dir, twice=True)


def tie(checkpoint_dir, *, twice):
    state = torch.load(checkpoint_dir / "lit_model.pth", weights_only=True)
    state[HEAD] = state[TABLE].clone() if twice else state[TABLE]
    torch.save(state, checkpoint_dir / "lit_model.pth")
    return checkpoint_dir


def is_stored_once(path) -> bool:
    tensors = torch.load(path / "lit_model.pth", weights_only=True, mmap=True)
    one_table = tensors[HEAD].data_ptr() == tensors[TABLE].data_ptr()
    held = {t.data_ptr(): t.nbytes for t in tensors.values()}
    return one_table and (path / "lit_model.pth").stat().st_size < 1.2 * sum(held.values())


@pytest.mark.parametrize("twice", [True, False])
def test_the_table_is_counted_once(checkpoint_dir, twice):
    tied_dir = tie(checkpoint_dir, twice=twice)
    found, supernet = open_checkpoint(tied_dir), load_supernet(tied_dir)
    assert found.tied
    assert supernet.tied
    config, apart = found.config, untied(found.config)
    held = sum(parameter.numel() for parameter in supernet.model.parameters())  # torch's own dedup
    table = config.padded_vocab_size * config.n_embd
    costs, costs_apart, whole = AnalyticCosts(config), AnalyticCosts(apart), supernet.full
    assert costs.num_params(whole) == held == costs_apart.num_params(whole) - table
    assert costs.weight_bytes(whole, torch.bfloat16) == 2 * held
    own = supernet.plan(SUB).config
    assert axes.num_params(own) == parameter_counter(config)(SUB)
    assert axes.num_params(own) == parameter_counter(apart)(SUB) - config.padded_vocab_size * 24
    for sub in (whole, SUB):
        assert costs.num_params_non_embedding(sub) == costs_apart.num_params_non_embedding(sub)
        assert costs.flops(sub, 32) == costs_apart.flops(sub, 32)
    assert matmul_counter(config)(SUB) == matmul_counter(apart)(SUB)
    # what budgets are shares of, fronts say and samplers spread over
    load = Load(1, 8, torch.device("cpu"), torch.float32)
    searched = Costs(config, found.info, load).of(whole)
    assert searched["num_params"] == searched["weight_bytes"] / 4 == held
    space = load_space("aligned", config)
    _, grid = make_sampler(SamplerOptions(num_bins=2), space, supernet, seed=0)
    assert grid.edges[-1] == held


def test_two_tables_stay_two(checkpoint_dir):
    assert not open_checkpoint(checkpoint_dir).tied
    assert not load_supernet(checkpoint_dir).tied


@pytest.mark.parametrize("options", [None, LoraOptions(r=4, dropout=0.0)])
def test_a_subnetworks_gradients_of_both_ends_add_up(tied_dir, options):
    found = open_checkpoint(tied_dir)
    both = load_trainable(found, options)
    torch.manual_seed(0)
    apart = load_trainable(replace(found, config=untied(found.config)), options)
    if options:
        for name, parameter in both.model.named_parameters():
            if lora.is_adapter(name):
                torch.nn.init.normal_(parameter, std=0.1)
    apart.model.load_state_dict(both.model.state_dict())
    ids = torch.arange(12)[None]
    for supernet in (both, apart):
        supernet.subnet(SUB)(ids).square().mean().backward()
    ends = [("lora_A", "lora_B"), ("weight",)][options is None]
    for end in ends:
        head, table = (getattr(apart.model.get_submodule(name), end).grad
                       for name in ("lm_head", "transformer.wte"))  # fmt: skip
        shared = getattr(both.model.lm_head, end)
        assert shared is getattr(both.model.transformer.wte, end)
        torch.testing.assert_close(shared.grad, head + table)
    trained = [[p for p in s.model.parameters() if p.requires_grad] for s in (both, apart)]
    assert len(trained[0]) == len(trained[1]) - len(ends)


@pytest.mark.parametrize("end", ["head", "embedding"])
def test_one_adapter_serves_both_ends_whichever_is_asked_for(tied_dir, end):
    options = LoraOptions(r=4, **{"head": False, "embedding": False, end: True})
    supernet = load_trainable(open_checkpoint(tied_dir), options)
    model = supernet.model
    torch.nn.init.normal_(model.lm_head.lora_B)
    merged = TrainedTensors(supernet, open_checkpoint(tied_dir).state_dict())
    assert torch.equal(merged[HEAD], merged[TABLE])
    plain = GPT(open_checkpoint(tied_dir).config).eval()
    plain.load_state_dict(dict(merged))
    ids = torch.arange(12)[None]
    torch.testing.assert_close(plain(ids), model.eval()(ids), rtol=1e-4, atol=1e-4)


def test_the_memory_estimate_counts_it_once(tied_dir):
    config = open_checkpoint(tied_dir).config
    how = {"batch": 1, "tokens": 8, "precision": "32-true", "loss": LossOptions()}
    once, twice = (estimate_memory(c, None, **how) for c in (config, untied(config)))
    assert twice.weights - once.weights == 4 * config.padded_vocab_size * config.n_embd


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.slow
def test_the_tie_survives_every_command(tied_dir, tmp_path, text, how, capsys):
    chosen, trained, small, hf = (tmp_path / name for name in ("sorted", "trained", "small", "hf"))
    data = ["--data.files", text, "--data.block_size", 32]
    assert nas("importance", "--checkpoint_dir", tied_dir, "--out_dir", chosen, *data,
               "--layer_order", "block_importance") == 0, capsys.readouterr().err  # fmt: skip
    adapters = ["--lora.r", 4] if how == "lora" else ["--lora", "null"]
    assert nas("finetune", "--checkpoint_dir", chosen, "--out_dir", trained, *data, *adapters,
               "--data.valid_fraction", 0.2, *LEAST) == 0  # fmt: skip
    assert "it is the token table and stays so" in capsys.readouterr().out
    before, after = (load_supernet(path).model.state_dict()[HEAD] for path in (chosen, trained))
    assert not torch.equal(before, after)
    sizes = [x for name, value in SUB.to_dict().items() for x in (f"--subnetwork.{name}", value)]
    from_trained = ["export", "--checkpoint_dir", trained, *sizes]
    assert nas(*from_trained, "--out_dir", small) == 0
    assert nas(*from_trained, "--out_dir", hf, "--format", "hf", "--dtype", "bfloat16") == 0
    assert all(is_stored_once(path) for path in (chosen, trained, small))
    count = parameter_counter(open_checkpoint(tied_dir).config)(SUB)
    for path in (small, hf):
        assert json.loads((path / "config.json").read_text())["tie_word_embeddings"]
        assert f"{count:,} of the" in (path / "README.md").read_text()
    from safetensors.torch import load_file

    assert sum(t.numel() for t in load_file(hf / "model.safetensors").values()) == count


@pytest.mark.slow
def test_untying_is_said(tied_dir, tmp_path, text, capsys):
    out_dir, small = tmp_path / "apart", tmp_path / "small"
    data = ["--data.files", text, "--data.block_size", 32, "--data.valid_fraction", 0.2]
    command = ["finetune", "--checkpoint_dir", tied_dir, "--out_dir", out_dir, *data, *LEAST]
    assert nas(*command, "--untie_head", "true") == 0
    assert "untied from the token table" in capsys.readouterr().out
    assert not open_checkpoint(out_dir).tied
    assert nas("export", "--checkpoint_dir", out_dir, "--out_dir", small, "--format", "hf",
               "--extreme", "smallest") == 0  # fmt: skip
    assert not json.loads((small / "config.json").read_text())["tie_word_embeddings"]
    assert "trained apart" in (small / "README.md").read_text()
    again = ["finetune", "--checkpoint_dir", out_dir, "--out_dir", tmp_path / "no", *data]
    assert nas(*again, "--untie_head", "true") == 2
    assert "two tables already" in capsys.readouterr().err


def test_a_tied_model_of_its_own_heads_bias():
    """A bias belongs to the head alone."""
    config = tiny_config("phi-1_5")
    state = fill_random(GPT(config)).state_dict()
    state[HEAD] = state[TABLE]
    from whittle_nas.weights.tying import found_in

    assert axes.num_params(found_in(config, state)) == sum(
        tensor.numel() for name, tensor in state.items() if name != HEAD
    )
