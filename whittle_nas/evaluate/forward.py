"""Running a litgpt model on token layouts that its own `forward` can't express.

B rows, T columns, S columns that attention may look at, D `n_embd`, V vocabulary.

`litgpt.GPT.forward` knows two layouts: plain causal rows, and a KV cache with one position per
column. Scoring many continuations of one text in a single pass, and generating for rows of
different length, need a position and a set of visible columns per token. The model's own blocks
take both; only the few lines around them are repeated here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from litgpt.model import KVCache

from whittle_nas.calibration import embed, rotary
from whittle_nas.weights.assembly import Nothing


@dataclass(frozen=True)
class Layout:
    """Where every token of a batch stands and what it sees.

    Args:
        positions: Long tensor (B, T): position of each token in its own text.
        key_positions: Long tensor (B, S): the same for the columns that are looked at.
        visible: Bool tensor (B, T, S): which columns each token sees. Every token must see one.
            None: itself and all columns before it, where T = S.
    """

    positions: torch.Tensor
    key_positions: torch.Tensor
    visible: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Layout":
        """The same on another device."""
        visible = None if self.visible is None else self.visible.to(device)
        return Layout(self.positions.to(device), self.key_positions.to(device), visible)


def causal(tokens: torch.Tensor) -> Layout:
    """The layout of plain rows (B, T)."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return Layout(positions, positions)


def hidden_states(model: Any, tokens: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
    """Output of the final norm (B, T, D) for tokens (B, T).

    Args:
        model: A plain `litgpt.GPT`.
        tokens: Long tensor (B, T).
        layout: Positions and visibility; by default plain causal rows. With a layout the call must
            stand inside `attention_over`.
    """
    if layout is not None:
        return _run(model, tokens, layout.positions, _masks(model, layout))
    if not has_sliding_window(model):
        return _run(model, tokens, None, {False: None})
    with attention_over(model):
        return hidden_states(model, tokens, causal(tokens))


def _run(
    model: Any,
    tokens: torch.Tensor,
    positions: torch.Tensor | None,
    masks: dict[bool, torch.Tensor | None],
) -> torch.Tensor:
    """The lines of `GPT.forward` around the blocks; masks of global and of windowed layers."""
    if positions is None:
        cos, sin = model.cos[None, : tokens.shape[1]], model.sin[None, : tokens.shape[1]]
    else:
        cos, sin = model.cos[positions], model.sin[positions]  # (B, T, rotary)
    x = embed(model, tokens)  # (B, T, D)
    for index, block in enumerate(model.transformer.h):
        mask = masks[block.attn.apply_sliding_window_attention]
        x = block(x, *rotary(model, index, cos, sin), mask, positions)
    return model.transformer.ln_f(x)


@contextmanager
def attention_over(model: Any, batch_size: int = 0, capacity: int = 0) -> Iterator[None]:
    """Let the blocks attend by a layout: over the tokens of the call, or over a KV cache.

    Args:
        model: A plain `litgpt.GPT`.
        batch_size: Rows of the cache, B.
        capacity: Columns of the cache, S. Calls append to it; 0: no cache.
    """
    attentions = attentions_of(model)
    for attention in attentions:
        attention.kv_cache = AppendingCache(batch_size, capacity)
    try:
        yield
    finally:
        for attention in attentions:
            attention.kv_cache = None


def attentions_of(model: Any) -> list[Any]:
    """The attention of every block that has one."""
    return [b.attn for b in model.transformer.h if not isinstance(b.attn, Nothing)]


class AppendingCache(KVCache):
    """A litgpt KV cache whose columns are filled in the order of the calls, whatever the positions.

    litgpt's own is indexed by position, so rows of different length need a Python loop per row,
    and with a sliding window it refuses a prompt longer than the window.
    """

    def __init__(self, batch_size: int, capacity: int) -> None:
        torch.nn.Module.__init__(self)
        self.shape = (batch_size, capacity)
        self.length = 0
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def forward(
        self, input_pos: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, G, T, K); return all so far (B, G, S, K)."""
        batch_size, capacity = self.shape
        if not capacity:
            return k, v
        if self.keys is None or self.values is None:
            self.keys = k.new_empty(batch_size, k.shape[1], capacity, k.shape[3])
            self.values = v.new_empty(batch_size, v.shape[1], capacity, v.shape[3])
        start, self.length = self.length, self.length + input_pos.shape[1]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop all rows but these (long tensor of row numbers)."""
        assert self.keys is not None
        assert self.values is not None
        self.shape, rows = (len(rows), self.shape[1]), rows.to(self.keys.device)
        self.keys, self.values = self.keys[rows], self.values[rows]


def has_sliding_window(model: Any) -> bool:
    """Whether a layer sees only near tokens: litgpt makes its mask in a Python loop over tokens."""
    return any(block.attn.apply_sliding_window_attention for block in model.transformer.h)


def _masks(model: Any, layout: Layout) -> dict[bool, torch.Tensor | None]:
    """Attention masks (B, 1, T, S) of global (False) and windowed (True) layers."""
    masks: dict[bool, torch.Tensor | None] = {False: None}
    if layout.visible is not None:
        masks[False] = _for_attention(model, layout.visible[:, None])
    if has_sliding_window(model):
        window: Any = model.config.sliding_window_size
        distance = layout.positions[:, :, None] - layout.key_positions[:, None]  # (B, T, S)
        seen = (distance >= 0) if layout.visible is None else layout.visible
        masks[True] = _for_attention(model, (seen & (distance < window))[:, None])
    return masks


def _for_attention(model: Any, visible: torch.Tensor) -> torch.Tensor:
    if model.config.attention_logit_softcapping is None:
        return visible
    # litgpt adds the mask to soft-capped scores, so it must be a number
    dtype = model.transformer.wte.weight.dtype
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )
