"""Samples, packing and the order of the batches."""

import pytest
import torch

from whittle_nas.train.batches import (
    IGNORE,
    Sample,
    Stream,
    TrainLoader,
    attention_mask,
    collate,
    first_fit,
    from_blocks,
    from_labelled,
    pack,
    positions,
)


def test_blocks_predict_the_next_token():
    blocks = torch.arange(12).view(2, 6)
    first = from_blocks(blocks)[0]
    assert first.input_ids.tolist() == [0, 1, 2, 3, 4]
    assert first.labels.tolist() == [1, 2, 3, 4, 5]


def test_labelled_samples_are_shifted_and_cut_behind_the_last_label():
    ids = torch.tensor([5, 6, 7, 8, 9])
    sample = from_labelled(ids, torch.tensor([IGNORE, IGNORE, 7, 8, IGNORE]))
    assert sample.input_ids.tolist() == [5, 6, 7]
    assert sample.labels.tolist() == [IGNORE, 7, 8]
    assert sample.num_labels == 2
    assert from_labelled(ids, torch.full((5,), IGNORE)).num_labels == 0


def sample(length, value):
    return Sample(torch.full((length,), value), torch.full((length,), value))


def test_packing_keeps_every_sample_and_the_block_size():
    lengths = [7, 3, 3, 9, 1, 10, 2]
    rows = pack([sample(n, i) for i, n in enumerate(lengths)], 10)
    assert all(len(row.input_ids) <= 10 for row in rows)
    assert len(rows) == 4  # 35 tokens
    tokens = torch.cat([row.input_ids for row in rows])
    assert sorted(tokens.tolist()) == sorted(i for i, n in enumerate(lengths) for _ in range(n))
    for row in rows:  # a segment is one sample
        pairs = {(s, v) for s, v in zip(row.segments.tolist(), row.input_ids.tolist(), strict=True)}
        assert len(pairs) == len({s for s, _ in pairs}) == len({v for _, v in pairs})


def test_first_fit_is_that_of_looking_at_every_row():
    for seed in range(20):
        lengths = torch.randint(1, 40, (60,), generator=torch.Generator().manual_seed(seed))
        room, expected = [], []
        for length in lengths.tolist():
            at = next((row for row, free in enumerate(room) if free >= length), len(room))
            if at == len(room):
                room.append(32)
            room[at] -= length
            expected.append(at)
        assert first_fit(lengths.tolist(), 32) == expected
    assert first_fit([], 8) == []


def test_packing_looks_at_few_rows():
    """As many full rows as samples: looking at each of them takes minutes for an epoch."""

    class Counted(int):
        looks = 0

        def __gt__(self, other):
            Counted.looks += 1
            return int(self) > int(other)

        def __lt__(self, other):
            Counted.looks += 1
            return int(self) < int(other)

    first_fit([Counted(9)] * 1000, 10)
    assert 0 < Counted.looks < 1000 * 20


def test_collate_pads_without_labels():
    batch = collate(pack([sample(4, 1), sample(3, 2)], 4))
    assert batch.input_ids.shape == batch.labels.shape == batch.segments.shape == (2, 4)
    assert batch.labels[1].tolist() == [2, 2, 2, IGNORE]
    assert batch.segments[1].tolist() == [0, 0, 0, -1]
    assert collate([sample(2, 1)]).segments is None


def test_positions_and_mask_keep_samples_apart():
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]])
    assert positions(segments).tolist() == [[0, 1, 2, 0, 1, 0]]
    allowed = attention_mask(segments, torch.float32)[0, 0] == 0
    expected = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(2, 2).tril(), torch.ones(1, 1))
    assert torch.equal(allowed, expected.bool())


def order(**changes):
    arguments = {"batch_size": 4, "num_batches": 9, "seed": 1, **changes}
    return list(Stream(18, **arguments))


def test_an_epoch_visits_every_sample_once():
    batches = order(num_batches=8, batch_size=4)
    first, second = sum(batches[:4], []), sum(batches[4:8], [])
    assert len(set(first)) == len(set(second)) == 16
    assert first != second


def test_the_seed_is_the_order():
    assert order() == order()
    assert order() != order(seed=2)


def test_processes_share_what_one_would_see():
    whole = order(batch_size=4)
    parts = [order(batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("done", [0, 1, 4, 8, 9])
def test_a_resumed_loader_hands_out_the_rest(done):
    samples = [sample(3, i) for i in range(18)]

    def loader():
        return TrainLoader(samples, Stream(18, batch_size=4, num_batches=9, seed=1))

    whole = [batch.input_ids[:, 0].tolist() for batch in loader()]
    interrupted = loader()
    for _, _ in zip(range(done), interrupted, strict=False):
        pass
    resumed = loader()
    resumed.load_state_dict({"done": done})
    assert [batch.input_ids[:, 0].tolist() for batch in resumed] == whole[done:]


def test_fewer_samples_than_a_batch():
    batches = list(Stream(3, batch_size=8, num_batches=2, seed=0))
    assert all(len(batch) == 8 and set(batch) == {0, 1, 2} for batch in batches)
