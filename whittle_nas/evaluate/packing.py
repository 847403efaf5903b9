"""Which tokens are computed once: queries that start alike share a row.

A query is a token sequence of which the last few tokens are scored. The choices of a question, and
often whole questions with the same examples before them, begin with the same tokens. A row holds
this common prefix once and, as branches that don't see each other, the different endings after it.
The prefix runs first, by plain causal attention; then all branches at once, over its keys.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from whittle_nas.evaluate.forward import Layout
from whittle_nas.weights.axes import is_gated

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """One continuation to score.

    Args:
        inputs: Tokens that go into the model, at least one.
        targets: The continuation: target t is predicted after input `t - len(targets)`.
    """

    inputs: Tokens
    targets: Tokens

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], max_length: int) -> "Query":
        """Cut context + continuation from the left to what a context of `max_length` can hold.

        lm-eval's own Hugging Face model cuts the same way; a continuation longer than the context,
        on which that one stops, keeps its last `max_length` tokens here.
        """
        inputs = (*context, *continuation)[-(max_length + 1) : -1]
        return cls(inputs, tuple(continuation[-len(inputs) :]))


@dataclass(frozen=True)
class Row:
    """Queries that are computed in one row.

    Args:
        prefix: Tokens that all queries begin with.
        branches: What follows the prefix; no two branches are equal.
        members: For each branch the numbers of its queries.
    """

    prefix: Tokens
    branches: tuple[Tokens, ...]
    members: tuple[tuple[int, ...], ...]

    @property
    def tail(self) -> int:
        """Tokens of all branches."""
        return sum(map(len, self.branches))


@dataclass(frozen=True)
class Cost:
    """What a row costs in one layer, in multiplications: decides whether sharing is worth it.

    Args:
        linear: Per token: the weights of the layer.
        attention: Per token and token that it sees.
    """

    linear: int
    attention: int

    @classmethod
    def of(cls, config: Any) -> "Cost":
        """The costs of a litgpt config's layers."""
        gates = 2 if is_gated(config) else 1
        heads = 2 * (config.n_head + config.n_query_groups) * config.head_size
        linear = config.n_embd * (heads + (gates + 1) * config.intermediate_size)
        # scores and values, and a softmax whose exponential costs about 30 multiplications
        return cls(linear, config.n_head * (2 * config.head_size + 30))

    def row(self, prefix: int, tail: int) -> float:
        """A row of a causal prefix and of branches that attend to all columns."""
        seen = prefix * prefix / 2 + tail * (prefix + tail)
        return (prefix + tail) * self.linear + seen * self.attention


@dataclass
class _Group:
    """A row in the making: neighbours in lexicographic order and the length of their prefix."""

    inputs: list[Tokens]
    members: list[list[int]]
    prefix: int

    def tail(self, prefix: int) -> int:
        return sum(len(inputs) - prefix for inputs in self.inputs)

    def row(self) -> Row:
        return Row(
            self.inputs[0][: self.prefix],
            tuple(inputs[self.prefix :] for inputs in self.inputs),
            tuple(map(tuple, self.members)),
        )


def pack(
    queries: Sequence[Query], numbers: Iterable[int], *, cost: Cost, max_columns: int
) -> list[Row]:
    """Group queries into rows, longest prefix first, so that memory runs out at once or never.

    Args:
        queries: All queries.
        numbers: Those to pack, in any order.
        cost: Of a longer row.
        max_columns: Rows don't grow beyond this by sharing.
    """
    done: list[_Group] = []
    group: _Group | None = None
    for number in sorted(numbers, key=lambda i: queries[i].inputs):
        inputs = queries[number].inputs
        if group is None or not _join(group, inputs, number, cost, max_columns):
            group = _Group([inputs], [[number]], len(inputs))
            done.append(group)
    rows = [group.row() for group in done]
    return sorted(rows, key=lambda row: (len(row.prefix) // 32, row.tail), reverse=True)


def _join(group: _Group, inputs: Tokens, number: int, cost: Cost, max_columns: int) -> bool:
    """Add a query to a group if one larger row is clearly cheaper than two rows."""
    last = group.inputs[-1]
    if inputs == last:
        group.members[-1].append(number)
        return True
    prefix = min(group.prefix, _common(last, inputs))
    tail = group.tail(prefix) + len(inputs) - prefix
    apart = cost.row(group.prefix, group.tail(group.prefix)) + cost.row(len(inputs), 0)
    if prefix + tail > max_columns or cost.row(prefix, tail) > 0.9 * apart:
        return False
    group.inputs.append(inputs)
    group.members.append([number])
    group.prefix = prefix
    return True


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection over slices: long equal prefixes compare at the speed of memory
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Batch:
    """Rows as tensors: P columns of prefixes, Q columns of branches, N scored positions.

    Args:
        prefixes: Long tensor (B, P), filled up with 0 on the right.
        tails: Long tensor (B, Q): the branches of each row, one after the other.
        layout: Positions of the tails, and which of the P + Q columns they see.
        rows: Row of every scored position (N,).
        columns: Column of every scored position (N,), among P + Q.
        targets: Token to predict there (N,).
        queries: Number of each query, in the order in which its positions stand in these tensors.
        lengths: How many positions each of these queries has.
    """

    prefixes: torch.Tensor
    tails: torch.Tensor
    layout: Layout
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    queries: list[int]
    lengths: list[int]

    @property
    def num_columns(self) -> int:
        """Tokens that the model runs over, fillers included."""
        return self.prefixes.numel() + self.tails.numel()


def build_batch(rows: Sequence[Row], queries: Sequence[Query]) -> Batch:
    """Lay rows side by side.

    Args:
        rows: Rows of one batch.
        queries: All queries, to which the rows refer.
    """
    P, Q = max(len(row.prefix) for row in rows), max(row.tail for row in rows)
    prefixes = torch.zeros(len(rows), P, dtype=torch.long)
    tails = torch.zeros(len(rows), Q, dtype=torch.long)
    positions = torch.arange(P).repeat(len(rows), 1)
    positions = torch.cat((positions, torch.zeros_like(tails)), 1)  # (B, P + Q)
    branch = torch.full((len(rows), P + Q), -1)  # -1: filler, 0: prefix, 1, 2, ...: branches
    scored: list[_Scored] = []
    for r, row in enumerate(rows):
        length = len(row.prefix)
        prefixes[r, :length] = torch.tensor(row.prefix)
        branch[r, :length] = 0
        start = P
        for b, (ending, members) in enumerate(zip(row.branches, row.members, strict=True)):
            end = start + len(ending)
            tails[r, start - P : end - P] = torch.tensor(ending, dtype=torch.long)
            positions[r, start:end] = torch.arange(length, length + len(ending))
            branch[r, start:end] = b + 1
            # the tokens of a branch stand in the prefix and, without a gap, in the tail
            path = range(start - length, end)
            for number in members:
                targets = queries[number].targets
                columns = [c if c >= start else c - start + length for c in path[-len(targets) :]]
                scored.append(_Scored(r, columns, number, targets))
            start = end
    return Batch(
        prefixes,
        tails,
        Layout(positions[:, P:], positions, _visible(branch, P)),
        rows=torch.tensor([s.row for s in scored for _ in s.targets]),
        columns=torch.tensor([c for s in scored for c in s.columns]),
        targets=torch.tensor([t for s in scored for t in s.targets]),
        queries=[s.query for s in scored],
        lengths=[len(s.targets) for s in scored],
    )


class _Scored(NamedTuple):
    """A query in a batch: its row and the columns that predict its targets."""

    row: int
    columns: list[int]
    query: int
    targets: Tokens


def _visible(branch: torch.Tensor, start: int) -> torch.Tensor:
    """What columns from `start` on see (B, Q, S): what is before them in prefix or own branch."""
    same = branch[:, start:, None] == branch[:, None]
    columns = torch.arange(branch.shape[1])
    return (same | (branch == 0)[:, None]) & (columns <= columns[start:, None])


def cut(rows: Sequence[Row], budget: int) -> Iterator[Sequence[Row]]:
    """Cut rows into batches of at most `budget` columns with fillers, at least one row each."""
    start = 0
    while start < len(rows):
        prefix = tail = count = 0
        for row in rows[start:]:
            prefix, tail = max(prefix, len(row.prefix)), max(tail, row.tail)
            if count and (count + 1) * (prefix + tail) > budget:
                break
            count += 1
        yield rows[start : start + count]
        start += count
