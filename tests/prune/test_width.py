"""Methods that take heads and neurons out, against their formulas written out by loops."""

import copy

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.calibration import Stream
from whittle_nas.errors import ConfigError
from whittle_nas.prune.flap import flap
from whittle_nas.prune.llm_pruner import llm_pruner
from whittle_nas.prune.minitron import narrower
from whittle_nas.prune.structure import NarrowedTensors, Structure, narrowed_config
from whittle_nas.weights import axes

FAMILIES = ["Llama-2-7b-hf", "Llama-3.1-8B", "phi-2"]  # MHA, GQA, biases
TOKENS = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES)
def model(request):
    return fill_random(GPT(tiny_config(request.param))).eval()


def head_sets(config):
    """Rows of qkv and columns of proj of every query group, one index at a time."""
    h, g, k = config.n_head, config.n_query_groups, config.head_size
    for group in range(g):
        columns = [head * k + c for head in range(h) if head // (h // g) == group for c in range(k)]
        key = [h * k + group * k + c for c in range(k)]
        yield columns + key + [row + g * k for row in key], columns


def silenced(model, structure, biases=None):
    """The model with what goes set to zero, and biases added."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer, block in enumerate(twin.transformer.h):
            for group, (_, columns) in enumerate(head_sets(model.config)):
                if group not in structure.groups[layer]:
                    block.attn.proj.weight[:, columns] = 0
            gone = sorted(set(range(model.config.intermediate_size)) - {*structure.neurons[layer]})
            block.mlp.proj.weight[:, gone] = 0
            for name, bias in (biases[layer] if biases else {}).items():
                linear = block.get_submodule(name)
                if linear.bias is None:
                    linear.bias = torch.nn.Parameter(torch.zeros_like(bias))
                linear.bias += bias
    return twin


def test_a_structure_is_cut_as_if_the_rest_were_silent(model):
    config = model.config
    structure = Structure(((0, 2), (1,), (3, 1)), ((0, 5, 9), (2, 3), (7,)))
    narrow = narrowed_config(structure, config)
    assert (narrow.n_query_groups, narrow.intermediate_size) == (2, 3)
    small = GPT(narrow).eval()
    small.load_state_dict(NarrowedTensors(structure, model.state_dict(), config))
    with torch.no_grad():
        torch.testing.assert_close(
            small(TOKENS), silenced(model, structure)(TOKENS), atol=1e-4, rtol=1e-4
        )


def test_llm_pruner_scores_coupled_weights_by_first_order_taylor(model):
    config, twin = model.config, copy.deepcopy(model)
    logits = twin(TOKENS[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    found = llm_pruner(model, TOKENS, share=0.5, first=1, last=0)
    assert found.groups[0] == (0, 1, 2, 3)
    assert found.neurons[0] == tuple(range(config.intermediate_size))
    for layer in (1, 2):
        block = twin.transformer.h[layer]
        weights = dict(block.named_parameters())
        products = {name: (p * p.grad).detach() for name, p in weights.items()}
        scores = []
        for rows, columns in head_sets(config):
            score = products["attn.qkv.weight"][rows].sum()
            score += products["attn.proj.weight"][:, columns].sum()
            if "attn.qkv.bias" in products:
                score += products["attn.qkv.bias"][rows].sum()
            scores.append(abs(score.item()))
        best = sorted(range(4), key=lambda group: -scores[group])[:2]
        assert found.groups[layer] == tuple(sorted(best))
        scores = []
        for neuron in range(config.intermediate_size):
            score = products["mlp.proj.weight"][:, neuron].sum()
            score += sum(p[neuron].sum() for name, p in products.items() if "mlp.fc" in name)
            scores.append(abs(score.item()))
        half = config.intermediate_size // 2
        best = sorted(range(2 * half), key=lambda neuron: -scores[neuron])[:half]
        assert found.neurons[layer] == tuple(sorted(best))
    with pytest.raises(ConfigError, match="leave none of the 3 layers"):
        llm_pruner(model, TOKENS, share=0.5)


def inputs(model):
    """What enters the output projections of every layer, by their names, as rows."""
    twin, seen = copy.deepcopy(model), {}
    for name, module in twin.named_modules():
        if name.endswith((".attn.proj", ".mlp.proj")):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    with torch.no_grad():
        twin(TOKENS)
    return {name: x.flatten(0, 1).double() for name, x in seen.items()}


def fluctuations(model, seen):
    """(score, cost, layer, kind, unit) of every group and neuron."""
    units = []
    for layer, block in enumerate(model.transformer.h):
        for kind, linear in (("attn", block.attn.proj), ("mlp", block.mlp.proj)):
            x = seen[f"transformer.h.{layer}.{kind}.proj"]
            score = ((x - x.mean(0)) ** 2).mean(0) * (linear.weight.double() ** 2).sum(0)
            score = (score - score.mean()) / score.std()
            if kind == "mlp":
                cost = 3 if hasattr(block.mlp, "fc_1") else 2
                units += [(s, cost, layer, kind, j) for j, s in enumerate(score.tolist())]
                continue
            for group, (rows, columns) in enumerate(head_sets(model.config)):
                mean = score[columns].mean().item()
                units.append((mean, len(rows) + len(columns), layer, kind, group))
    return units


def test_flap_keeps_what_fluctuates_and_the_mean_of_the_rest(model):
    seen = inputs(model)
    found = flap(model, Stream(model, TOKENS, batch_size=2), share=0.4)
    units = fluctuations(model, seen)
    units.sort(reverse=True)
    kept, target = set(), 0.6 * sum(unit[1] for unit in units)
    for count in range(len(units)):  # as many of the best as come nearest to the target
        spent = [sum(unit[1] for unit in units[: count + more]) for more in (0, 1)]
        if abs(spent[1] - target) > abs(spent[0] - target):
            break
        kept.add(units[count][2:])
    for layer in range(3):
        for kind, ids in (("attn", found.structure.groups), ("mlp", found.structure.neurons)):
            expected = {unit for at, k, unit in kept if (at, k) == (layer, kind)}
            best = max(u for u in units if u[2:4] == (layer, kind))[-1]
            assert set(ids[layer]) == expected | {best}
    # with the biases the mean output on the text is that of the whole layer
    small = silenced(model, found.structure, found.biases)
    block, whole = small.transformer.h[0], model.transformer.h[0]
    for kind in ("attn", "mlp"):
        x = seen[f"transformer.h.0.{kind}.proj"].float()
        with torch.no_grad():
            narrow, full = block.get_submodule(f"{kind}.proj"), whole.get_submodule(f"{kind}.proj")
            torch.testing.assert_close(narrow(x).mean(0), full(x).mean(0), atol=1e-4, rtol=1e-4)


def test_minitrons_shape_has_the_parameters_that_are_asked_for(model):
    config = model.config
    for share in (0.2, 0.4):
        sizes = narrower(config, share)
        changed = {name: sizes[name] for name in ("n_embd", "intermediate_size")}
        count = axes.num_params(tiny_config(config.name, **changed))
        assert count <= (1 - share) * axes.num_params(config)
        assert sizes["n_head"] == config.n_head
