"""What litgpt's LoRA lacks: adapters for the token embedding and for weights whose zeros stay
(Shears), and a merge that covers them.

V vocabulary, D n_embd, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import litgpt.lora
import torch
import torch.nn.functional as F
from litgpt.config import Config as BaseConfig
from torch import Tensor, nn

from whittle_nas.space.subnetwork import Block
from whittle_nas.train.options import LoraOptions
from whittle_nas.weights.axes import is_tied, split_layer
from whittle_nas.weights.pages import release
from whittle_nas.weights.sharding import nothing

_ROWS = 4096  # of a weight that are merged at a time: their update is a second and third copy


@dataclass
class Config(litgpt.lora.Config):
    """litgpt's LoRA configuration with one more switch, and what ours says more."""

    lora_embedding: bool = False
    lora_sparse: frozenset[str] = frozenset()  # modules, by their names in a block or the model
    tie_word_embeddings: bool = False
    blocks: tuple[Block, ...] | None = None


class LoRAEmbedding(nn.Embedding):
    """Token embedding with a frozen table (V, D) and the update `B A * alpha / r`.

    A (r, D) and B (V, r) are those of a head of this table, so that a tied head can share them.
    `weight` keeps its name, so that an ordinary checkpoint loads. There is no dropout: its input
    is token ids. B starts at zero and A at random, so that a step that only meets a few tokens
    moves the rows of these tokens first.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, r: int, alpha: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.scaling = alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, embedding_dim))
        self.lora_B = nn.Parameter(torch.empty(num_embeddings, r))
        reset_adapter(self)

    def forward(self, input: Tensor) -> Tensor:
        """Embed token ids (B, T) -> (B, T, D)."""
        low_rank = F.embedding(input, self.lora_B)  # (B, T, r)
        return self.added(super().forward(input), self.scaling * (low_rank @ self.lora_A))

    def added(self, rows: Tensor, update: Tensor) -> Tensor:
        """Rows of the table with their updates, (B, T, D) twice."""
        return rows + update


class KeepsZeros:
    """An adapted layer W x + (M * update) x, M = 1 where W is not zero (Shears, SQFT).

    So the merged weight has the zeros of W. The mask is that of the slice that runs, and nothing is
    stored; the update is made as a matrix, which costs r / tokens of the product with W, and
    one matrix as large as W is kept for the backward pass.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        """As litgpt's, with the update as one matrix."""
        kept = update_of(self) * (self.linear.weight != 0)
        return self.linear(x) + F.linear(self.lora_dropout(x), kept)


class SparseLinear(KeepsZeros, litgpt.lora.LoRALinear):
    """A linear layer whose zeros stay."""


class SparseQKV(KeepsZeros, litgpt.lora.LoRAQKVLinear):
    """The same of query, key and value."""


class SparseEmbedding(LoRAEmbedding):
    """A token table whose zeros stay."""

    def added(self, rows: Tensor, update: Tensor) -> Tensor:
        """Nothing is added to zeros."""
        return rows + update * (rows != 0)


_SPARSE: dict[type, type] = {
    litgpt.lora.LoRALinear: SparseLinear,
    litgpt.lora.LoRAQKVLinear: SparseQKV,
    LoRAEmbedding: SparseEmbedding,
}


def update_of(module: Any) -> Tensor:
    """What an adapter adds to its weight, a matrix of its shape.

    litgpt's `get_lora_AB` gives the same without a gradient for query, key and value.
    """
    if not isinstance(module, litgpt.lora.LoRAQKVLinear):
        return (module.lora_B @ module.lora_A) * module.scaling
    rows, columns = (
        module.lora_B.split(module.qkv_shapes),
        module.lora_A.chunk(len(module.qkv_shapes)),
    )
    update = torch.cat([b @ a for b, a in zip(rows, columns, strict=True)]) * module.scaling
    return module.zero_pad(update.T).T


def keep_zeros(model: nn.Module, names: frozenset[str]) -> None:
    """Let the adapters of some modules of a model or a block leave zeros alone."""
    for name, module in model.named_modules():
        if name in names and hasattr(module, "lora_A"):
            module.__class__ = _SPARSE[type(module)]  # the same state, another forward pass


class SparseBlock(litgpt.lora.Block):
    """litgpt's block, whose adapters leave zeros where the configuration says so."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        keep_zeros(self, config.lora_sparse)


class GPT(litgpt.lora.GPT):
    """`litgpt.lora.GPT`, with an adapted embedding and kept zeros where the config asks for it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.lora_embedding:
            assert config.padded_vocab_size is not None
            self.transformer.wte = LoRAEmbedding(
                config.padded_vocab_size, config.n_embd, config.lora_r, config.lora_alpha
            )
        if config.lora_sparse:
            blocks = [SparseBlock(config, number) for number in range(config.n_layer)]
            self.transformer.h = nn.ModuleList(blocks)
            keep_zeros(self, config.lora_sparse)


def sparse_modules(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Names, without the layer, of the modules that hold a matrix with a zero in some layer."""
    found = {
        split_layer(name)[1].removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and name.endswith(".weight") and bool((tensor == 0).any())
    }
    return frozenset(found)


def reset_adapter(module: nn.Module) -> None:
    """Draw an adapter anew; what it adds is zero."""
    if isinstance(module, LoRAEmbedding):
        nn.init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))
        nn.init.zeros_(module.lora_B)
    elif isinstance(module, litgpt.lora.LoRALinear):
        module.reset_parameters()


def lora_config(
    config: BaseConfig, options: LoraOptions, *, sparse: frozenset[str] = frozenset()
) -> Config:
    """The configuration of the adapted model: `config` with the adapters of `options`.

    One adapter serves both ends of a tied model, so there it is enough to ask for one end.

    Args:
        config: of the model.
        options: the adapters.
        sparse: modules whose zeros stay, from `sparse_modules`.

    Raises:
        ConfigError: if a number of the options is out of range.
    """
    options.check()
    base = {field.name: getattr(config, field.name) for field in fields(BaseConfig)}
    tied = is_tied(config)
    both = tied and (options.head or options.embedding)
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
        lora_head=options.head or both,
        lora_embedding=options.embedding or both,
        lora_sparse=sparse,
        tie_word_embeddings=tied,
        blocks=getattr(config, "blocks", None),
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted model belongs to an adapter."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


def freeze_base(model: nn.Module) -> None:
    """Train the adapters only."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_adapter(name)


def plain_name(name: str) -> str:
    """The name of a frozen weight in a model without adapters."""
    return name.replace(".linear.", ".")


class Parameters(Mapping[str, Tensor]):
    """All parameters of a model by name, as they are when they are asked for."""

    def __init__(self, model: nn.Module, gather: Callable[[str], None] = nothing) -> None:
        """Wrap a model; `gather` is called with a name before its tensor is looked at."""
        self._gather = gather
        self._homes = {
            f"{path}.{key}" if path else key: (module, key)
            for path, module in model.named_modules(remove_duplicate=False)
            for key, parameter in module._parameters.items()
            if parameter is not None
        }

    def __getitem__(self, name: str) -> Tensor:
        module, key = self._homes[name]
        self._gather(name)
        found = module._parameters[key]
        assert found is not None
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


class MergedTensors(Mapping[str, Tensor]):
    """State dict of the plain `litgpt.GPT` that computes the same as the adapted model.

    A weight that has an adapter is a new tensor, made when it is asked for and a few rows at a
    time, so that whoever writes a file tensor by tensor holds one of them. The model is left as it
    is; one without adapters passes through.
    """

    def __init__(self, model: nn.Module, gather: Callable[[str], None] = nothing) -> None:
        """Wrap a model, plain or adapted; see `Parameters`."""
        self._modules = dict(model.named_modules())
        self._parameters = Parameters(model, gather)
        self._read: Tensor | None = None
        self._names = {plain_name(name): name for name in self._parameters if not is_adapter(name)}

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        if self._read is not None:
            release(self._read)  # who writes the tensors one by one is done with it
        weight = self._read = self._parameters[self._names[name]].detach()
        owner, _, kind = name.rpartition(".")
        module: Any = self._modules[owner]
        if kind != "weight" or not hasattr(module, "lora_A"):
            return weight
        if isinstance(module, litgpt.lora.LoRAQKVLinear):
            merged = (weight.float() + update_of(module).float()).to(weight.dtype)
        else:
            merged = torch.empty_like(weight)
            parts = zip(*(t.split(_ROWS) for t in (merged, weight, module.lora_B)), strict=True)
            for part, rows, b in parts:
                part.copy_(rows.float() + module.scaling * (b @ module.lora_A).float())
        if isinstance(module, (KeepsZeros, SparseEmbedding)):
            merged[weight == 0] = 0
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
