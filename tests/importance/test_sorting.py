"""Sorting changes the order of weights and nothing else; orders compose; files repeat."""

from dataclasses import replace

import pytest
import torch
from litgpt import GPT

from tests.conftest import FAMILIES, fill_random, tiny_config
from whittle_nas.errors import ConfigError
from whittle_nas.importance.options import Scope
from whittle_nas.importance.scores import Scores, rank
from whittle_nas.importance.sorting import (
    SortedFrom,
    SortedTensors,
    original_scores,
    read_importance,
    write_importance,
)
from whittle_nas.importance.statistics import collect
from whittle_nas.weights.bases import compose, transform
from whittle_nas.weights.checkpoint import save_tensors


def random_scores(config, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    layers, groups, size = config.n_layer, config.n_query_groups, config.head_size

    def draw(*shape):
        return torch.rand(shape, generator=generator)

    return Scores(
        embd=draw(config.n_embd),
        neurons=draw(layers, config.intermediate_size),
        groups=draw(layers, groups),
        heads=draw(layers, groups, config.n_head // groups),
        value_channels=draw(layers, groups, size),
        qk_channels=draw(layers, groups, size - config.rope_n_elem),
        block_importance=draw(layers),
    )


def sorted_model(model: GPT, orders) -> GPT:
    """A second model with the first one's weights in their new order."""
    other = GPT(model.config)
    tensors = dict(SortedTensors(model.state_dict, orders, model.config))
    other.load_state_dict(tensors, strict=True)
    return other.to(model.lm_head.weight.dtype).eval()


@pytest.mark.parametrize("scope", list(Scope), ids=lambda s: s.value)
def test_logits_stay_the_same(tiny_gpt, scope):
    config = tiny_gpt.config
    orders = rank(random_scores(config), config, scope=scope)
    ids = torch.randint(0, config.padded_vocab_size, (2, 20))
    with torch.no_grad():
        before, after = tiny_gpt(ids), sorted_model(tiny_gpt, orders)(ids)
    assert not torch.equal(tiny_gpt.transformer.wte.weight, permute_wte(tiny_gpt, orders))
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()


def unsorted(config):
    """The order in which everything stands already."""
    zeros = {name: torch.zeros_like(t) for name, t in random_scores(config).to_dict().items()}
    return rank(Scores(**zeros), config)


def permute_wte(model, orders):
    return transform("transformer.wte.weight", model.state_dict(), orders, model.config)


def test_bfloat16_weights_are_only_reordered(tiny_gpt):
    model = tiny_gpt.to(torch.bfloat16)
    moved = SortedTensors(
        model.state_dict, rank(random_scores(model.config), model.config), model.config
    )
    for name, tensor in model.state_dict().items():
        assert moved[name].dtype is torch.bfloat16
        assert torch.equal(
            moved[name].flatten().float().sort().values, tensor.flatten().float().sort().values
        )


def test_entries_stand_in_falling_importance(tiny_gpt):
    """Measured again, a sorted model has falling scores, and equal ones to what they were."""
    config = tiny_gpt.config
    tokens = torch.randint(0, config.padded_vocab_size, (4, 16))
    first = collect(tiny_gpt, tokens)
    orders = rank(first, config)
    again = collect(sorted_model(tiny_gpt, orders), tokens)
    for name in ("embd", "neurons", "groups", "heads", "value_channels"):
        steps = getattr(again, name).diff(dim=-1)
        assert (steps <= 1e-4 * getattr(again, name).abs().max()).all(), name
    for name, value in original_scores(again, orders, unsorted(config), config).to_dict().items():
        torch.testing.assert_close(value, getattr(first, name), rtol=1e-3, atol=1e-4, msg=name)


def test_global_scope_gives_all_layers_one_order():
    config = tiny_config("Llama-3.1-8B")
    orders = rank(random_scores(config), config, scope=Scope["global"])
    assert orders.layers[0] == orders.layers[1] == orders.layers[2]
    assert rank(random_scores(config), config).layers[0] != orders.layers[0]


def test_orders_compose(family):
    config = tiny_config(family)
    first, then = (rank(random_scores(config, seed), config) for seed in (1, 2))
    model = fill_random(GPT(config))
    twice = SortedTensors(lambda: SortedTensors(model.state_dict, first, config), then, config)
    once = SortedTensors(model.state_dict, compose(first, then), config)
    for name in model.state_dict():
        assert torch.equal(twice[name], once[name]), name


@pytest.mark.parametrize("kind", ["Llama-3.1-8B", "pythia-160m"])
def test_scores_of_a_sorted_model_go_back_to_the_original_ids(kind):
    config = tiny_config(kind)
    original, second = random_scores(config, 1), rank(random_scores(config, 2), config)
    then = rank(original_as_sorted(original, second, config), config)
    assert as_lists(compose(second, then)) == as_lists(rank(original, config))


def original_as_sorted(scores: Scores, orders, config) -> Scores:
    """Scores by the ids of a model sorted by `orders`, found by looking every entry up."""
    ids = Scores(
        embd=torch.arange(config.n_embd),
        **{
            name: torch.arange(getattr(scores, name)[0].numel())
            .view(getattr(scores, name)[0].shape)
            .expand_as(getattr(scores, name))
            .clone()
            for name in ("neurons", "groups", "heads", "value_channels", "qk_channels")
        },
        block_importance=scores.block_importance,
    )
    where = original_scores(ids, orders, unsorted(config), config)  # original id -> sorted id
    found = {name: t.clone() for name, t in scores.to_dict().items()}
    found["embd"][where.embd] = scores.embd
    for name in ("neurons", "groups", "heads", "value_channels", "qk_channels"):
        for layer in range(config.n_layer):
            to, value = getattr(where, name)[layer].flatten(), getattr(scores, name)[layer]
            found[name][layer] = (
                torch.empty_like(value).flatten().scatter(0, to, value.flatten()).view(value.shape)
            )
    return Scores(**found)


def as_lists(orders):
    names = ("neurons", "groups", "heads", "qk_channels", "value_channels")
    plain = [[[*map(str, getattr(layer, n))] for n in names] for layer in orders.layers]
    return [*map(str, orders.embd)], plain


def test_a_tied_table_is_stored_once(tmp_path):
    config = tiny_config("Llama-3.2-1B")
    tensors = fill_random(GPT(config)).state_dict()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    orders = rank(random_scores(config), config)
    save_tensors(tmp_path / "tied.pth", SortedTensors(lambda: tensors, orders, config))
    found = torch.load(tmp_path / "tied.pth", mmap=True, weights_only=True)
    assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()
    assert torch.equal(found["lm_head.weight"], permute_wte_of(tensors, orders, config))


def permute_wte_of(tensors, orders, config):
    return transform("lm_head.weight", tensors, orders, config)


def content(config) -> SortedFrom:
    scores = random_scores(config)
    losses = (float("nan"),) * config.n_layer
    settings = {"b": 1, "a": ["x"], "c": {"e": 2, "d": None}}
    return SortedFrom(scores, rank(scores, config), (2, 0, 1), losses, settings)


@pytest.mark.parametrize("kind", ["Llama-3.1-8B", "pythia-160m"])
def test_the_file_reads_back_and_repeats(tmp_path, kind):
    config = tiny_config(kind)
    found = content(config)
    write_importance(tmp_path / "a.safetensors", found)
    write_importance(tmp_path / "b.safetensors", found)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = read_importance(tmp_path / "a.safetensors")
    assert as_lists(again.bases) == as_lists(found.bases)
    assert (again.layer_order, again.settings) == (found.layer_order, found.settings)
    for name, value in found.scores.to_dict().items():
        assert torch.equal(getattr(again.scores, name), value)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "importance.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"importance\.safetensors is not a valid"):
        read_importance(path)


def test_equal_scores_keep_their_order():
    config = tiny_config("Llama-3.1-8B")
    flat = {name: torch.ones_like(t) for name, t in random_scores(config).to_dict().items()}
    orders = rank(replace(Scores(**flat)), config)
    assert list(orders.embd) == list(range(config.n_embd))
    assert list(orders.layers[1].neurons) == list(range(config.intermediate_size))


def test_every_family_is_covered():
    assert len(FAMILIES) >= 14
