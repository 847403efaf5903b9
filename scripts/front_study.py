"""The Python steps of scripts/front_study.sh: choose, randomise, report.

    python scripts/front_study.py <step> <argument> ...

A network's place on a curve is the budget under which it was chosen, 40 to 90 percent of the whole
model's parameters; a network without some layers stands at its own size.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import yaml
from study_plots import Panel, mean_spread, plot_curves, shown

SIZES = ("n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size", "n_layer")
METRICS = {
    "nats_per_token": "loss, nats per token",
    "bits_per_byte": "bits per byte",
    "acc": "accuracy",
}
CURVES = {  # name in the tables, and where its scores lie below <model>/<seed>
    "sorted only": "sorted/scores",
    "magnitude order": "magnitude/scores",
    "super-network": "supernet/scores",
    "focused": "focused/scores",
    "tuned alone": "alone/*/scores",
    "from scratch": "scratch/*/scores",
    "depth only": "depth/*/scores",
    "depth, tuned": "depth/*/tuned_scores",
}
Score = dict[str, float]  # value by metric, and `num_params`, `latency_ms`
Curve = dict[float, list[Score]]  # scores of all seeds by place


def pick(front: str, checkpoint_dir: str, *budgets: str) -> None:
    """Print the entry of lowest loss under every budget, in percent of the parameters, as YAML."""
    from whittle_nas.space.front import read_front

    entries, whole = read_front(Path(front)).entries, full_size(checkpoint_dir)
    rows = []
    for budget in budgets:
        fits = [e for e in entries if e.metrics["num_params"] <= whole * int(budget) / 100]
        best = min(fits, key=lambda entry: entry.metrics["val_loss"])
        rows.append({"name": f"p{budget}", **{n: getattr(best.subnetwork, n) for n in SIZES}})
    yaml.safe_dump(rows, sys.stdout)


def sizes(picks: str, budget: str) -> None:
    """Print one choice as options of `nas export`."""
    rows = yaml.safe_load(Path(picks).read_text())
    row = next(row for row in rows if row["name"] == f"p{budget}")
    print(*(f"--subnetwork.{name}={row[name]}" for name in SIZES))


def layers(checkpoint_dir: str) -> None:
    """Print the depths that hold 40 % to 95 % of the parameters."""
    from litgpt import Config

    from whittle_nas.weights.axes import num_params

    config = Config.from_file(f"{checkpoint_dir}/model_config.yaml")
    whole, depth = num_params(config), config.n_layer
    for config.n_layer in range(1, depth):
        if 0.4 * whole <= num_params(config) <= 0.95 * whole:
            print(config.n_layer)


def randomise(checkpoint_dir: str, seed: str) -> None:
    """Replace the weights of a checkpoint by litgpt's own initialisation."""
    import torch
    from litgpt import GPT, Config

    torch.manual_seed(int(seed))
    model = GPT(Config.from_file(f"{checkpoint_dir}/model_config.yaml"))
    model.apply(model._init_weights)
    torch.save(model.state_dict(), Path(checkpoint_dir) / "lit_model.pth")


def full_size(checkpoint_dir: str) -> int:
    """Parameters of a checkpoint."""
    from litgpt import Config

    from whittle_nas.weights.axes import num_params

    return num_params(Config.from_file(f"{checkpoint_dir}/model_config.yaml"))


def report(out_dir: str) -> None:
    """Write a picture per model and print all tables."""
    for model in sorted({path.parent for path in Path(out_dir).glob("*/*/supernet")}, key=str):
        model = model.parent
        found = {name: read_curve(model, where) for name, where in CURVES.items()}
        found = {name: curve for name, curve in found.items() if curve}
        whole = found["sorted only"].pop(100.0)
        found["super-network"].pop(100.0)
        for name in ("magnitude order", "focused"):
            found.get(name, {}).pop(100.0, None)
        print(
            f"\n### {model.name}\n\n{len(whole)} seeds, {whole[0]['num_params']:,.0f} parameters."
        )
        for metric, label in METRICS.items():
            if metric in whole[0]:
                print(f"\n{table(found, whole, metric, label)}")
        print(f"\n{statement(found, whole)}")
        if shared := sharing(model, found):
            print(f"\n{shared}")
        plot_curves(Path(out_dir) / f"{model.name}.png", panels(found, whole), columns=2)


def read_curve(model: Path, where: str) -> Curve:
    """Scores of one curve, by budget; networks without some layers by their own size."""
    curve: Curve = defaultdict(list)
    for seed in sorted(path for path in model.iterdir() if path.is_dir()):
        whole = read_scores(seed / "sorted/scores/results.csv")["full"]["num_params"]
        for path in sorted(seed.glob(f"{where}/results.csv")):
            for label, score in read_scores(path).items():
                if where.startswith("depth"):
                    place = round(100 * score["num_params"] / whole, 1)
                elif "*" in where:  # a directory per budget, with one network each
                    place = float(path.parent.parent.name)
                else:
                    place = 100.0 if label == "full" else float(label[1:])
                curve[place].append(score)
    return dict(sorted(curve.items()))


def read_scores(path: Path) -> dict[str, Score]:
    """The networks of a `results.csv` of `nas evaluate`, by name."""
    found: dict[str, Score] = defaultdict(dict)
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            score = found[row["subnetwork"]]
            score["num_params"] = float(row["num_params"])
            score[row["metric"]] = float(row["value"])
            if row["latency_ms"]:
                score["latency_ms"] = float(row["latency_ms"])
    return found


def table(found: dict[str, Curve], whole: list[Score], metric: str, label: str) -> str:
    """One row per curve, one column per budget; dropped layers have a line of their own."""
    places = sorted(found["super-network"])
    head = " | ".join(f"{place:.0f} %" for place in places)
    lines = [f"| {label} | {head} |", "|---" * (len(places) + 1) + "|"]
    for name, curve in found.items():
        if not name.startswith("depth"):
            cells = [
                shown(score[metric] for score in curve[place]) if place in curve else ""
                for place in places
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    depths = [
        f"{name}: {shown(s[metric] for s in scores)} at {place:.0f} %"
        for name, curve in found.items()
        if name.startswith("depth")
        for place, scores in curve.items()
    ]
    lines += ["", f"The whole model: {shown(score[metric] for score in whole)}."]
    return "\n".join([*lines, *([f"Layers only, {'; '.join(depths)}."] if depths else [])])


def statement(found: dict[str, Curve], whole: list[Score]) -> str:
    """What a user gets at every budget."""
    lines = []
    for place, scores in found["super-network"].items():
        better = [
            100 * (1 - s["num_params"] / w["num_params"])
            for s, w in zip(scores, whole, strict=True)
        ]
        faster = [s["latency_ms"] / w["latency_ms"] for s, w in zip(scores, whole, strict=True)]
        best = min(
            (name for name, curve in found.items() if place in curve),
            key=lambda name: mean_spread(s["nats_per_token"] for s in found[name][place])[0],
        )
        chosen = found[best][place]
        said = (
            f"- {shown(better, 1)} % fewer parameters, {shown(faster, 2)} x the latency, {best}: "
        )
        said += f"loss {shown(s['nats_per_token'] for s in chosen)}"
        if "acc" in chosen[0]:
            said += f", accuracy {shown(s['acc'] for s in chosen)}"
        lines.append(said)
    return "\n".join(lines)


def sharing(model: Path, found: dict[str, Curve], place: float = 60.0) -> str:
    """Loss of one network tuned alone, by how many networks share the budget."""
    losses = {6: found["tuned alone"][place]} if "tuned alone" in found else {}
    for path in model.glob("*/shared_*"):
        number = int(path.name.removeprefix("shared_"))
        losses[number] = read_curve(model, f"{path.name}/*/scores")[place]
    if not losses:
        return ""
    rows = [
        f"| {number} | {shown(s['nats_per_token'] for s in losses[number])} |"
        for number in sorted(losses)
    ]
    return "\n".join(
        [
            f"The budget of the super-network, spent on N networks alone: loss at {place:.0f} %.",
            "",
            "| networks | loss of each |",
            "|---|---|",
            *rows,
        ]
    )


def panels(found: dict[str, Curve], whole: list[Score]) -> list[Panel]:
    """Every metric against parameters and against measured latency."""
    ends = {name: {**curve, 100.0: whole} for name, curve in found.items()}
    latency = {
        place: [s["latency_ms"] for s in scores] for place, scores in ends["super-network"].items()
    }
    made = []
    for metric in ("nats_per_token", "acc"):
        if metric not in whole[0]:
            continue
        costs: dict[str, Callable[[float, list[Score]], float]] = {
            "% of the parameters": lambda place, _: place,
            "prefill of 2 x 512 tokens, ms": lambda place, scores: mean_spread(
                [s["latency_ms"] for s in scores] if "latency_ms" in scores[0] else latency[place]
            )[0],
        }
        for xlabel, cost in costs.items():
            curves = {
                name: [
                    (cost(place, scores), *mean_spread(s[metric] for s in scores))
                    for place, scores in curve.items()
                    if "latency_ms" in scores[0] or place in latency
                ]
                for name, curve in ends.items()
            }
            made.append(Panel("", xlabel, METRICS[metric], curves))
    return made


if __name__ == "__main__":
    steps = {step.__name__: step for step in (pick, sizes, layers, randomise, report)}
    steps[sys.argv[1]](*sys.argv[2:])
