"""A cascade, networks alone, or fewer layers: losses at equal total cost.

    python scripts/studies/cascade.py run <out_dir> [--models ...] [--seeds 1 2 3] [--wanted 6 3 1]
    python scripts/studies/cascade.py report <out_dir>

`--cost` is what a method may spend in all, in forward and backward passes of the whole model over a
batch of 8 x 128 tokens, for however many networks are wanted; a sub-network costs its share of the
parameters, a forward pass alone a third. The search and the repair of every start are paid from it,
and a teacher. Sorting costs all methods the same and is left out, and is done once: seeds differ in
the order of the text. Every finished training is a line of `cascade.jsonl`, which is not run again.
A line has of every network its loss and the share of next tokens that it ranks first, before and
after, and its latency as a share of the whole model's: a forward pass of 8 x 128 tokens, all shapes
of a model in turn in one measurement.

Methods:
    alone      the picks of a search, each from its repaired slice
    cascade    the same, largest first, each from the smallest trained one that it is a part of
    shared     half of the cost trains all picks at once in one set of weights (a super-network
               whose other members nobody wants), the other half each alone from its part of them
    depth      networks that only lack layers, each from its repaired slice; no search
    ...+kd     the same, with the frozen original as teacher instead of cross entropy
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from whittle_nas.cli.candidates import choose_candidates
from whittle_nas.data import TextData
from whittle_nas.repair.engine import repair
from whittle_nas.space import SubNetwork
from whittle_nas.space.samplers import GridSampler
from whittle_nas.train.batches import collate
from whittle_nas.train.choices import SandwichOptions, ValidationOptions
from whittle_nas.train.forward import labelled_hidden, labels_of
from whittle_nas.train.options import Distillation, LossOptions, OptimizerOptions, TrainerOptions
from whittle_nas.train.prepare import TrainedTensors
from whittle_nas.train.run import Networks, TrainingOptions
from whittle_nas.train.run import train as train_networks
from whittle_nas.train.sources import load_both
from whittle_nas.train.specialise import (
    Slice,
    part_of,
    repaired,
    slice_of,
    smallest_around,
    specialise,
    text_of,
)
from whittle_nas.train.teacher import frozen
from whittle_nas.weights.checkpoint import Checkpoint, open_checkpoint, supernet_of
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.supernet import SuperNetwork

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
WANTED = {1: (60,), 3: (50, 70, 90), 6: (40, 50, 60, 70, 80, 90), 12: tuple(range(35, 91, 5))}
BLOCK, BATCH, TRIALS, SEARCH_BLOCKS, REPAIR_BLOCKS = 128, 8, 48, 16, 64
TIMED = 60  # runs of every shape
FORWARD = 1 / 3
PER_STEP = 2  # networks that a shared step draws, beside the one in place of the whole
TIED = ("stories260K",)  # whose head a rotation unties: an eighth more parameters for nothing
RATES = {"stories260K": 2e-3, "babyllama-char361": 2e-4}
SPACES = {  # down to shapes that are useless before they are repaired
    "stories260K": {
        "n_embd": [48, 52, 56, 60, 64],
        "n_head": [4, 8],
        "n_layer": [2, 3, 4, 5],
        "intermediate_size": [96, 104, 112, 120, 128, 136, 144, 152, 160, 172],
    },
    "babyllama-char361": {
        "n_embd": [56, 64, 72, 80, 88, 96, 104, 112, 120, 128],
        "n_head": [4, 8],
        "n_layer": [2, 3, 4, 5],
        "intermediate_size": [224, 256, 288, 320, 352],
    },
}
METHODS = ("alone", "cascade", "shared", "depth", "alone+kd", "cascade+kd", "depth+kd")
RESULTS = "cascade.jsonl"
COLUMNS = {
    "after": "nats per token",
    "accuracy": "share of next tokens ranked first",
    "latency": "latency, of the whole model's",
}


def nas(path: Path, *command: Any) -> Path:
    """Run a command that writes `path`, unless it has."""
    if not (path / "run.yaml").is_file():
        from whittle_nas.__main__ import main

        path.parent.mkdir(parents=True, exist_ok=True)
        if code := main([*map(str, command), "--out_dir", str(path), "--overwrite", "true"]):
            raise SystemExit(f"{path}: status {code}")
    return path


@dataclass(frozen=True)
class Model:
    """A model, sorted, with what is trained of it."""

    name: str
    out: Path
    budgets: tuple[int, ...]  # of the search, of which the wanted ones are taken

    @functools.cached_property
    def sorted(self) -> Checkpoint:
        """The sorted checkpoint."""
        basis = "permutation" if self.name in TIED else "auto"
        return open_checkpoint(nas(
            self.out / self.name / "sorted", "importance",
            "--checkpoint_dir", DATA / "checkpoints" / self.name, "--basis", basis,
            "--data.files", DATA / "tinystories" / "train.jsonl", "--data.num_blocks", 64,
            "--data.seed", 1, "--sweep.bound", 0.5,
        ))  # fmt: skip

    @functools.cached_property
    def original(self) -> Checkpoint:
        """The checkpoint as it came in, whose parameters the budgets are shares of."""
        return open_checkpoint(DATA / "checkpoints" / self.name)

    @functools.cached_property
    def texts(self) -> tuple[Any, Any]:
        """Samples to train on, and those whose loss is reported."""
        train, test = (
            TextData(files=DATA / "tinystories" / f"{part}.jsonl", block_size=BLOCK)
            for part in ("train", "test")
        )
        found = load_both(train, test, self.sorted.path, config=self.sorted.config, packing=False)
        return found[0].samples, found[1].samples[:128]

    @functools.cached_property
    def teacher(self) -> Any:
        """The checkpoint as it came in, frozen."""
        return frozen(self.original, like=self.sorted.config)

    def share(self, sub: SubNetwork) -> float:
        """Of the parameters of the model as it came in."""
        whole = parameter_counter(self.original.config)(
            SubNetwork.from_config(self.original.config)
        )
        return parameter_counter(self.sorted.config)(sub) / whole

    @functools.cached_property
    def picks(self) -> dict[int, SubNetwork]:
        """The best of a search under each budget, nested where that costs little."""
        repaired = [
            "--repair", "true", "--calibration.files", DATA / "tinystories" / "train.jsonl",
            "--calibration.block_size", BLOCK, "--calibration.num_blocks", SEARCH_BLOCKS,
        ]  # fmt: skip
        whole = parameter_counter(self.original.config)(
            SubNetwork.from_config(self.original.config)
        )
        space = self.sorted.path.parent / "space.yaml"
        space.write_text(yaml.safe_dump(SPACES[self.name]))
        limits = {budget: int(whole * budget / 100) for budget in self.budgets}
        found = nas(
            self.out / self.name / "search", "search", "--checkpoint_dir", self.sorted.path,
            "--num_trials", TRIALS, "--seed", 1, "--nested", "true", *repaired,
            "--search_space", space,
            "--data.files", DATA / "tinystories" / "valid.jsonl", "--data.block_size", BLOCK,
            "--data.num_blocks", SEARCH_BLOCKS, "--search_blocks", SEARCH_BLOCKS,
            "--budgets", ",".join(f"num_params <= {limit}" for limit in limits.values()),
        )  # fmt: skip
        subs = [
            one.subnetwork
            for one in choose_candidates(self.sorted, subnetworks=found / "picks.yaml")
        ]
        return fitting(subs, self.share, self.budgets)

    @functools.cached_property
    def depths(self) -> dict[int, SubNetwork]:
        """The deepest network of full width under every budget."""
        full, order = SubNetwork.from_config(self.sorted.config), self.sorted.info.layer_order
        subs = [
            replace(full, blocks=tuple(
                block if at in order[:count] else None for at, block in enumerate(full.blocks)
            ))
            for count in range(1, len(order))
        ]  # fmt: skip
        return fitting(subs, self.share, self.budgets)

    @functools.cached_property
    def latency(self) -> dict[str, float]:
        """Time of every network as a share of the whole model's, by its sizes."""
        path = self.out / self.name / "latency.json"
        if not path.exists():
            whole = SubNetwork.from_config(self.sorted.config)
            subs = [whole, *dict.fromkeys((*self.picks.values(), *self.depths.values()))]
            supernet = supernet_of(self.sorted)
            models = [supernet.standalone(sub) for sub in subs]
            tokens = collate(self.texts[1][:BATCH]).input_ids
            rounds = [timed(models, tokens, turn) for turn in range(TIMED)]
            shares = [
                statistics.median(times[at] / times[0] for times in rounds)
                for at in range(len(subs))
            ]
            path.write_text(json.dumps(dict(zip(map(str, subs), shares, strict=True)), indent=1))
        return json.loads(path.read_text())

    def slice(self, sub: SubNetwork, larger: Slice | None) -> Slice:
        """A repaired start; those from the sorted model are the same in all trainings."""
        if larger is not None:
            inside = sub.within(larger.sub)
            assert inside is not None
            start, whole = part_of(larger, sub), supernet_of(larger)
            if sub == larger.sub:
                return start
            return repaired(start, repair(whole, inside, text_of(self.texts[0])).patch)
        if sub not in _STARTS:
            patch = repair(supernet_of(self.sorted), sub, text_of(self.texts[0])).patch
            _STARTS[sub] = repaired(slice_of(self.sorted, sub), patch)
        return _STARTS[sub]


_STARTS: dict[SubNetwork, Slice] = {}


@torch.inference_mode()
def timed(models: list[Any], tokens: torch.Tensor, turn: int) -> list[float]:
    """Seconds of one forward pass of each, in another order every turn."""
    times = [0.0] * len(models)
    for at in range(len(models)):
        at = (at * (1 if turn % 2 else -1) + turn) % len(models)
        start = time.perf_counter()
        models[at](tokens)
        times[at] = time.perf_counter() - start
    return times


@torch.inference_mode()
def accuracy(supernet: SuperNetwork, samples: Any) -> float:
    """Share of the next tokens that a model ranks first."""
    right = count = 0
    supernet.model.eval()
    for start in range(0, len(samples), BATCH):
        batch = collate(samples[start : start + BATCH])
        labels = labels_of(batch)
        hidden = labelled_hidden(supernet, supernet.full, batch)
        right += int((supernet.head(supernet.full)(hidden).argmax(-1) == labels).sum())
        count += len(labels)
    return round(right / count, 4)


def fitting(subs: list[SubNetwork], share: Any, budgets: tuple[int, ...]) -> dict[int, SubNetwork]:
    """The largest network under every budget."""
    found = {}
    for budget in budgets:
        fits = [sub for sub in subs if share(sub) <= budget / 100]
        if fits:
            found[budget] = max(fits, key=share)
    return found


def trainer_options(steps: int) -> TrainerOptions:
    """So many steps on the CPU, nothing written."""
    return TrainerOptions(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=[],
        enable_progress_bar=False,
    )


def train(
    model: Model, chosen: Mapping[int, SubNetwork], cost: float, *, seed: int, cascade: bool,
    taught: bool = False, rate: float | None = None, start_from: Slice | None = None,
) -> dict[int, dict[str, Any]]:  # fmt: skip
    """Train networks one after the other with equal shares of a cost; results by budget."""
    subs = sorted(set(chosen.values()), key=model.share, reverse=True)
    samples, valid = model.texts
    trained: list[Slice] = []
    found = {}
    for number, sub in enumerate(subs):
        larger = smallest_around(sub, trained) if cascade else None
        if start_from is None:
            start = model.slice(sub, larger)
            forward = REPAIR_BLOCKS / BATCH * FORWARD * (1 + 2 * model.share(sub))  # of the repair
        else:
            start, forward = part_of(start_from, sub), 0
        per_step = model.share(sub) + FORWARD * taught
        steps = max(1, int((cost / len(subs) - forward) / per_step))
        distillation = Distillation.forward_kl if taught else Distillation.none
        options = TrainingOptions(
            loss=LossOptions(distillation=distillation, ce_weight=0.0 if taught else None),
            lora=None,
            optimizer=OptimizerOptions(lr=rate or RATES[model.name]),
            trainer=trainer_options(steps),
            validation=ValidationOptions(every_n_steps=10**6),
            batch_size=BATCH,
            seed=1000 * seed + (number if larger else 0),
        )  # fmt: skip
        done = specialise(
            options, start, samples=samples, valid=valid, teacher=model.teacher if taught else None
        )
        weights = TrainedTensors(done.supernet, start.state_dict())
        trained.append(replace(start, tensors={n: t.clone() for n, t in weights.items()}))
        before, after = (done.history[step]["full"] for step in (0, max(done.history)))
        found[sub] = {
            "share": round(model.share(sub), 3), "steps": steps, "before": before, "after": after,
            "accuracy_before": accuracy(supernet_of(start), valid),
            "accuracy": accuracy(done.supernet, valid),
            "latency": round(model.latency[str(sub)], 3),
        }  # fmt: skip
    return {budget: found[sub] for budget, sub in chosen.items()}


def together(model: Model, subs: list[SubNetwork], cost: float, *, seed: int) -> Slice:
    """The sorted model after a training of some of its networks with one set of weights."""
    mean = statistics.mean(map(model.share, subs))
    options = TrainingOptions(
        loss=LossOptions(distillation=Distillation.none),
        sandwich=SandwichOptions(num_random=PER_STEP, train_smallest=False, full_share=0.0),
        lora=None,
        optimizer=OptimizerOptions(lr=RATES[model.name]),
        trainer=trainer_options(int(cost / ((PER_STEP + 1) * mean))),
        validation=ValidationOptions(every_n_steps=10**6),
        batch_size=BATCH,
        seed=1000 * seed,
    )
    samples, valid = model.texts
    smallest = min(subs, key=model.share)
    done = train_networks(
        options,
        model.sorted,
        lambda net, _: Networks(smallest, GridSampler(tuple(subs)), {"full": net.full}),
        samples=samples,
        valid=valid,
        out_dir=None,
    )
    start = slice_of(model.sorted, SubNetwork.from_config(model.sorted.config))
    weights = TrainedTensors(done.supernet, start.state_dict())
    return replace(start, tensors={n: t.clone() for n, t in weights.items()})


def run(given: argparse.Namespace) -> None:
    """Everything that is not there yet."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    log = given.out_dir / RESULTS
    given.out_dir.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    keys = ("model", "seed", "wanted", "method", "cost")
    done = {tuple(row[key] for key in keys) for row in known}
    for name in given.models:
        budgets = WANTED[max(6, *given.wanted)]
        model = Model(name, given.out_dir.resolve(), budgets)
        for seed in given.seeds:
            for wanted in given.wanted:
                for method in given.methods:
                    if (name, seed, wanted, method, given.cost) in done:
                        continue
                    kind, _, taught = method.partition("+")
                    subs = model.depths if kind == "depth" else model.picks
                    chosen = {budget: subs[budget] for budget in WANTED[wanted] if budget in subs}
                    left = given.cost
                    if kind != "depth":
                        mean = statistics.mean(map(model.share, model.picks.values()))
                        # of every trial the evaluation and the repair
                        left -= TRIALS * SEARCH_BLOCKS / BATCH * FORWARD * (1 + 3 * mean)
                    shared = None
                    if kind == "shared":
                        left /= 2
                        shared = together(model, list(set(chosen.values())), left, seed=seed)
                    found = train(
                        model, chosen, left, seed=seed,
                        cascade=kind == "cascade", taught=bool(taught), start_from=shared,
                    )  # fmt: skip
                    row = dict(zip(keys, (name, seed, wanted, method, given.cost), strict=True))
                    row["search"] = "repaired"
                    with log.open("a") as file:
                        file.write(json.dumps({**row, "networks": found}) + "\n")
                    losses = {b: round(one["after"], 3) for b, one in sorted(found.items())}
                    print(*row.values(), losses, f"{time.process_time():.0f} s", flush=True)
    _STARTS.clear()


def report(given: argparse.Namespace) -> None:
    """Tables as Markdown: mean and half the range over seeds."""
    rows = [json.loads(line) for line in (given.out_dir / RESULTS).read_text().splitlines()]
    keys = ("model", "wanted", "cost")
    for key in sorted({tuple(row[name] for name in keys) for row in rows}):
        model, wanted, cost = key
        mine = [row for row in rows if tuple(row[name] for name in keys) == key]
        methods = [method for method in METHODS if any(row["method"] == method for row in mine)]
        budgets = list(map(str, WANTED[wanted]))
        print(f"\n{model}, {wanted} networks, {cost:g} passes in all")
        for column, words in COLUMNS.items():
            cells = {
                budget: [_cell(mine, m, budget, column) for m in methods] for budget in budgets
            }
            if not any(map(any, cells.values())):
                continue
            print(f"\n{words}\n")
            print(f"| budget | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
            for budget, line in cells.items():
                print(f"| {budget} % | {' | '.join(line)} |")


def _cell(rows: list[dict[str, Any]], method: str, budget: str, column: str) -> str:
    """Mean and half the range over the seeds of a method."""
    networks = [row["networks"].get(budget, {}) for row in rows if row["method"] == method]
    values = [network[column] for network in networks if column in network]
    if not values:
        return ""
    spread = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f} +- {spread:.3f} ({len(values)})"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("run", "report"))
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--models", nargs="+", default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--wanted", nargs="+", type=int, default=[6, 3, 1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS[:3]))
    parser.add_argument("--cost", type=float, default=600)
    given = parser.parse_args()
    (run if given.step == "run" else report)(given)


if __name__ == "__main__":
    main()
