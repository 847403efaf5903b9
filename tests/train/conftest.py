"""A tiny super-network with instruction-like batches."""

import litgpt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import uniform
from whittle_nas.train import lora
from whittle_nas.train.batches import IGNORE, Sample
from whittle_nas.train.options import LoraOptions
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.supernet import SuperNetwork

CONFIG = {
    "n_layer": 3, "n_embd": 24, "n_head": 4, "n_query_groups": 2, "intermediate_size": 40,
    "vocab_size": 31, "padded_vocab_size": 32, "block_size": 16, "bias": False, "head_size": 8,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "parallel_residual": False,
    "rotary_percentage": 1.0,
}  # fmt: skip
SMALL = uniform(12, 2, 2, 4, 17, 1, order=(1, 2, 0))
MIDDLE = uniform(20, 4, 2, 8, 33, 2, order=(1, 2, 0))


class Waits(TorchDispatchMode):
    """Counts what makes a program wait for its GPU: values and sizes that the host asks for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        masks = name == "aten::index" and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if masks or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::unique"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["lora", "full"])
def supernet(request) -> SuperNetwork:
    """Layer 1 counts most; adapters are far from zero."""
    torch.manual_seed(0)
    config = litgpt.Config(**CONFIG)
    if request.param == "lora":
        model = lora.GPT(lora.lora_config(config, LoraOptions(r=4, dropout=0.0)))
        lora.freeze_base(model)
    else:
        model = litgpt.GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.2)
    return SuperNetwork(model, SupernetInfo(layer_order=(1, 2, 0)))


@pytest.fixture
def batch() -> Sample:
    """Rows of different length with masked prompts and padding."""
    torch.manual_seed(1)
    ids = torch.randint(31, (3, 11))
    labels = torch.randint(31, (3, 11))
    labels[0, :4] = labels[1, :7] = IGNORE
    labels[2, 6:] = IGNORE
    return Sample(ids, labels)
