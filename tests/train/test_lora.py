"""The adapted embedding, and merging: the plain model computes what the adapted one computed."""

from dataclasses import replace

import litgpt
import pytest
import torch

from tests.conftest import fill_random, uniform
from whittle_nas.metrics.measured import peak_memory_bytes
from whittle_nas.train import lora
from whittle_nas.train.options import LoraOptions
from whittle_nas.weights.checkpoint import save_tensors
from whittle_nas.weights.supernet import SuperNetwork

CONFIG = {
    "n_layer": 2, "n_embd": 24, "n_head": 4, "n_query_groups": 2, "intermediate_size": 40,
    "vocab_size": 31, "padded_vocab_size": 32, "block_size": 16, "bias": False, "head_size": 6,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "parallel_residual": False,
    "rotary_percentage": 1.0,
}  # fmt: skip
FULL, MIDDLE = uniform(24, 4, 2, 6, 40, 2, of=2), uniform(20, 2, 2, 6, 33, 1, of=2)


def adapted_gpt(options: LoraOptions) -> lora.GPT:
    model = lora.GPT(lora.lora_config(litgpt.Config(**CONFIG), options))
    model.apply(model._init_weights)
    for name, parameter in model.named_parameters():
        if lora.is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_embedding_is_the_sum_of_table_and_update():
    layer = lora.LoRAEmbedding(11, 5, r=3, alpha=6)
    torch.nn.init.normal_(layer.lora_B)
    idx = torch.randint(11, (2, 7))
    table = layer.weight + 2.0 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(idx), table[idx])


def test_fresh_adapters_change_nothing():
    options = LoraOptions(r=4)
    model = lora.GPT(lora.lora_config(litgpt.Config(**CONFIG), options)).eval()
    plain = litgpt.GPT(litgpt.Config(**CONFIG)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    idx = torch.randint(31, (2, 9))
    torch.testing.assert_close(model(idx), plain(idx))


@pytest.mark.parametrize(
    "options",
    [
        LoraOptions(r=4),
        LoraOptions(r=4, key=False, head=False),
        LoraOptions(r=4, embedding=False, mlp=False, projection=False),
    ],
)
def test_merged_model_computes_the_same(options):
    model = adapted_gpt(options)
    plain = litgpt.GPT(litgpt.Config(**CONFIG)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain.load_state_dict(lora.MergedTensors(model), strict=True)
    idx = torch.randint(31, (2, 9))
    torch.testing.assert_close(plain(idx), model(idx), atol=1e-5, rtol=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_merging_holds_one_tensor(tmp_path, monkeypatch):
    """And a few rows of its update, which would be a second and a third copy of it."""
    monkeypatch.setattr(lora, "_ROWS", 64)
    config = litgpt.Config(**{**CONFIG, "padded_vocab_size": 4096})
    model = lora.GPT(lora.lora_config(config, LoraOptions(r=4)))
    largest = max(parameter.nbytes for parameter in model.parameters())

    def write():
        save_tensors(tmp_path / "merged.pth", lora.MergedTensors(model))

    assert peak_memory_bytes(write, torch.device("cpu")) < 1.5 * largest


def test_only_adapters_are_trained():
    model = adapted_gpt(LoraOptions(r=4))
    lora.freeze_base(model)
    model(torch.randint(31, (2, 9))).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(lora.adapter_state_dict(model))
    assert {"transformer.wte.lora_A", "transformer.wte.lora_B"} <= with_gradient


@pytest.mark.parametrize(
    "options",
    [LoraOptions(r=4), LoraOptions(r=4, key=False), LoraOptions(r=4, query=False, value=False)],
    ids=["all", "no_key", "key_alone"],
)
@pytest.mark.parametrize("sub", [FULL, MIDDLE], ids=str)
def test_a_smaller_rank_is_the_first_rows_and_columns(options, sub):
    """By hand: beyond the rank the other columns of every B are zero, in a model of full rank."""
    supernet = SuperNetwork(adapted_gpt(options))
    alone = supernet.standalone(sub)
    alone.load_state_dict({n: t.clone() for n, t in alone.state_dict().items()}, assign=True)
    for name, parameter in alone.named_parameters():
        if name.endswith("lora_B"):
            parameter.data[:, 3:] = 0.0
    idx = torch.randint(31, (2, 9))
    face = supernet.at_rank(3)
    torch.testing.assert_close(face.subnet(sub)(idx), alone(idx), atol=1e-5, rtol=1e-5)
    assert face.subnet(sub).transformer.h[0].attn.qkv.lora_A.shape[0] % 3 == 0
    plain = litgpt.GPT(litgpt.Config(**CONFIG)).eval()
    if sub == FULL:
        plain.load_state_dict(lora.MergedTensors(face.standalone(sub)), strict=True)
        torch.testing.assert_close(plain(idx), alone(idx), atol=1e-5, rtol=1e-5)
    assert supernet.at_rank(None) is supernet.at_rank(4) is supernet


def sparse_state(sparse: str) -> dict[str, torch.Tensor]:
    state = litgpt.GPT(litgpt.Config(**CONFIG)).state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 2 and sparse in name:
            tensor[torch.rand_like(tensor) < 0.5] = 0.0
    return state


@pytest.mark.parametrize("options", [LoraOptions(r=4), LoraOptions(r=4, key=False)], ids=str)
@pytest.mark.parametrize("sparse", ["", "mlp", "transformer.h.1.attn"], ids=repr)
def test_merged_zeros_are_those_of_the_sparse_weights(options, sparse):
    """W + M * (scale B A) by hand, where litgpt's own layer adds scale B A."""
    state = sparse_state(sparse)
    options = replace(options, dropout=0.0)
    config = litgpt.Config(**CONFIG)
    model, dense = (
        fill_random(lora.GPT(lora.lora_config(config, options, sparse=names)), seed=2)
        for names in (lora.sparse_modules(state), frozenset())
    )
    for one in (model, dense):
        one.load_state_dict(state, strict=False)
    merged, filled = lora.MergedTensors(model), lora.MergedTensors(dense)
    assert any(bool((filled[name] != tensor).any()) for name, tensor in state.items())
    for name, tensor in state.items():
        expected = tensor + (filled[name] - tensor) * (tensor != 0)
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=1e-5)
        if tensor.ndim == 2:
            assert torch.equal(merged[name] == 0, tensor == 0), name
    plain = litgpt.GPT(config)
    plain.load_state_dict({name: merged[name] for name in merged})
    idx = torch.randint(31, (2, 9))
    torch.testing.assert_close(model(idx), plain(idx), atol=1e-3, rtol=1e-3)
    supernet, extracted = SuperNetwork(model.eval()), SuperNetwork(plain.eval())
    found = supernet.subnet(MIDDLE)(idx)
    torch.testing.assert_close(found, extracted.subnet(MIDDLE)(idx), atol=1e-3, rtol=1e-3)


def test_gradients_of_kept_zeros_are_those_of_the_masked_weight():
    """Against plain tensors: the gradient of W + M * (scale B A) times x, for query and value."""
    layer = litgpt.lora.LoRAQKVLinear(
        6, 16, head_size=4, n_head=2, n_query_groups=1, r=2, lora_alpha=3,
        enable_lora=(True, False, True), bias=False,
    )  # fmt: skip
    fill_random(layer)
    layer.linear.weight.data[torch.rand(16, 6) < 0.5] = 0.0
    layer.__class__ = lora.SparseQKV
    x, upstream = torch.randn(5, 6), torch.randn(5, 16)
    layer(x).backward(upstream)
    weight = layer.linear.weight.detach()
    a, b = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    update = torch.cat([b[:8] @ a[:2], torch.zeros(4, 6), b[8:] @ a[2:]]) * 1.5
    (x @ (weight + (weight != 0) * update).T).backward(upstream)
    torch.testing.assert_close(layer.lora_A.grad, a.grad)
    torch.testing.assert_close(layer.lora_B.grad, b.grad)


def test_dense_weights_are_litgpts_own_layers():
    state = sparse_state("nothing")
    assert lora.sparse_modules(state) == frozenset()
    state["transformer.h.1.mlp.fc_1.weight"][3, 2] = 0.0
    assert lora.sparse_modules(state) == {"mlp.fc_1"}
    config = lora.lora_config(
        litgpt.Config(**CONFIG), LoraOptions(), sparse=frozenset({"mlp.fc_1"})
    )
    kinds = {name: type(module) for name, module in lora.GPT(config).named_modules()}
    assert kinds["transformer.h.0.mlp.fc_1"] is lora.SparseLinear
    assert kinds["transformer.h.0.mlp.fc_2"] is litgpt.lora.LoRALinear
    assert kinds["transformer.h.0.attn.qkv"] is litgpt.lora.LoRAQKVLinear
