"""Sharing beginnings changes where tokens stand, never what a query sees."""

import random

import pytest
import torch

from tests.conftest import tiny_config
from whittle_nas.evaluate.packing import Cost, Query, build_batch, cut, pack

COST = Cost(linear=20_000, attention=400)


def questions(seed: int, count: int = 40) -> list[Query]:
    """Multiple choice with one-token, equal, nested and very different continuations."""
    rng = random.Random(seed)

    def words(n: int) -> list[int]:
        return [rng.randrange(5, 50) for _ in range(n)]

    examples = words(20)
    found = []
    for _ in range(count):
        context = (examples if rng.random() < 0.5 else []) + words(rng.randrange(1, 25))
        endings = [words(rng.randrange(1, 7)) for _ in range(3)] + [[1], [2]]
        endings.append(endings[0] + [3])
        found += [Query.of(context, ending, 64) for ending in endings]
    return found


@pytest.mark.parametrize("max_columns", [1, 100, 10_000])
def test_every_query_stands_in_one_row_with_its_own_tokens(max_columns):
    queries = questions(0)
    rows = pack(queries, range(len(queries)), cost=COST, max_columns=max_columns)
    seen = {
        number: row.prefix + branch
        for row in rows
        for branch, members in zip(row.branches, row.members, strict=True)
        for number in members
    }
    assert seen == {number: query.inputs for number, query in enumerate(queries)}
    assert sum(len(members) for row in rows for members in row.members) == len(queries)
    longest = max(len(query.inputs) for query in queries)
    assert all(len(row.prefix) + row.tail <= max(max_columns, longest) for row in rows)


def test_shared_tokens_are_computed_once():
    queries = [Query.of(range(5, 105), [200 + c, 300 + c], 512) for c in range(4)]
    (row,) = pack(queries, range(4), cost=COST, max_columns=10_000)
    assert (len(row.prefix), row.tail) == (100, 4)


def test_one_token_choices_need_no_column_of_their_own():
    queries = [Query.of([1, 2, 3], [c], 512) for c in range(4)]
    (row,) = pack(queries, range(4), cost=COST, max_columns=10_000)
    assert (row.prefix, row.tail, row.members) == ((1, 2, 3), 0, ((0, 1, 2, 3),))


def test_batches_keep_the_budget_and_the_order():
    queries = questions(1)
    rows = pack(queries, range(len(queries)), cost=COST, max_columns=200)
    batches = list(cut(rows, 200))
    assert [row for batch in batches for row in batch] == rows
    for batch in batches:
        assert len(batch) == 1 or build_batch(batch, queries).num_columns <= 200


def test_a_token_sees_its_own_past_and_nothing_else():
    queries = questions(2, count=6)
    rows = pack(queries, range(len(queries)), cost=COST, max_columns=500)
    batch = build_batch(rows, queries)
    tokens = torch.cat((batch.prefixes, batch.tails), 1)
    width = batch.prefixes.shape[1]
    visible = batch.layout.visible
    assert visible is not None
    start = 0
    for number, length in zip(batch.queries, batch.lengths, strict=True):
        inputs = queries[number].inputs
        row, column = batch.rows[start], batch.columns[start + length - 1]  # its last input
        if column >= width:  # prefixes see by plain causal attention
            seen = visible[row, column - width].nonzero()[:, 0]
            by_position = sorted(
                zip(
                    batch.layout.key_positions[row, seen].tolist(),
                    tokens[row, seen].tolist(),
                    strict=True,
                )
            )
            assert by_position == list(enumerate(inputs))
        start += length


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ([1, 2, 3], [4, 5], Query((1, 2, 3, 4), (4, 5))),
        ([1, 2, 3, 4], [5, 6], Query((2, 3, 4, 5), (5, 6))),  # cut from the left
        ([1], [2, 3, 4, 5, 6, 7], Query((3, 4, 5, 6), (4, 5, 6, 7))),  # longer than the context
    ],
)
def test_what_exceeds_the_context_is_cut_from_the_left(context, continuation, expected):
    assert Query.of(context, continuation, 4) == expected


def test_cost_counts_the_weights_of_a_layer():
    from whittle_nas.metrics.analytic import AnalyticCosts
    from whittle_nas.space import SubNetwork

    config = tiny_config("Llama-2-7b-hf", n_layer=1)
    norms = 3 * config.n_embd
    whole = SubNetwork.from_config(config)
    count = AnalyticCosts(config).num_params_non_embedding(whole)
    assert Cost.of(config).linear == count - norms
