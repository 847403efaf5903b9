"""Log-likelihoods of token sequences. N scored positions, V vocabulary."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from whittle_nas.calibration import head
from whittle_nas.evaluate.batching import attempt, column_budget, halved
from whittle_nas.evaluate.forward import attention_over, causal, hidden_states
from whittle_nas.evaluate.packing import Batch, Cost, Query, build_batch, cut, pack
from whittle_nas.weights.supernet import positions_per_chunk

Score = tuple[float, bool]


@torch.inference_mode()
def score(
    model: Any,
    queries: Sequence[Query],
    *,
    batch_size: int | None,
    on_progress: Callable[[int], object] | None = None,
) -> list[Score]:
    """Log-likelihood of every query's targets, and whether greedy decoding would give them.

    Args:
        model: A plain `litgpt.GPT` in eval mode.
        queries: What to score; equal beginnings are computed once.
        batch_size: A batch takes as many columns as this many of the longest query would; None:
            chosen here. Halved when the memory does not suffice.
        on_progress: Called with the number of queries that a batch has finished.

    Returns:
        For each query the summed log-probability in nats, in float32, and the greedy flag.

    Raises:
        ConfigError: A single query does not fit into memory.
    """
    scores: dict[int, Score] = {}
    todo = set(range(len(queries)))
    cost = Cost.of(model.config)
    budget = column_budget(model, max((len(q.inputs) for q in queries), default=1), batch_size)
    while todo:
        rows = pack(queries, todo, cost=cost, max_columns=budget)
        for batch_rows in cut(rows, budget):
            batch = build_batch(batch_rows, queries)
            found = attempt(lambda batch=batch: _score_batch(model, batch))
            if found is None:
                budget = halved(budget, batch.num_columns, single=len(batch.queries) == 1)
                break
            scores.update(zip(batch.queries, found, strict=True))
            todo.difference_update(batch.queries)
            if on_progress is not None:
                on_progress(len(batch.queries))
    return [scores[number] for number in range(len(queries))]


def _score_batch(model: Any, batch: Batch) -> list[Score]:
    device = model.transformer.wte.weight.device
    hidden = _run(model, batch)  # (B, P + Q, D)
    hidden = hidden[batch.rows.to(device), batch.columns.to(device)]  # (N, D)
    targets = batch.targets.to(device)
    chunk = positions_per_chunk(model.lm_head.weight.shape[0])
    parts = [
        _log_probs(head(model, h), t)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    log_probs = torch.cat([p for p, _ in parts]).cpu().split(batch.lengths)
    greedy = torch.cat([g for _, g in parts]).cpu().split(batch.lengths)
    return [(float(p.sum()), bool(g.all())) for p, g in zip(log_probs, greedy, strict=True)]


def _run(model: Any, batch: Batch) -> torch.Tensor:
    """Hidden states of a batch: prefixes by plain causal attention, then the branches over them."""
    device = model.transformer.wte.weight.device
    prefixes, tails = batch.prefixes.to(device), batch.tails.to(device)
    if not tails.numel():
        return hidden_states(model, prefixes)
    with attention_over(model, len(tails), prefixes.shape[1] + tails.shape[1]):
        hidden = hidden_states(model, prefixes, causal(prefixes))
        return torch.cat((hidden, hidden_states(model, tails, batch.layout.to(device))), dim=1)


def _log_probs(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target (N,) under logits (N, V), and whether it is the maximum."""
    log_probs = -F.cross_entropy(logits.float(), targets, reduction="none")
    return log_probs, logits.argmax(-1) == targets
