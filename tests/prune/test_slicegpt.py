"""SliceGPT: exact before slicing, and after it the whole model on projected streams."""

import copy

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.calibration import Stream
from whittle_nas.errors import ConfigError
from whittle_nas.importance.sorting import SortedTensors
from whittle_nas.prune.slicegpt import (
    check_slices,
    global_basis,
    narrow_sizes,
    sliced_tensors,
    slicegpt,
)
from whittle_nas.prune.store import BlockStore
from whittle_nas.weights.shortcuts import ShortcutGPT

FAMILIES = ["Llama-2-7b-hf", "Llama-3.1-8B", "Qwen2.5-0.5B", "Gemma-2b"]  # MHA, GQA, biases, MQA
TOKENS = torch.randint(0, 96, (6, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES)
def model(request):
    return fill_random(GPT(tiny_config(request.param))).eval().requires_grad_(False)


def sliced(model, tmp_path, n_embd):
    store = BlockStore(tmp_path / "out", {"n_embd": n_embd})
    return slicegpt(model, Stream(model, TOKENS, batch_size=2), store, n_embd=n_embd)


def load(kind, config, tensors):
    dtype = tensors["lm_head.weight"].dtype
    found = kind(config).to(dtype).eval().requires_grad_(False)
    found.load_state_dict(tensors)
    return found


def projector(x, width):
    """Onto the principal directions of unit tokens, by a singular value decomposition."""
    unit = F.normalize(x.flatten(0, 1).double(), dim=-1)
    directions = torch.linalg.svd(unit, full_matrices=False).Vh[:width]
    return directions.T @ directions


def on_projected_streams(model, width):
    """The whole model, whose stream loses everything but `width` directions after every part."""
    x = model.transformer.wte(TOKENS)
    if model.config.scale_embeddings:
        x = x * model.config.n_embd**0.5
    x = x @ projector(x, width)
    for block in model.transformer.h:
        x = x + block.attn(block.norm_1(x), model.cos[None, :20], model.sin[None, :20])
        x = x @ projector(x, width)
        x = x + block.mlp(block.norm_2(x))
        x = x @ projector(x, width)
    return model.lm_head(model.transformer.ln_f(x))


def test_without_slicing_the_model_stays_what_it_was(model, tmp_path):
    config, tensors = sliced(model, tmp_path, 48)
    found = load(ShortcutGPT, config, tensors)
    torch.testing.assert_close(found(TOKENS), model(TOKENS), atol=1e-4, rtol=1e-4)
    bases = global_basis(model, TOKENS)
    turned = SortedTensors(model.state_dict, bases, model.config)
    found = load(GPT, model.config, sliced_tensors(turned, model.config, 48))
    torch.testing.assert_close(found(TOKENS), model(TOKENS), atol=1e-4, rtol=1e-4)


def test_slices_are_projections_of_the_stream(model, tmp_path):
    model = model.double()
    config, tensors = sliced(model, tmp_path, 32)
    found = load(ShortcutGPT, config, tensors)(TOKENS)
    torch.testing.assert_close(found, on_projected_streams(model, 32), atol=1e-3, rtol=1e-3)
    # an interrupted run goes on with the blocks that it had
    again = BlockStore(tmp_path / "out", {"n_embd": 32})
    (again.path / "2.pth").unlink()
    _, resumed = slicegpt(model, Stream(model, TOKENS, batch_size=2), again, n_embd=32)
    for name, tensor in resumed.items():
        torch.testing.assert_close(tensor, tensors[name], atol=1e-4, rtol=1e-4)


def test_one_basis_is_a_projection_everywhere(model):
    bases = global_basis(model, TOKENS)
    turned = SortedTensors(model.state_dict, bases, model.config)
    narrow = tiny_config(model.config.name, **narrow_sizes(model.config, 32))
    narrow.attention_scores_scalar = model.config.attention_scores_scalar
    found = load(GPT, narrow, sliced_tensors(turned, model.config, 32))(TOKENS)
    keep = bases.embd[:32].T @ bases.embd[:32]
    twin = copy.deepcopy(model)
    twin.transformer.wte.weight.copy_(twin.transformer.wte.weight @ keep)
    for block in twin.transformer.h:
        for linear in (block.attn.proj, block.mlp.proj):
            linear.weight.copy_(keep @ linear.weight)
            if linear.bias is not None:
                linear.bias.copy_(keep @ linear.bias)
    torch.testing.assert_close(found, twin(TOKENS), atol=1e-3, rtol=1e-3)


def test_models_and_shares_that_can_not_be_sliced_are_refused():
    assert check_slices(tiny_config("Llama-3.1-8B"), 0.3) == 32
    for family in ("pythia-160m", "Gemma-2-2b", "falcon-7b"):
        with pytest.raises(ConfigError, match="can't be sliced"):
            check_slices(tiny_config(family), 0.3)
    with pytest.raises(ConfigError, match="keeps 48"):
        check_slices(tiny_config("Llama-3.1-8B"), 0.05)
