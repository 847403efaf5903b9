"""What closed-form repair gains: held-out loss of sub-networks as plain slices and repaired.

    python scripts/studies/repair.py <checkpoint> <out.jsonl> --calibration <text> --held_out <text>
        [--sizes 90% 80% intermediate_size=1088 n_head=6,n_layer=20 ...] [--num_blocks 128] ...

A size of `80%` shrinks the residual stream and the neurons by the same factor until that share of
the parameters is left. Rows that are in the output file are not computed again. Times are those of
the repair alone, whole forward passes of calibration text included.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from whittle_nas.cli.options import Sizes
from whittle_nas.data import TextData, load_blocks
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.repair.engine import repair
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.checkpoint import load_supernet
from whittle_nas.weights.counting import parameter_counter

SHARES = ["95%", "90%", "80%", "70%", "60%", "50%"]


def sub_of(net: Any, text: str) -> SubNetwork:
    """The sub-network that a size on the command line means."""
    config = net.config
    if not text.endswith("%"):
        named = dict(pair.split("=") for pair in text.split(","))
        return Sizes(**{name: int(value) for name, value in named.items()}).resolve(net)
    count = parameter_counter(config)
    wanted = float(text[:-1]) / 100 * count(net.full)

    def shrunk(factor: float) -> SubNetwork:
        return Sizes(
            n_embd=round(factor * config.n_embd),
            intermediate_size=round(factor * config.intermediate_size),
        ).resolve(net)

    factors = [at / 400 for at in range(100, 401)]
    return min(map(shrunk, factors), key=lambda sub: abs(count(sub) - wanted))


def row_of(net: Any, text: str, calibration: Any, held_out: Any) -> dict[str, Any]:
    """One line of the table."""
    sub = sub_of(net, text)
    found = repair(net, sub, calibration)
    count = parameter_counter(net.config)
    chosen = [choice for choice in found.choices.values() if choice.step is not None]
    return {
        "size": text,
        "subnetwork": sub.to_dict(),
        "share": count(sub) / count(net.full),
        "plain": nats_per_token(net.standalone(sub), held_out),
        "repaired": nats_per_token(net.standalone(sub, found.patch), held_out),
        "held_back": [found.before, found.after],
        "seconds": found.seconds,
        "tokens": found.tokens,
        "local": sum(choice.source == "local" for choice in chosen),
        "sequential": sum(choice.source == "sequential" for choice in chosen),
        "readers": sum(choice.source == "reader" for choice in chosen),
        "unchanged": len(found.choices) - len(chosen),
        "ridge": statistics.median(choice.ridge for choice in chosen) if chosen else None,
    }


def text_of(given: argparse.Namespace, path: Path, column: str, count: int, net: Any) -> Any:
    """Blocks (N, T + 1) of one file."""
    data = TextData(files=[path], column=column, num_blocks=count, block_size=given.block_size)
    return load_blocks(data, given.checkpoint, config=net.config).tokens


def main() -> None:
    """Append the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held_out", type=Path, required=True)
    parser.add_argument("--held_out_column", default="text")
    parser.add_argument("--sizes", nargs="+", default=SHARES)
    parser.add_argument("--num_blocks", type=int, default=128)
    parser.add_argument("--held_out_blocks", type=int, default=48)
    parser.add_argument("--block_size", type=int, default=256)
    given = parser.parse_args()
    net = load_supernet(given.checkpoint)
    calibration = text_of(given, given.calibration, "text", given.num_blocks, net)
    held_out = text_of(given, given.held_out, given.held_out_column, given.held_out_blocks, net)
    lines = given.out.read_text().splitlines() if given.out.is_file() else []
    rows = {row["size"]: row for row in map(json.loads, lines)}
    if "whole" not in rows:
        rows["whole"] = {
            "size": "whole",
            "share": 1.0,
            "plain": nats_per_token(net.model, held_out),
        }
        lines.append(json.dumps(rows["whole"]))
    for text in given.sizes:
        if text not in rows:
            rows[text] = row_of(net, text, calibration, held_out)
            lines.append(json.dumps(rows[text]))
            given.out.write_text("\n".join(lines) + "\n")
            print(json.dumps(rows[text]), flush=True)
    print("| sizes | parameters | plain | repaired | gain | seconds |\n|---|---|---|---|---|---|")
    for row in rows.values():
        if row["size"] == "whole":
            print(f"| whole | 100 % | {row['plain']:.3f} | | | |")
            continue
        print(
            f"| {row['size']} | {row['share']:.1%} | {row['plain']:.3f} | {row['repaired']:.3f} | "
            f"{row['plain'] - row['repaired']:.3f} | {row['seconds']:.1f} |"
        )


if __name__ == "__main__":
    main()
