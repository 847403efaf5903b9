"""Sums of |w| against litgpt's own module names, family by family."""

import pytest
import torch
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.importance.magnitude import by_magnitude
from whittle_nas.importance.options import Basis, Criterion
from whittle_nas.importance.pipeline import MeasureOptions, measure
from whittle_nas.importance.statistics import collect

# grouped queries with a gate; biases and partial rotary embeddings; q/k norms without pre-norms
KINDS = ("Llama-3.1-8B", "pythia-160m", "OLMo-2-1124-7B")


def scored(family):
    model = fill_random(GPT(tiny_config(family, n_layer=2))).eval()
    tokens = torch.randint(0, model.config.padded_vocab_size, (2, 6))
    measured = collect(model, tokens)
    return model, measured, by_magnitude(measured, model)


@pytest.mark.parametrize("family", KINDS)
def test_an_entry_scores_all_weights_that_touch_it(family):
    model, measured, found = scored(family)
    config = model.config
    groups, size = config.n_query_groups, config.head_size
    for layer, block in enumerate(model.transformer.h):
        mlp = block.mlp
        linears = [mlp.fc_1, mlp.fc_2] if hasattr(mlp, "fc_1") else [mlp.fc]
        neurons = mlp.proj.weight.abs().sum(0) + sum(m.weight.abs().sum(1) for m in linears)
        neurons = neurons + sum(m.bias.abs() for m in linears if m.bias is not None)
        torch.testing.assert_close(found.neurons[layer], neurons)
        # one head: its query rows, its columns of the output projection, and what norms it has
        rows = block.attn.qkv.weight.abs().sum(1)
        if block.attn.qkv.bias is not None:
            rows = rows + block.attn.qkv.bias.abs()
        query, key, value = rows.split([config.n_head * size, groups * size, groups * size])
        if config.norm_qk:
            query = query + block.attn.norm_q.weight.abs()
            key = key + block.attn.norm_k.weight.abs()
        columns = block.attn.proj.weight.abs().sum(0)
        heads = (query + columns).view(groups, -1, size).sum(-1)
        torch.testing.assert_close(found.heads[layer], heads)
        own = (key + value).view(groups, size).sum(-1)
        torch.testing.assert_close(found.groups[layer], heads.sum(-1) + own)
        channels = columns.view(groups, -1, size).sum(1) + value.view(groups, size)
        torch.testing.assert_close(found.value_channels[layer], channels)
        free = query.view(groups, -1, size).sum(1) + key.view(groups, size)
        torch.testing.assert_close(found.qk_channels[layer], free[:, config.rope_n_elem :])
    assert found.block_importance.equal(measured.block_importance)


@pytest.mark.parametrize("family", KINDS)
def test_every_weight_with_a_channel_counts_for_that_channel(family):
    model, _, found = scored(family)
    without = [name for name, p in model.named_parameters() if model.config.n_embd not in p.shape]
    total = sum(p.abs().sum() for name, p in model.named_parameters() if name not in without)
    # neurons' and qkv biases have no channel; no other size of the tiny models equals n_embd
    torch.testing.assert_close(found.embd.sum(), total.detach())


def test_the_option_ranks_by_magnitude():
    model, _, found = scored("Llama-3.1-8B")
    tokens = torch.randint(0, model.config.padded_vocab_size, (2, 7))
    measured = measure(model, tokens, MeasureOptions(criterion=Criterion.magnitude))
    assert measured.bases.embd == found.embd.argsort(descending=True, stable=True).tolist()
    plain = measure(model, tokens, MeasureOptions(basis=Basis.permutation))
    assert plain.bases.embd != measured.bases.embd
