"""Blocks whose residual connections are matrices: SliceGPT with a basis for every part of a block.

litgpt has no such model, so its forward pass is repeated here with two products more. D `n_embd`.
"""

from __future__ import annotations

from typing import Any

import litgpt
import torch
from litgpt.model import Block
from torch import nn

from whittle_nas.errors import ConfigError
from whittle_nas.weights import axes


class ShortcutBlock(Block):
    """litgpt's block, with (D, D) matrices in place of its two identities."""

    def __init__(self, config: Any, block_idx: int) -> None:
        super().__init__(config, block_idx)
        self.shortcut_1 = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.shortcut_2 = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As litgpt's, for (B, T, D)."""
        assert self.norm_2 is not None
        x = self.attn(self.norm_1(x), *args, **kwargs) + self.shortcut_1(x)
        return self.mlp(self.norm_2(x)) + self.shortcut_2(x)


class ShortcutGPT(litgpt.GPT):
    """A litgpt model of such blocks."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.h = nn.ModuleList(ShortcutBlock(config, i) for i in range(config.n_layer))


def model_class(config: Any) -> type[litgpt.GPT]:
    """The class of the model of a config."""
    return ShortcutGPT if axes.has_shortcuts(config) else litgpt.GPT


def check_no_shortcuts(config: Any, path: object) -> None:
    """Refuse a model with shortcut matrices where only litgpt's own models will do.

    Raises:
        ConfigError: naming what runs it, and what to use instead.
    """
    if axes.has_shortcuts(config):
        raise ConfigError(
            f"--checkpoint_dir {path} has the shortcut matrices of slicegpt, which no other engine "
            "knows: nas evaluate and nas profile run it; for everything else use "
            "nas prune --method slicegpt_global"
        )
