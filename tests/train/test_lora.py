"""The adapted embedding, and merging: the plain model computes what the adapted one computed."""

import litgpt
import pytest
import torch

from whittle_nas.train import lora
from whittle_nas.train.options import LoraOptions

CONFIG = {
    "n_layer": 2, "n_embd": 24, "n_head": 4, "n_query_groups": 2, "intermediate_size": 40,
    "vocab_size": 31, "padded_vocab_size": 32, "block_size": 16, "bias": False, "head_size": 6,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "parallel_residual": False,
    "rotary_percentage": 1.0,
}  # fmt: skip


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


def test_only_adapters_are_trained():
    model = adapted_gpt(LoraOptions(r=4))
    lora.freeze_base(model)
    model(torch.randint(31, (2, 9))).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(lora.adapter_state_dict(model))
    assert {"transformer.wte.lora_A", "transformer.wte.lora_B"} <= with_gradient
