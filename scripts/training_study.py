"""Table and picture of scripts/training_study.sh.

    python scripts/training_study.py <out_dir>

Losses are means over the networks of the validation grid that hold 30 % to 100 % of the full
network's parameters, in nats per token; `full` is the full network's loss against the untrained
one's. Both are mean +- standard deviation over the seeds.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import yaml

from whittle_nas.plots import plot_loss_by_size


def read(path: Path) -> dict[str, Any]:
    """The figures of one run."""
    spec = yaml.safe_load(path.read_text())
    sizes = {name: network["num_params"] for name, network in spec["networks"].items()}
    history = spec["nats_per_token"]
    chosen = [name for name in sizes if 0.3 * sizes["full"] <= sizes[name]]
    first, last = history[min(history)], history[max(history)]
    return {
        "before": statistics.mean(first[name] for name in chosen),
        "after": statistics.mean(last[name] for name in chosen),
        "full": last["full"] / first["full"] - 1,
        "curve": sorted((sizes[name], last[name]) for name in sizes),
        "start": sorted((sizes[name], first[name]) for name in sizes),
        "steps": max(history),
    }


def spread(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
    """Mean and standard deviation."""
    values = [scale * value for value in values]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +- {deviation:.{digits}f}"


def main() -> None:
    """One table per model, as Markdown, and one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path)
    out_dir = parser.parse_args().out_dir
    text = ""
    for model in sorted(path.parent.parent for path in out_dir.glob("*/sorted/run.yaml")):
        text += f"\n### {model.name}\n\n"
        text += "| run | steps | seeds | before | after | full network, % |\n"
        text += "|---|---|---|---|---|---|\n"
        lines = {}
        for variant in sorted({path.parent.parent for path in model.glob("*/*/done")}):
            runs = [read(path) for path in sorted(variant.glob("*/losses.yaml"))]
            text += (
                f"| {variant.name} | {runs[0]['steps']} | {len(runs)} "
                f"| {spread([run['before'] for run in runs])} "
                f"| {spread([run['after'] for run in runs])} "
                f"| {spread([run['full'] for run in runs], 100, 1)} |\n"
            )
            lines[variant.name] = runs[0]["curve"]
            if variant.name == "long-supernet":
                lines["untrained"] = runs[0]["start"]
        chosen = {n: c for n, c in lines.items() if n.startswith(("long", "untrained"))} or lines
        plot_loss_by_size(out_dir / f"{model.name}.png", chosen, title=model.name)
    (out_dir / "table.md").write_text(text.lstrip())
    print(text)


if __name__ == "__main__":
    main()
