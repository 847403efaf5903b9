"""Is the greedy layer order as good with a shortlist as when every layer is tried in every round?

    python scripts/studies/layer_order.py <checkpoint> <text> [--layers 2] [--blocks 16]
        [--block_size 256] [--width 0.75]

Both orders are made on the first blocks of the text, in sub-networks of the given width of the
checkpoint as it is; the table has the loss on the next blocks at every depth, and how many layers
and heads were run.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from whittle_nas.data import TextData, load_blocks
from whittle_nas.importance import layers
from whittle_nas.importance.narrowing import narrowed_sizes
from whittle_nas.weights.checkpoint import load_supernet


def counting(model: Any) -> Counter[str]:
    """How often parts of a model run from now on."""
    found: Counter[str] = Counter()
    for block in model.transformer.h:
        block.register_forward_hook(lambda *_: found.update(["layers"]))
    model.lm_head.register_forward_hook(lambda *_: found.update(["heads"]))
    return found


def order_of(model: Any, tokens: torch.Tensor, least: int, *, exhaustive: bool) -> list[int]:
    """Layer ids, most important first."""
    kept, dropped = list(range(model.config.n_layer)), []
    if not exhaustive:
        return layers.greedy_order(model, tokens, min_layers=least)[0]
    while len(kept) > least:
        losses = layers.losses_without(model, tokens, kept, kept=kept)
        layer = min(losses, key=losses.__getitem__)
        dropped.append(layer)
        kept.remove(layer)
    return [*kept, *dropped[::-1]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--layers", type=int, help="where both stop; default: half")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--width", type=float, default=0.75)
    given = parser.parse_args()
    supernet = load_supernet(given.checkpoint, dtype=torch.float32)
    config = supernet.config
    least = given.layers or config.n_layer // 2
    text = TextData(files=given.text, num_blocks=2 * given.blocks, block_size=given.block_size)
    tokens = load_blocks(text, given.checkpoint, config=config).tokens
    sample, heldout = tokens[: given.blocks], tokens[given.blocks :]
    narrow = supernet.subnet(narrowed_sizes(config, given.width))
    counts = counting(narrow)
    orders, runs = {}, {}
    for name, exhaustive in (("every layer", True), ("shortlist", False)):
        counts.clear()
        orders[name] = order_of(narrow, sample, least, exhaustive=exhaustive)
        runs[name] = dict(counts)
        print(f"{name}: {orders[name]}, {runs[name]}", flush=True)
    print("| layers | " + " | ".join(orders) + " |\n|---|---|---|")
    for depth in range(config.n_layer, least - 1, -1):
        losses = [
            layers.loss_of(narrow, heldout, kept=sorted(order[:depth])) for order in orders.values()
        ]
        print(f"| {depth} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |", flush=True)
    share = runs["shortlist"]["layers"] / runs["every layer"]["layers"]
    print(f"layers run: {share:.0%} of trying all")


if __name__ == "__main__":
    main()
