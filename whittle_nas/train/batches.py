"""Samples, packing and batches whose order is a function of the seed and the step.

N samples, B samples per batch, T tokens per sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler

IGNORE = -100  # litgpt's ignore_index: a position without a label


class Sample(NamedTuple):
    """Inputs and what each is to predict; in a batch with a leading dimension B.

    Attributes:
        input_ids: token ids, (T,).
        labels: the next token at every position, or IGNORE, (T,).
        segments: which packed sample a position belongs to, (T,), -1 for padding; None where a row
            is one sample.
        labelled: of a batch, the flat positions that have a label; None where nobody has looked.
    """

    input_ids: Tensor
    labels: Tensor
    segments: Tensor | None = None
    labelled: Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Positions that have a label."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> Sample:
        """The same on a device."""
        return Sample(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


def from_blocks(tokens: Tensor) -> list[Sample]:
    """Packed text (N, T + 1), every token but the first a label."""
    return [Sample(block[:-1], block[1:]) for block in tokens]


def from_labelled(input_ids: Tensor, labels: Tensor) -> Sample:
    """A sample in litgpt's form, where `labels[t]` belongs to `input_ids[t]` itself.

    Tokens behind which no label follows are cut: nobody would use what the model computes there.
    """
    shifted = labels[1:].long()
    labelled = (shifted != IGNORE).nonzero()
    end = int(labelled[-1]) + 1 if len(labelled) else 0
    return Sample(input_ids[:end].long(), shifted[:end])


def pack(samples: Sequence[Sample], block_size: int) -> list[Sample]:
    """Join samples into rows of at most `block_size` tokens: first fit, longest first."""
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i].input_ids), i))
    rows: dict[int, list[Sample]] = {}
    lengths = [len(samples[i].input_ids) for i in order]
    for i, row in zip(order, first_fit(lengths, block_size), strict=True):
        rows.setdefault(row, []).append(samples[i])
    return [_join(row) for row in rows.values()]


def first_fit(lengths: Sequence[int], room: int) -> list[int]:
    """For each length the first of endlessly many rows of `room` that can still hold it.

    Rows are the leaves of a tree whose nodes know the most room below them: O(n log n).

    Args:
        lengths: what has to be placed, in this order; each takes a whole row if it exceeds `room`.
        room: of an empty row.
    """
    leaves = 1 << max(0, (len(lengths) - 1).bit_length())
    most = [room] * (2 * leaves)  # node n has the children 2 n and 2 n + 1
    found = []
    for length in lengths:
        needed, node = min(length, room), 1
        while node < leaves:
            node *= 2
            node += most[node] < needed
        found.append(node - leaves)
        most[node] -= needed
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return found


def _join(row: list[Sample]) -> Sample:
    segments = [torch.full((len(s.input_ids),), number) for number, s in enumerate(row)]
    ids, labels = [s.input_ids for s in row], [s.labels for s in row]
    return Sample(torch.cat(ids), torch.cat(labels), torch.cat(segments))


def collate(samples: Sequence[Sample]) -> Sample:
    """Rows of different length into one batch (B, T), padded on the right without labels."""

    def rows(tensors: Sequence[Tensor], padding: int) -> Tensor:
        return pad_sequence(list(tensors), batch_first=True, padding_value=padding)

    segments = [s.segments for s in samples if s.segments is not None]
    labels = rows([s.labels for s in samples], IGNORE)
    return Sample(
        rows([s.input_ids for s in samples], 0),
        labels,
        rows(segments, -1) if segments else None,
        # here and not in the step: on a GPU the program would wait for the number of positions
        (labels.flatten() != IGNORE).nonzero().squeeze(1),
    )


def labelled(batch: Sample) -> Tensor:
    """The flat positions of a batch that have a label, (N,)."""
    if batch.labelled is not None:
        return batch.labelled
    return (batch.labels.flatten() != IGNORE).nonzero().squeeze(1)


def unlabelled(sample: Sample) -> Sample:
    """The same input with nothing to predict."""
    return sample._replace(labels=torch.full_like(sample.labels, IGNORE))


def positions(segments: Tensor) -> Tensor:
    """Position of every token inside its own sample, (B, T) -> (B, T)."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token may look, -inf elsewhere: causal, inside its own sample; (B, 1, T, T)."""
    same = segments.unsqueeze(2) == segments.unsqueeze(1)
    causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
    mask = torch.zeros(same.shape, dtype=dtype, device=same.device)
    return mask.masked_fill_(~(same & causal), float("-inf")).unsqueeze(1)


class Stream(Sampler[list[int]]):
    """Indices of the batches of one process from batch `start` on; all epochs are one stream.

    Epoch e visits the samples in an order drawn from (seed, e). A global batch is a stretch of
    that order, cut into one piece per process, so that two processes see what one process with
    the doubled batch would see.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        num_batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples, self.batch_size, self.num_batches = num_samples, batch_size, num_batches
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.start = 0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = batches_per_epoch(self.num_samples, self.batch_size * self.world_size)
        epoch, order = -1, torch.empty(0)
        for number in range(self.start, self.num_batches):
            if number // per_epoch != epoch:
                epoch = number // per_epoch
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(self.num_samples, generator=generator)
            first = ((number % per_epoch) * self.world_size + self.rank) * self.batch_size
            at = torch.arange(first, first + self.batch_size) % self.num_samples
            yield order[at].tolist()


def batches_per_epoch(num_samples: int, global_batch: int) -> int:
    """Full batches in an epoch, at least one; the rest of the samples waits for the next order."""
    return max(1, num_samples // global_batch)


class TrainLoader(DataLoader):
    """Batches of a `Stream`, with the state that Lightning saves and restores."""

    def __init__(self, samples: Sequence[Sample], stream: Stream, *, num_workers: int = 0) -> None:
        super().__init__(
            samples,  # type: ignore[arg-type]
            batch_sampler=stream,
            collate_fn=collate,
            num_workers=num_workers,
        )
        self.stream = stream
        self.done = 0

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        self.stream.start = self.done
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches were handed out."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches of an earlier run."""
        self.done = state["done"]
