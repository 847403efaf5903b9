"""Table and picture of scripts/studies/training.sh.

    python scripts/studies/training.py <out_dir>

Losses are means over the networks of the validation grid that hold 30 % to 100 % of the full
network's parameters, in nats per token; the last column is the full network's loss against the
untrained one's. Everything is mean +- standard deviation over the seeds.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import yaml
from plots import Panel, Point, mean_spread, plot_curves, shown


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
        "curve": {100 * sizes[name] / sizes["full"]: last[name] for name in chosen},
        "start": {100 * sizes[name] / sizes["full"]: first[name] for name in chosen},
        "steps": max(history),
    }


def curve(runs: list[dict[str, Any]], which: str) -> list[Point]:
    """Loss by size; the grid of networks is the same for all seeds."""
    common = set.intersection(*(set(run[which]) for run in runs))
    return [(size, *mean_spread(run[which][size] for run in runs)) for size in sorted(common)]


def panels(model: str, found: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    """What is compared with what, of the runs that are there."""
    choices: dict[str, dict[str, str]] = {
        "samplers": {
            name: f"sorted-{name}-none"
            for name in ("random", "grid_params", "calibrate_mag", "standard")
        },
        "distillation": {
            loss: f"sorted-random-{loss}" for loss in ("none", "forward_kl", "cosine")
        },
        "sorting": {name: f"{name}-random-none" for name in ("sorted", "plain")},
        "longer": {"super-network": "long-supernet", "full network only": "long-standard"},
    }
    made = []
    for title, names in choices.items():
        curves = {label: curve(found[run], "curve") for label, run in names.items() if run in found}
        if curves:
            first = found[next(run for run in names.values() if run in found)]
            curves["untrained"] = curve(first, "start")
            what = ("% of the parameters", "validation loss, nats per token")
            made.append(Panel(f"{model}: {title}", *what, curves))
    return made


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
        found: dict[str, list[dict[str, Any]]] = {}
        for variant in sorted({path.parent.parent for path in model.glob("*/*/done")}):
            runs = [read(path) for path in sorted(variant.glob("*/losses.yaml"))]
            found[variant.name] = runs
            text += (
                f"| {variant.name} | {runs[0]['steps']} | {len(runs)} "
                f"| {shown(run['before'] for run in runs)} "
                f"| {shown(run['after'] for run in runs)} "
                f"| {shown((run['full'] for run in runs), 1, 100)} |\n"
            )
        plot_curves(out_dir / f"{model.name}.png", panels(model.name, found), columns=2)
    (out_dir / "table.md").write_text(text.lstrip())
    print(text)


if __name__ == "__main__":
    main()
