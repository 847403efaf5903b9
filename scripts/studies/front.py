"""The Python steps of scripts/studies/front.sh: choose, randomise, report.

    python scripts/studies/front.py <step> <argument> ...

A network's place on a curve is the budget under which it was chosen, 40 to 90 percent of the whole
model's parameters, and the size of a network that only lacks layers. Its name is `p<place>`.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import yaml
from plots import Panel, mean_spread, plot_curves, shown

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
    "depth only": "depth/scores",
    "depth, tuned": "depth_tuned/*/scores",
}
Score = dict[str, float]  # value by metric, and `num_params`, `latency_ms`
Curve = dict[float, list[Score]]  # scores of all seeds by place


def pick(front: str, checkpoint_dir: str, *budgets: str) -> None:
    """Print the entry of lowest loss under every budget, in percent of the parameters, as YAML."""
    from whittle_nas.space.front import read_front
    from whittle_nas.weights.checkpoint import open_checkpoint

    order = open_checkpoint(Path(checkpoint_dir)).info.layer_order
    entries, whole = read_front(Path(front), order).entries, full_size(checkpoint_dir)
    rows = []
    for budget in budgets:
        fits = [e for e in entries if e.metrics["num_params"] <= whole * int(budget) / 100]
        best = min(fits, key=lambda entry: entry.metrics["val_loss"])
        rows.append({"name": f"p{budget}", **best.subnetwork.to_dict()})
    yaml.safe_dump(rows, sys.stdout)


def sizes(picks: str, name: str) -> None:
    """Print one choice as options of `nas export`."""
    rows = yaml.safe_load(Path(picks).read_text())
    row = next(row for row in rows if row["name"] == name)
    print(
        *(
            f"--subnetwork.{name}={str(row[name]).replace(' ', '')}"
            for name in row
            if name != "name"
        )
    )


def depths(checkpoint_dir: str) -> None:
    """Print networks of full width with 40 % to 95 % of the parameters, as YAML."""
    from litgpt import Config

    from whittle_nas.weights.axes import num_params

    config = Config.from_file(f"{checkpoint_dir}/model_config.yaml")
    whole, rows = num_params(config), []
    for config.n_layer in range(1, config.n_layer):  # noqa: B020
        place = round(100 * num_params(config) / whole)
        if 40 <= place <= 95:
            rows.append({"name": f"p{place}", "n_layer": config.n_layer})
    yaml.safe_dump(rows, sys.stdout)


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
    for model in sorted({path.parent.parent for path in Path(out_dir).glob("*/*/supernet")}):
        found = {name: read_curve(model, where) for name, where in CURVES.items()}
        found = {name: curve for name, curve in found.items() if curve}
        whole = found["sorted only"][100.0]  # sorting leaves it as it is
        for curve in found.values():
            curve.pop(100.0, None)
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
    """Scores of one curve of all seeds, by place."""
    curve: Curve = defaultdict(list)
    for path in sorted(model.glob(f"[0-9]*/{where}/results.csv")):
        for label, score in read_scores(path).items():
            # a directory per place with one network each, or all networks by their names
            name = path.parent.parent.name if "*" in where else label.replace("full", "100")
            curve[float(name.removeprefix("p"))].append(score)
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
    layers_only = [
        f"{name}: {shown(s[metric] for s in scores)} at {place:.0f} %"
        for name, curve in found.items()
        if name.startswith("depth")
        for place, scores in curve.items()
    ]
    lines += ["", f"The whole model: {shown(score[metric] for score in whole)}."]
    return "\n".join(
        [*lines, *([f"Layers only, {'; '.join(layers_only)}."] if layers_only else [])]
    )


def statement(found: dict[str, Curve], whole: list[Score]) -> str:
    """What a user gets at every budget; networks tuned alone are as fast as the super-network's."""
    names = [name for name in ("super-network", "focused", "tuned alone") if name in found]
    lines = ["| budget | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for place in found["super-network"]:
        cells = [gain(found[name][place], whole) if place in found[name] else "" for name in names]
        lines.append(f"| {place:.0f} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def gain(chosen: list[Score], whole: list[Score]) -> str:
    """Networks of one budget, one per seed, against the whole model."""
    pairs = list(zip(chosen, whole, strict=True))
    fewer = shown((100 * (1 - s["num_params"] / w["num_params"]) for s, w in pairs), 1)
    words = [f"{fewer} % fewer parameters", f"loss {shown(s['nats_per_token'] for s in chosen)}"]
    if "acc" in chosen[0]:
        words.append(f"accuracy {shown(s['acc'] for s in chosen)}")
    if "latency_ms" in chosen[0]:
        faster = shown((s["latency_ms"] / w["latency_ms"] for s, w in pairs), 2)
        words.append(f"prefill {faster} x")
    return ", ".join(words)


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
    curves = {**found, "the whole model": {100.0: whole}}
    # Networks that were trained alone have the shapes of others, which were timed.
    timed = {
        place: mean_spread(score["latency_ms"] for score in scores)[0]
        for name in ("super-network", "depth only", "the whole model")
        for place, scores in curves.get(name, {}).items()
    }

    def latency(place: float, scores: list[Score]) -> float:
        own = [score["latency_ms"] for score in scores if "latency_ms" in score]
        return mean_spread(own)[0] if own else timed[place]

    costs: dict[str, Callable[[float, list[Score]], float]] = {
        "% of the parameters": lambda place, _: place,
        "prefill of 2 x 512 tokens (or contexts), ms": latency,
    }
    made = []
    for metric in ("nats_per_token", "acc"):
        if metric in whole[0]:
            for xlabel, cost in costs.items():
                points = {
                    name: [
                        (cost(place, scores), *mean_spread(s[metric] for s in scores))
                        for place, scores in curve.items()
                    ]
                    for name, curve in curves.items()
                }
                measured = {"stairs": cost is latency, "falling": metric != "acc"}
                made.append(Panel("", xlabel, METRICS[metric], points, **measured))
    return made


if __name__ == "__main__":
    steps = {step.__name__: step for step in (pick, sizes, depths, randomise, report)}
    steps[sys.argv[1]](*sys.argv[2:])
