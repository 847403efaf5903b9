"""Compare the search methods on a space whose front is known, because every member was evaluated.

`scripts/studies/search.sh` runs it.

    python scripts/studies/search.py space
    python scripts/studies/search.py table --checkpoint_dir ... --text ... --out table.csv
    python scripts/studies/search.py compare --table table.csv --checkpoint_dir ... --out_dir ...
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from litgpt import Config

from whittle_nas.data import TextData, load_blocks
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.metrics.latency_parts import Load
from whittle_nas.search.costs import Costs
from whittle_nas.search.evaluation import Evaluation, Job
from whittle_nas.search.loop import Schedule, Search
from whittle_nas.search.options import Method
from whittle_nas.search.pareto import hypervolume, is_on_front
from whittle_nas.search.searchers import Problem, make_searcher
from whittle_nas.search.trials import Status
from whittle_nas.space import SearchSpace, SubNetwork, load_space
from whittle_nas.space.subnetwork import SIZES
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint

# 2,860 sub-networks of stories260K, from 4 % to all of its parameters.
SPACE = {
    "n_embd": {"min": 16, "step": 4},
    "n_head": [2, 4, 8],
    "n_query_groups": [2, 4],
    "intermediate_size": {"min": 12, "step": 16},
    "n_layer": {"min": 1},
}
OBJECTIVES = ("val_loss", "num_params")
AT = (50, 100, 200)


def make_table(checkpoint_dir: Path, text: Path, out: Path, blocks: int) -> None:
    """Evaluate every member of the space once."""
    supernet = load_supernet(checkpoint_dir)
    data = TextData(files=text, block_size=256, num_blocks=blocks)
    tokens = load_blocks(data, checkpoint_dir, config=supernet.config).tokens
    order = supernet.info.layer_order
    members = list(load_space(SPACE, supernet.config, layer_order=order).members())
    start = time.perf_counter()
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*SIZES, "val_loss"])
        for done, sub in enumerate(members, start=1):
            loss = nats_per_token(supernet.standalone(sub), tokens)
            writer.writerow([*sub.summary().values(), repr(loss)])
            if done % 200 == 0:
                seconds = time.perf_counter() - start
                print(f"{done} of {len(members)} members, {seconds:.0f} s", file=sys.stderr)


def read_table(path: Path, layer_order: Sequence[int]) -> dict[SubNetwork, float]:
    """Loss of every member."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        SubNetwork.uniform(layer_order, **{name: int(row[name]) for name in SIZES}): float(
            row["val_loss"]
        )
        for row in rows
    }


class TablePool:
    """Answers from the table."""

    def __init__(self, losses: dict[SubNetwork, float]) -> None:
        self._losses, self._queue = losses, []

    def submit(self, job: Job) -> None:
        """Queue a look-up."""
        self._queue.append(job)

    def next(self) -> tuple[int, Evaluation]:
        """Look one up."""
        job = self._queue.pop(0)
        return job.number, Evaluation(Status.complete, {"val_loss": self._losses[job.sub]})

    def close(self) -> None:
        """Nothing to release."""


class Study:
    """The known space and its front."""

    def __init__(self, table: Path, checkpoint_dir: Path) -> None:
        checkpoint = open_checkpoint(checkpoint_dir)
        config: Config = checkpoint.config
        order = checkpoint.info.layer_order
        self.losses = read_table(table, order)
        self.space: SearchSpace = load_space(SPACE, config, layer_order=order)
        load = Load(1, 256, torch.device("cpu"), torch.float32)
        self.costs = Costs(config, checkpoint.info, load)
        count = self.costs.estimators(["num_params"])["num_params"]
        points = np.array([[loss, count(sub)] for sub, loss in self.losses.items()])
        front = points[is_on_front(points)]
        # Linear scales from the best value to the front's worst (the nadir point).
        self.low, self.reference = front.min(axis=0), front.max(axis=0)
        self.num_on_front = len(front)
        self.best = hypervolume(front, self.reference)

    def share(self, points: np.ndarray) -> float:
        """Hypervolume in percent of the true front's."""
        return 100 * hypervolume(points, self.reference) / self.best

    def run(self, method: Method, seed: int, num_trials: int) -> tuple[list[float], float]:
        """Search once: percent after 1, 2, ... trials, and seconds of proposing per trial."""
        problem = Problem(
            self.space,
            OBJECTIVES,
            self.costs.estimators(OBJECTIVES),
            first=[self.space.largest, self.space.smallest],
        )
        start = time.perf_counter()
        trials = Search(
            searcher=make_searcher(method, problem, seed),
            objectives=OBJECTIVES,
            costs=self.costs.of,
            pool=TablePool(self.losses),
            schedule=Schedule(num_trials),
            on_trial=lambda _: None,
        ).run()
        seconds = (time.perf_counter() - start) / len(trials)
        points = np.array([[t.metrics[name] for name in OBJECTIVES] for t in trials])
        return [self.share(points[: n + 1]) for n in range(len(points))], seconds


def compare(study: Study, methods: list[Method], seeds: int, out_dir: Path) -> None:
    """Run every method and print the table."""
    at = [n for n in AT if n <= len(study.losses)]
    print(
        f"{len(study.losses)} members, {study.num_on_front} on the front; hypervolume in percent "
        f"of the true front's after {', '.join(map(str, at))} trials, mean and deviation of "
        f"{seeds} seeds"
    )
    results = {}
    for method in methods:
        runs = [study.run(method, seed, max(at)) for seed in range(seeds)]
        curves = [curve + [curve[-1]] * (max(at) - len(curve)) for curve, _ in runs]
        cells = []
        for n in at:
            values = [curve[n - 1] for curve in curves]
            spread = statistics.stdev(values) if seeds > 1 else 0.0
            cells.append(f"{statistics.mean(values):6.2f} +- {spread:4.2f}")
        seconds = statistics.mean(s for _, s in runs)
        print(f"{method.value:14s} {'   '.join(cells)}   {1e3 * seconds:7.1f} ms/trial", flush=True)
        results[method.value] = {"percent": curves, "seconds_per_trial": seconds}
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "search_study.json").write_text(json.dumps(results) + "\n", encoding="utf-8")


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("space")
    table = commands.add_parser("table")
    table.add_argument("--checkpoint_dir", type=Path, required=True)
    table.add_argument("--text", type=Path, required=True)
    table.add_argument("--out", type=Path, required=True)
    table.add_argument("--blocks", type=int, default=16)
    against = commands.add_parser("compare")
    against.add_argument("--table", type=Path, required=True)
    against.add_argument("--checkpoint_dir", type=Path, required=True)
    against.add_argument("--out_dir", type=Path, required=True)
    against.add_argument("--seeds", type=int, default=5)
    against.add_argument("--methods", nargs="+", type=Method, default=list(Method))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "space":
        print(yaml.safe_dump(SPACE), end="")
    elif options.command == "table":
        make_table(options.checkpoint_dir, options.text, options.out, options.blocks)
    else:
        study = Study(options.table, options.checkpoint_dir)
        compare(study, options.methods, options.seeds, options.out_dir)


if __name__ == "__main__":
    main()
