"""Sum of |w| of any sub-network of a space, from tables made in one pass over the weights.

D `n_embd`, F `intermediate_size`, A choices of (n_head, n_query_groups, head_size), E choices of
n_embd, P pairs of (intermediate_size, n_embd), L layers. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from whittle_nas.space import Block, HeadChannels, SearchSpace, SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.axes import Axis

# Blocks with one part alone; `either` has a norm that both parts share.
_PARTS = {"attention": Block(1, 1, 1, 0), "mlp": Block(0, 0, 0, 1), "either": Block(1, 1, 1, 1)}
ROWS = 1024  # rows of a matrix that are summed at a time: float64 copies stay small


class Magnitudes:
    """Prefix sums of |w| at every size that the search space can choose.

    All weights fall into tables per layer: attention (L, A, E), MLP (L, P), and what depends on
    n_embd alone (L, E), by the parts of a block that it comes and goes with. A look-up is a few
    additions, however large the model.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: Any,
        space: SearchSpace,
        *,
        head_channels: HeadChannels = HeadChannels.rope,
    ) -> None:
        """Read all weights once.

        Args:
            tensors: parameters of the plain model by litgpt name.
            config: its `litgpt.Config`.
            space: whose members will be asked for.
            head_channels: how a smaller head chooses its channels.
        """
        self._config = config
        self._choices(space, head_channels)
        depth, widths = config.n_layer, len(self._embd)
        self._attention_sums = torch.zeros(depth, len(self._attention), widths).double()
        self._mlp_sums = torch.zeros(depth, len(self._mlp)).double()
        self._embd_sums = {parts: torch.zeros(depth, widths).double() for parts in _PARTS}
        self._shared = torch.zeros(widths).double()
        for name in axes.stored_names(config):
            layer, rest = axes.split_layer(name)
            sums, kind = self._sums(name, tensors[name].detach())
            if layer is None:
                self._shared += sums
            elif kind == "embd":
                # Those that a block has without the other part: which they come and go with.
                alone = [axes.is_in(block, rest, config) for block in _PARTS.values()]
                parts = next(p for p, has in zip(_PARTS, alone, strict=True) if has)
                self._embd_sums["either" if all(alone) else parts][layer] += sums
            else:
                {"attention": self._attention_sums, "mlp": self._mlp_sums}[kind][layer] += sums

    def __call__(self, sub: SubNetwork) -> float:
        """Sum of |w| over all parameters of a member of the space."""
        e = self._embd[sub.n_embd]
        found = self._shared[e].clone()
        for block in sub.shapes:
            layers = [layer for layer, other in enumerate(sub.blocks) if other == block]
            found += self._embd_sums["either"][layers, e].sum()
            if block.n_head:
                heads = self._attention[block[:3]]
                found += self._attention_sums[layers, heads, e].sum()
                found += self._embd_sums["attention"][layers, e].sum()
            if block.intermediate_size:
                pair = self._mlp[block.intermediate_size, sub.n_embd]
                found += self._mlp_sums[layers, pair].sum()
                found += self._embd_sums["mlp"][layers, e].sum()
        return float(found)

    def _choices(self, space: SearchSpace, head_channels: HeadChannels) -> None:
        """Number every choice of the space, and note which entries it keeps."""
        self._embd = {int(e): i for i, e in enumerate(space.dimensions()["n_embd"])}
        attention = [choice for choice in space.attention_choices() if choice[0]]
        self._attention = {choice: i for i, choice in enumerate(attention)}
        most = max(self._embd)
        self._selections = [
            axes.prefix_selection(most, Block(*choice, 0), self._config, head_channels)
            for choice in attention
        ]
        pairs = sorted((w, e) for e in self._embd for w in space.widths(e) if w)
        self._mlp = {pair: i for i, pair in enumerate(pairs)}
        self._lengths = torch.tensor(list(self._embd))  # (E,)
        self._pairs = torch.tensor(pairs)  # (P, 2)

    def _sums(self, name: str, weight: Tensor) -> tuple[Tensor, str]:
        """Sums of one parameter at every choice, and the table they belong to."""
        kinds = [_kind(dim) for dim in axes.dims(name, self._config)]
        if "attention" in kinds:
            at = kinds.index("attention")
            keep = self._membership(axes.dims(name, self._config)[at], weight.shape[at])
            if weight.dim() == 1:
                return (keep @ weight.abs().float()).double().unsqueeze(1), "attention"  # (A, 1)
            rows = weight if at == 0 else weight.T
            return self._prefixes(keep @ rows.abs().float()), "attention"  # (A, E)
        if "mlp" in kinds:
            if weight.dim() == 1:
                prefix = weight.abs().double().cumsum(0)
                return prefix[self._pairs[:, 0] - 1], "mlp"  # (P,)
            return self._pair_sums(weight if kinds[0] == "mlp" else weight.T), "mlp"
        if kinds == ["embd"]:
            return self._prefixes(weight.abs().unsqueeze(0))[0], "embd"  # (E,)
        rows = weight.reshape(weight.shape[0], -1)  # vocabulary first; a bias has one column
        column_sums = sum(part.abs().float().sum(0).double() for part in rows.split(ROWS))
        assert isinstance(column_sums, Tensor)
        if weight.dim() == 1:
            return column_sums.expand(len(self._embd)), "embd"
        return self._prefixes(column_sums.unsqueeze(0))[0], "embd"

    def _membership(self, dim: axes.Dim, size: int) -> Tensor:
        """1 where a choice of heads keeps an entry of a tensor dimension, (A, size)."""
        keep = torch.zeros(len(self._selections), size)
        for row, selection in zip(keep, self._selections, strict=True):
            entries = axes.kept_entries(dim, selection, self._config)
            row[torch.as_tensor(list(entries or ()))] = 1.0
        return keep

    def _prefixes(self, rows: Tensor) -> Tensor:
        """Sums of the first e columns for every choice e of n_embd, (R, D) -> (R, E)."""
        rows = rows.float()
        if 8 * len(self._lengths) < rows.shape[1]:  # one product is faster than running sums
            columns = torch.arange(rows.shape[1]).unsqueeze(1)
            return (rows @ (columns < self._lengths).float()).double()
        return rows.cumsum(1)[:, self._lengths - 1].double()

    def _pair_sums(self, weight: Tensor) -> Tensor:
        """Sums of the first f rows and e columns of (F, D) for every pair (f, e), (P,)."""
        found = torch.zeros(len(self._pairs)).double()
        column = torch.tensor([self._embd[int(e)] for e in self._pairs[:, 1]])
        above = torch.zeros(len(self._embd), 1).double()  # (E, 1)
        for start in range(0, len(weight), ROWS):
            part = self._prefixes(weight[start : start + ROWS].abs()).T  # (E, rows)
            part = part.contiguous().cumsum(1) + above
            row = self._pairs[:, 0] - 1 - start
            here = (row >= 0) & (row < part.shape[1])
            found[here] = part[column[here], row[here]]
            above = part[:, -1:]
        return found


def _kind(dim: axes.Dim) -> str:
    return {Axis.EMBD: "embd", Axis.MLP: "mlp", Axis.VOCAB: "all"}.get(dim[0], "attention")


def plain_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The frozen weights of an adapted model under the plain model's names."""
    return {
        name.replace(".linear.", "."): tensor
        for name, tensor in state_dict.items()
        if name.rpartition(".")[2] not in ("lora_A", "lora_B")
    }
