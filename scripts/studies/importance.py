"""Table and picture of scripts/studies/importance.sh.

    python scripts/studies/importance.py <out_dir> <variant> ...

RPD = mean over sub-networks of 1 - perplexity after / before sorting. The table has its mean +-
standard deviation over the seeds and the share of sub-networks that sorting improved; the picture
the perplexities by size, with the spread between the seeds.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from litgpt import Config
from plots import Panel, Point, mean_spread, plot_curves, shown

from whittle_nas.weights.axes import num_params

MODELS = ("stories260K", "babyllama-char361", "pydoc-1m")
BIN = 10  # percent of the parameters


def read(variant: Path) -> list[dict[str, Any]]:
    """The reports of all seeds."""
    return [json.loads(path.read_text()) for path in sorted(variant.glob("*/rpd.json"))]


def by_size(reports: list[dict[str, Any]], when: str, whole: int) -> list[Point]:
    """Median perplexity of the sub-networks of every size; mean and spread over the seeds."""
    bins: dict[int, list[float]] = defaultdict(list)
    for report in reports:
        found: dict[int, list[float]] = defaultdict(list)
        for row in report["subnetworks"]:
            found[int(100 * row["num_params"] / whole) // BIN].append(row[when])
        for place, values in found.items():
            bins[place].append(statistics.median(values))
    last = [report["full_perplexity"][when] for report in reports]
    points = [(BIN * (place + 0.5), *mean_spread(values)) for place, values in bins.items()]
    return [*(point for point in points if point[0] < 100), (100.0, *mean_spread(last))]


def main() -> None:
    """Write `table.md` and `perplexity.png`, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("variants", nargs="+")
    given = parser.parse_args()
    models = [name for name in MODELS if any((given.out_dir / name).glob("*/*/rpd.json"))]
    lines = [f"| changed | {' | '.join(models)} |", "|---|" + "---|" * len(models)]
    for variant in given.variants:
        cells = []
        for model in models:
            found = read(given.out_dir / model / variant.replace(" ", ","))
            if variant == "report.repair true":
                cells.append(shown(report["steps"]["repaired"] for report in found))
                continue
            better = statistics.mean(report["rpd"]["share_improved"] for report in found)
            cells.append(f"{shown(report['rpd']['mean'] for report in found)}, {better:.0%}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    (given.out_dir / "table.md").write_text(table)
    panels = []
    for model in models:
        default = given.out_dir / model / "default"
        config = Config.from_file(next(default.glob("*/model_config.yaml")))
        reports, whole = read(default), num_params(config)
        curves = {f"{when} sorting": by_size(reports, when, whole) for when in ("before", "after")}
        panels.append(Panel(model, "% of the parameters", "perplexity", curves, log=True))
    plot_curves(given.out_dir / "perplexity.png", panels)
    print(table)


if __name__ == "__main__":
    main()
