"""What litgpt's LoRA lacks: adapters for the token embedding, and a merge that covers them.

V vocabulary, D n_embd, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import litgpt.lora
import torch
import torch.nn.functional as F
from litgpt.config import Config as BaseConfig
from torch import Tensor, nn

from whittle_nas.train.options import LoraOptions


@dataclass
class Config(litgpt.lora.Config):
    """litgpt's LoRA configuration with one more switch."""

    lora_embedding: bool = False


class LoRAEmbedding(nn.Embedding):
    """Token embedding with a frozen table (V, D) and the update `(B A)^T * alpha / r`.

    `weight` keeps its name, so that an ordinary checkpoint loads. There is no dropout: its input
    is token ids. A starts at zero and B at random, so that a step that only meets a few tokens
    moves the rows of these tokens first.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, r: int, alpha: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.scaling = alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, num_embeddings))
        self.lora_B = nn.Parameter(torch.empty(embedding_dim, r))
        reset_adapter(self)

    def forward(self, input: Tensor) -> Tensor:
        """Embed token ids (B, T) -> (B, T, D)."""
        low_rank = F.embedding(input, self.lora_A.T)  # (B, T, r)
        return super().forward(input) + self.scaling * F.linear(low_rank, self.lora_B)

    def delta(self) -> Tensor:
        """What the adapter adds to the table, (V, D)."""
        return self.scaling * (self.lora_B @ self.lora_A).T


class GPT(litgpt.lora.GPT):
    """`litgpt.lora.GPT`, with an adapted embedding where the configuration asks for it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.lora_embedding:
            assert config.padded_vocab_size is not None
            self.transformer.wte = LoRAEmbedding(
                config.padded_vocab_size, config.n_embd, config.lora_r, config.lora_alpha
            )


def reset_adapter(module: nn.Module) -> None:
    """Draw an adapter anew; what it adds is zero."""
    if isinstance(module, LoRAEmbedding):
        nn.init.zeros_(module.lora_A)
        nn.init.kaiming_uniform_(module.lora_B, a=math.sqrt(5))
    elif isinstance(module, litgpt.lora.LoRALinear):
        module.reset_parameters()


def lora_config(config: BaseConfig, options: LoraOptions) -> Config:
    """The configuration of the adapted model: `config` with the adapters of `options`.

    Raises:
        ConfigError: if a number of the options is out of range.
    """
    options.check()
    base = {field.name: getattr(config, field.name) for field in fields(BaseConfig)}
    return Config(
        **base,
        lora_r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        lora_query=options.query,
        lora_key=options.key,
        lora_value=options.value,
        lora_projection=options.projection,
        lora_mlp=options.mlp,
        lora_head=options.head,
        lora_embedding=options.embedding,
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted model belongs to an adapter."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


def freeze_base(model: nn.Module) -> None:
    """Train the adapters only."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_adapter(name)


@torch.no_grad()
def merged_state_dict(model: litgpt.lora.GPT) -> dict[str, Tensor]:
    """State dict of the plain `litgpt.GPT` that computes the same as the adapted model.

    Only weights that have an adapter are new tensors; the model itself is left as it is.
    """
    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRAEmbedding):
            deltas[f"{name}.weight"] = module.delta()
        elif isinstance(module, litgpt.lora.LoRALinear) and hasattr(module, "lora_A"):
            deltas[f"{name}.linear.weight"] = module.get_lora_AB()
    merged = {}
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            continue
        if name in deltas:
            tensor = (tensor.float() + deltas[name].float()).to(tensor.dtype)
        merged[name.replace(".linear.", ".")] = tensor
    return merged


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
