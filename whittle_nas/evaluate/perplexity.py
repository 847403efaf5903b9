"""How well a model predicts text. N blocks, T targets per block, D `n_embd`, V vocabulary."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from whittle_nas.calibration import head
from whittle_nas.data import TokenBlocks
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.batching import attempt, column_budget, halved
from whittle_nas.evaluate.forward import hidden_states
from whittle_nas.weights.supernet import positions_per_chunk


@dataclass(frozen=True)
class TextQuality:
    """What a model makes of a text.

    Args:
        nats_per_token: Mean negative log-likelihood.
        nats_per_token_stderr: Its standard error over blocks; NaN for a single block.
        bits_per_byte: The same information per UTF-8 byte, which compares between tokenizers.
        num_tokens: Predicted tokens.
        num_blocks: Blocks that they stood in.
    """

    nats_per_token: float
    nats_per_token_stderr: float
    bits_per_byte: float
    num_tokens: int
    num_blocks: int

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)


def text_quality(
    model: Any,
    blocks: TokenBlocks,
    *,
    batch_size: int | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> TextQuality:
    """Perplexity and its relatives on packed text.

    Args:
        model: A plain `litgpt.GPT`, or a sub-network as `SuperNetwork.subnet` gives it.
        blocks: Packed text, blocks no longer than the model's context.
        batch_size: Blocks per batch; None: chosen for the device. Halved when memory runs out.
        on_progress: Called with the number of finished blocks.
    """
    nats = nats_per_block(model, blocks.tokens, batch_size=batch_size, on_progress=on_progress)
    per_token = nats / blocks.block_size
    count = len(per_token)
    return TextQuality(
        nats_per_token=float(per_token.mean()),
        nats_per_token_stderr=float(per_token.std() / math.sqrt(count)) if count > 1 else math.nan,
        bits_per_byte=float(nats.sum()) / math.log(2) / max(1, int(blocks.num_bytes.sum())),
        num_tokens=count * blocks.block_size,
        num_blocks=count,
    )


def nats_per_token(model: Any, tokens: torch.Tensor, batch_size: int | None = None) -> float:
    """Mean negative log-likelihood in nats.

    Args:
        model: A plain `litgpt.GPT`, or a sub-network as `SuperNetwork.subnet` gives it.
        tokens: Token ids (N, T + 1), also litgpt's int32: inputs are `[:, :-1]`, targets `[:, 1:]`.
        batch_size: Blocks per batch; None: chosen for the device.
    """
    nats = nats_per_block(model, tokens, batch_size=batch_size)
    return float(nats.sum()) / (tokens.shape[0] * (tokens.shape[1] - 1))


@torch.inference_mode()
def nats_per_block(
    model: Any,
    tokens: torch.Tensor,
    *,
    batch_size: int | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Summed negative log-likelihood of every block (N,), float64, on the CPU.

    Args:
        model: A plain `litgpt.GPT`, or a sub-network as `SuperNetwork.subnet` gives it.
        tokens: Token ids (N, T + 1).
        batch_size: Blocks per batch; None: chosen for the device.
        on_progress: Called with the number of finished blocks.

    Raises:
        ConfigError: Blocks longer than the context, or one that does not fit into memory.
    """
    block_size = tokens.shape[1] - 1
    if block_size > model.max_seq_length:
        raise ConfigError(
            f"data.block_size={block_size} exceeds the model's context of {model.max_seq_length}"
        )
    budget = column_budget(model, block_size, batch_size)
    found: list[torch.Tensor] = []
    start = 0
    while start < len(tokens):
        batch = tokens[start : start + max(1, budget // block_size)]
        nats = attempt(lambda batch=batch: _nats(model, batch))
        if nats is None:
            budget = halved(budget, len(batch) * block_size, single=len(batch) == 1)
            continue
        found.append(nats)
        start += len(batch)
        if on_progress is not None:
            on_progress(len(batch))
    return torch.cat(found)


def _nats(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Summed negative log-likelihood of each block (B,) of a batch (B, T + 1)."""
    device = model.transformer.wte.weight.device
    inputs, targets = batch[:, :-1].to(device), batch[:, 1:].to(device).long()
    hidden = hidden_states(model, inputs)  # (B, T, D)
    chunk = positions_per_chunk(model.lm_head.weight.shape[0])
    pairs = zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
    losses = [F.cross_entropy(head(model, h).float(), t, reduction="none") for h, t in pairs]
    return torch.cat(losses).view(targets.shape).double().sum(1).cpu()
