"""Table of scripts/studies/bases.sh: losses of sub-networks in one basis and another.

    python scripts/studies/bases.py <text> <label>=<sorted checkpoint> ... [--blocks 16]
        [--block_size 256] [--sizes quick] [--repair <text> --repair_blocks 112]

Each checkpoint was sorted with `--norm_factors on`; its sub-networks are measured with and without
the factors, and with `--repair` also after closed-form repair on another text (of the few sizes of
`--sizes quick` only with factors: it takes minutes each). Rows are the share of the residual stream
alone, of all widths, and of the head size.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whittle_nas.data import TextData, load_blocks
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.importance.narrowing import narrowed_sizes, narrowed_stream
from whittle_nas.repair.engine import repair
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import load_supernet
from whittle_nas.weights.supernet import SuperNetwork

STREAM, QUICK = (15 / 16, 7 / 8, 3 / 4, 1 / 2), (7 / 8, 3 / 4)
WIDTHS = (0.9, 0.8, 0.7, 0.6)
HEADS = (1 / 2, 1 / 4)


def narrowed_heads(config: Any, width: float) -> SubNetwork:
    """A network with smaller heads, and everything else."""
    size = max(1, round(width * config.head_size))
    blocks = SubNetwork.from_config(config).blocks
    return SubNetwork(
        config.n_embd, tuple(block and block._replace(head_size=size) for block in blocks)
    )


def networks(config: Any, *, quick: bool) -> dict[str, Any]:
    """Sub-networks by name."""
    found = {"whole": narrowed_stream(config, 1.0)}
    found |= {f"n_embd {w:.4g}": narrowed_stream(config, w) for w in (QUICK if quick else STREAM)}
    if not quick:
        found |= {f"all {w:.0%}": narrowed_sizes(config, w) for w in WIDTHS}
        found |= {f"head_size {w:.4g}": narrowed_heads(config, w) for w in HEADS}
    return found


def blocks(supernet: SuperNetwork, path: str, given: argparse.Namespace, file: Path) -> Tensor:
    """Text of one file, (N, T + 1)."""
    repairs = file == given.repair
    text = TextData(
        files=file,
        column=given.repair_column if repairs else "text",
        num_blocks=given.repair_blocks if repairs else given.blocks,
        block_size=given.block_size,
    )
    return load_blocks(text, Path(path), config=supernet.config).tokens


def losses(
    supernet: SuperNetwork, subs: dict[str, SubNetwork], held_out: Tensor, text: Tensor | None
) -> dict[str, float]:
    """Held-out nats per token of every sub-network, repaired on `text` where that is given."""
    found = {}
    for name, sub in subs.items():
        repairs = text is not None and sub != supernet.full
        patch = repair(supernet, sub, text).patch if repairs else None
        found[name] = nats_per_token(supernet.standalone(sub, patch), held_out)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("sorted", nargs="+")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--sizes", choices=("quick", "all"), default="all")
    parser.add_argument("--repair", type=Path)
    parser.add_argument("--repair_column", default="text")
    parser.add_argument("--repair_blocks", type=int, default=112)
    given = parser.parse_args()
    columns: dict[str, dict[str, float]] = {}
    for label, path in (entry.split("=", 1) for entry in given.sorted):
        scaled = load_supernet(path, dtype=torch.float32)
        plain = SuperNetwork(scaled.model, replace(scaled.info, norms=None))
        held_out = blocks(scaled, path, given, given.text)
        subs = networks(scaled.config, quick=given.sizes == "quick")
        for name, supernet in ((label, plain), (f"{label}, factors", scaled)):
            columns[name] = losses(supernet, subs, held_out, None)
            print(name, columns[name], flush=True)
            if given.repair and (supernet is scaled or given.sizes == "all"):
                text = blocks(scaled, path, given, given.repair)
                columns[f"{name}, repaired"] = losses(supernet, subs, held_out, text)
    rows = list(next(iter(columns.values())))
    print("| nats per token | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for row in rows:
        cells = " | ".join(f"{column[row]:.3f}" for column in columns.values())
        print(f"| {row} | {cells} |")


if __name__ == "__main__":
    main()
