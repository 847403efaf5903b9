"""Which training wins: fronts at equal total cost, for 1, 3, 6 and 12 wanted networks.

    python scripts/studies/front.py run <out_dir> [--models ...] [--seeds 1 2 3] [--wanted 6 3 1]
                                        [--methods ...] [--recipes ...] [--cost 480]
    python scripts/studies/front.py report <out_dir>

`--cost` is what a method may spend in all, in forward and backward passes of the whole model over a
batch of 8 x 128 tokens, for however many networks are wanted; a sub-network costs its share of the
parameters, a forward pass alone a third. Searches, the repair of every start and a teacher are paid
from it. Sorting costs all methods the same and is left out, and is done once, as is a search of the
sorted model: seeds differ in the order of the text. Every finished training is a line of
`front.jsonl`, which is not run again. A line has of every network its loss and the share of next
tokens that it ranks first, before and after, and its latency as a share of the whole model's: a
forward pass of 8 x 128 tokens, all shapes of a model in turn in one measurement.

Methods:
    shrinking    largest first, each searched for inside the trained one before it, and cut from it
    alone        the picks of a search, each from its slice
    cascade      the same, largest first, each from the smallest trained one that it is a part of
    shared       half of the cost trains all picks at once in one set of weights (a super-network
                 whose other members nobody wants), the other half each alone from its part of them
    supernet     a super-network of the whole space; a search of it; its choices as they are
    specialised  half of the cost on such a super-network; a search; then each choice alone
    depth        networks that only lack layers, each from its slice; no search
Recipes:
    plain        an order of the weights, slices as they are, cross entropy
    new          rotated where that is exact, repaired, cross entropy
    taught       the same, with the frozen original as teacher and the default mix of losses
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from whittle_nas.cli.candidates import choose_candidates
from whittle_nas.cli.selection import space_of
from whittle_nas.data import TextData
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.repair.engine import repair
from whittle_nas.search.shrinking import Shrinking
from whittle_nas.space import SubNetwork
from whittle_nas.space.samplers import GridSampler
from whittle_nas.train.batches import collate
from whittle_nas.train.choices import SamplerOptions, SandwichOptions, ValidationOptions
from whittle_nas.train.forward import labelled_hidden, labels_of
from whittle_nas.train.options import Distillation, LossOptions, OptimizerOptions, TrainerOptions
from whittle_nas.train.prepare import TrainedTensors
from whittle_nas.train.run import Networks, TrainingOptions
from whittle_nas.train.run import train as train_networks
from whittle_nas.train.sampling import make_sampler, mean_loss
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
from whittle_nas.weights.checkpoint import (
    Checkpoint,
    open_checkpoint,
    supernet_of,
    write_checkpoint,
)
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.files import atomic_directory
from whittle_nas.weights.supernet import SuperNetwork

Finder = Callable[[list[Slice]], tuple[SubNetwork, float]]
DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
WANTED = {1: (60,), 3: (50, 70, 90), 6: (40, 50, 60, 70, 80, 90), 12: tuple(range(35, 91, 5))}
BLOCK, BATCH, TRIALS, SEARCH_BLOCKS, REPAIR_BLOCKS = 128, 8, 48, 16, 64
TIMED = 60  # runs of every shape
INSIDE, INSIDE_REPAIRED, INSIDE_BLOCKS = 8, 3, 8  # networks tried inside a trained one, on how much
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
METHODS = ("shrinking", "cascade", "alone", "depth", "shared", "supernet", "specialised")
RECIPES = ("new", "plain", "taught")
RESULTS = "front.jsonl"
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
    recipe: str

    @property
    def is_repaired(self) -> bool:
        """Whether slices are."""
        return self.recipe != "plain"

    @property
    def is_taught(self) -> bool:
        """Whether there is a teacher."""
        return self.recipe == "taught"

    @property
    def dir(self) -> Path:
        """Where its stages are: a teacher changes nothing before a training."""
        return self.out / self.name / ("new" if self.is_repaired else "plain")

    @functools.cached_property
    def sorted(self) -> Checkpoint:
        """The sorted checkpoint."""
        basis = "permutation" if self.name in TIED or not self.is_repaired else "auto"
        return open_checkpoint(nas(
            self.dir / "sorted", "importance",
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
    def space(self) -> Path:
        """The file of the search space."""
        path = self.dir / "space.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(SPACES[self.name]))
        return path

    def search_cost(self, *, is_repaired: bool) -> float:
        """Of every trial its evaluation, and its repair and that of the whole model's outputs."""
        mean = statistics.mean(map(self.share, self.picks.values()))
        return TRIALS * SEARCH_BLOCKS / BATCH * FORWARD * ((1 + 3 * mean) if is_repaired else mean)

    @functools.cached_property
    def picks(self) -> dict[int, SubNetwork]:
        """The best of the sorted model under each budget."""
        return self.search(self.sorted.path, self.dir / "search", is_repaired=self.is_repaired)

    def search(self, checkpoint: Path, out: Path, *, is_repaired: bool) -> dict[int, SubNetwork]:
        """The best under each budget, nested where that costs little."""
        text = DATA / "tinystories"
        repaired = [
            "--repair", "true", "--calibration.files", text / "train.jsonl",
            "--calibration.block_size", BLOCK, "--calibration.num_blocks", SEARCH_BLOCKS,
        ]  # fmt: skip
        whole = parameter_counter(self.original.config)(
            SubNetwork.from_config(self.original.config)
        )
        limits = [int(whole * budget / 100) for budget in self.budgets]
        found = nas(
            out, "search", "--checkpoint_dir", checkpoint,
            "--num_trials", TRIALS, "--seed", 1, "--nested", "true",
            *(repaired if is_repaired else []), "--search_space", self.space,
            "--data.files", text / "valid.jsonl", "--data.block_size", BLOCK,
            "--data.num_blocks", SEARCH_BLOCKS, "--search_blocks", SEARCH_BLOCKS,
            "--budgets", ",".join(f"num_params <= {limit}" for limit in limits),
        )  # fmt: skip
        chosen = choose_candidates(self.sorted, subnetworks=found / "picks.yaml")
        return fitting([one.subnetwork for one in chosen], self.share, self.budgets)

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

    def latency(self, sub: SubNetwork) -> float:
        """Time of a network as a share of the whole one's; with it all known ones are timed."""
        path = self.dir / "latency.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if str(sub) not in known:
            whole = SubNetwork.from_config(self.sorted.config)
            new = {sub, *self.picks.values(), *self.depths.values()}
            subs = [whole, *(one for one in new if str(one) not in known)]
            supernet = supernet_of(self.sorted)
            models = [supernet.standalone(one) for one in subs]
            tokens = collate(self.texts[1][:BATCH]).input_ids
            rounds = [timed(models, tokens, turn) for turn in range(TIMED)]
            for at, one in enumerate(subs):
                share = statistics.median(times[at] / times[0] for times in rounds)
                known[str(one)] = round(share, 3)
            path.write_text(json.dumps(known, indent=1))
        return known[str(sub)]

    @functools.cached_property
    def starts(self) -> dict[SubNetwork, Slice]:
        """Slices of the sorted model, which are the same in all trainings."""
        return {}

    def repair_cost(self, sub: SubNetwork, around: float, blocks: int) -> float:
        """Of a network that is cut from one of a share `around`."""
        return blocks / BATCH * FORWARD * (around + 2 * self.share(sub))

    def slice(self, sub: SubNetwork, larger: Slice | None, blocks: int = REPAIR_BLOCKS) -> Slice:
        """A start, repaired on so many blocks if the recipe says so."""
        if larger is None and blocks == REPAIR_BLOCKS and sub in self.starts:
            return self.starts[sub]
        start = part_of(larger, sub) if larger else slice_of(self.sorted, sub)
        inside = sub.within(larger.sub) if larger else sub
        assert inside is not None
        if self.is_repaired and blocks and not (larger and sub == larger.sub):
            text = text_of(self.texts[0])[:blocks]
            patch = repair(supernet_of(larger or self.sorted), inside, text).patch
            start = repaired(start, patch)
        if larger is None and blocks == REPAIR_BLOCKS:
            self.starts[sub] = start
        return start


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


def options_of(model: Model, steps: int, seed: int, **others: Any) -> TrainingOptions:
    """Of every training."""
    taught = Distillation.forward_kl if model.is_taught else Distillation.none
    return TrainingOptions(
        loss=LossOptions(distillation=taught),
        lora=None,
        optimizer=OptimizerOptions(lr=RATES[model.name]),
        trainer=trainer_options(steps),
        validation=ValidationOptions(every_n_steps=10**6),
        batch_size=BATCH,
        seed=seed,
        **others,
    )


def one_by_one(
    model: Model, finders: Sequence[Finder], cost: float, *, seed: int, cascade: bool,
    start_from: Slice | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train networks one after the other, largest first, with equal shares of a cost.

    Args:
        model: which model.
        finders: each gives the next network and what it cost to find it.
        cost: of all.
        seed: of the order of the text.
        cascade: whether each starts from the smallest trained one that it is a part of.
        start_from: a super-network whose parts they start from; None: slices of the sorted model.
    """
    samples, valid = model.texts
    trained: list[Slice] = []
    found = []
    for number, find in enumerate(finders):
        sub, spent = find(trained)
        if trained and sub == trained[-1].sub:  # the one before it is under this budget as well
            found.append(found[-1])
            continue
        larger = smallest_around(sub, trained) if cascade else None
        if start_from is None:
            start = model.slice(sub, larger)
            spent += model.repair_cost(sub, 1.0, REPAIR_BLOCKS) * model.is_repaired
        else:
            start = part_of(start_from, sub)
        per_step = model.share(sub) + FORWARD * model.is_taught
        steps = max(1, int((cost / len(finders) - spent) / per_step))
        done = specialise(
            options_of(model, steps, 1000 * seed + (number if larger else 0)),
            start,
            samples=samples,
            valid=valid,
            teacher=model.teacher if model.is_taught else None,
        )
        weights = TrainedTensors(done.supernet, start.state_dict())
        trained.append(replace(start, tensors={n: t.clone() for n, t in weights.items()}))
        before, after = (done.history[step]["full"] for step in (0, max(done.history)))
        found.append({
            "share": round(model.share(sub), 3), "steps": steps, "before": before, "after": after,
            "accuracy_before": accuracy(supernet_of(start), valid),
            "accuracy": accuracy(done.supernet, valid),
            "latency": model.latency(sub),
        })  # fmt: skip
    return found


def chosen_ones(
    model: Model, chosen: Mapping[int, SubNetwork], cost: float, **how: Any
) -> dict[int, dict[str, Any]]:
    """`one_by_one` with networks that are known before; results by budget."""
    subs = sorted(set(chosen.values()), key=model.share, reverse=True)
    finders = [functools.partial(lambda sub, _trained: (sub, 0.0), sub) for sub in subs]
    found = dict(zip(subs, one_by_one(model, finders, cost, **how), strict=True))
    return {budget: found[sub] for budget, sub in chosen.items()}


def shrunk(model: Model, budgets: tuple[int, ...], cost: float, seed: int) -> dict[int, Any]:
    """`one_by_one` with networks that are searched for inside the one before; by budget."""
    space, count = space_of(model.sorted, str(model.space)), parameter_counter(model.sorted.config)
    whole = parameter_counter(model.original.config)(SubNetwork.from_config(model.original.config))
    shrinking = Shrinking.of(
        space,
        {f"b{budget}": f"num_params <= {int(whole * budget / 100)}" for budget in budgets},
        lambda sub, _: count(sub),
        candidates=INSIDE,
        seed=seed,
    )
    samples, _ = model.texts

    def find(name: str, trained: list[Slice]) -> tuple[SubNetwork, float]:
        larger = trained[-1] if trained else None
        around = larger.sub if larger else space.full
        losses: dict[SubNetwork, float] = {}
        spent = 0.0
        members = shrinking.members(name, around)
        if larger is not None and members == [around]:
            return around, spent
        for repaired_too in (False, True)[: 1 + model.is_repaired]:
            losses = {}
            for sub in members:
                start = model.slice(sub, larger, INSIDE_BLOCKS if repaired_too else 0)
                net = supernet_of(start)
                losses[sub] = mean_loss(net, net.full, samples[-INSIDE_BLOCKS:])
                spent += INSIDE_BLOCKS / BATCH * FORWARD * model.share(sub)
                around_share = model.share(around)
                spent += model.repair_cost(sub, around_share, INSIDE_BLOCKS) * repaired_too
            members = sorted(losses, key=losses.__getitem__)[:INSIDE_REPAIRED]
        return min(losses, key=losses.__getitem__), spent

    finders = [functools.partial(find, name) for name in shrinking.names]
    found = one_by_one(model, finders, cost, seed=seed, cascade=True)
    return {int(name[1:]): one for name, one in zip(shrinking.names, found, strict=True)}


def as_they_are(start: Slice, model: Model, chosen: dict[int, SubNetwork]) -> dict[int, Any]:
    """Networks of a super-network that nobody trains further."""
    _, valid = model.texts
    found = {}
    for sub in set(chosen.values()):
        supernet = supernet_of(part_of(start, sub))
        tokens = torch.stack([torch.cat([one.input_ids, one.labels[-1:]]) for one in valid])
        found[sub] = {
            "share": round(model.share(sub), 3),
            "after": nats_per_token(supernet.model, tokens),
            "accuracy": accuracy(supernet, valid),
            "latency": model.latency(sub),
        }
    return {budget: found[sub] for budget, sub in chosen.items()}


def together(model: Model, cost: float, *, seed: int, members: Sequence[SubNetwork] = ()) -> Slice:
    """The sorted model after a training of its networks with one set of weights.

    Args:
        model: which model.
        cost: of the training.
        seed: of the order of the text.
        members: the only ones that are trained, the whole network not; else those of the space, by
            the rule that `nas finetune` has by default.
    """
    space = space_of(model.sorted, str(model.space))
    if members:
        sandwich = SandwichOptions(num_random=PER_STEP, train_smallest=False, full_share=0.0)
        sampler, smallest = GridSampler(tuple(members)), min(members, key=model.share)
    else:
        sandwich, smallest = SandwichOptions(), space.smallest
        whole = supernet_of(model.sorted)
        sampler, _ = make_sampler(SamplerOptions(), space, whole, seed=seed)
    drawn = sampler.sample(random.Random(0), 64)
    full, small = sandwich.full_share, sandwich.smallest_share * sandwich.train_smallest
    random_ones = sandwich.num_random + (1 - full) + sandwich.train_smallest - small
    per_step = full + small * model.share(smallest) + FORWARD * model.is_taught
    per_step += random_ones * statistics.mean(map(model.share, drawn))
    options = options_of(model, max(1, int(cost / per_step)), 1000 * seed, sandwich=sandwich)
    samples, valid = model.texts
    done = train_networks(
        options,
        model.sorted,
        lambda net, _: Networks(smallest, sampler, {"full": net.full}),
        samples=samples,
        valid=valid,
        out_dir=None,
    )
    start = slice_of(model.sorted, SubNetwork.from_config(model.sorted.config))
    weights = TrainedTensors(done.supernet, start.state_dict())
    return replace(start, tensors={n: t.clone() for n, t in weights.items()})


def networks_of(
    model: Model, method: str, wanted: int, cost: float, seed: int
) -> dict[int, dict[str, Any]]:
    """What a method makes of a cost; results by budget."""

    def of(subs: Mapping[int, SubNetwork]) -> dict[int, SubNetwork]:
        return {budget: subs[budget] for budget in WANTED[wanted] if budget in subs}

    if method == "depth":
        return chosen_ones(model, of(model.depths), cost, seed=seed, cascade=False)
    if method == "shrinking":
        return shrunk(model, WANTED[wanted], cost, seed)
    if method in ("alone", "cascade", "shared"):
        cost -= model.search_cost(is_repaired=model.is_repaired)
        chosen = of(model.picks)
        if method != "shared":
            return chosen_ones(model, chosen, cost, seed=seed, cascade=method == "cascade")
        shared = together(model, cost / 2, seed=seed, members=list(set(chosen.values())))
        return chosen_ones(model, chosen, cost / 2, seed=seed, cascade=False, start_from=shared)
    cost -= model.search_cost(is_repaired=False)
    trained = together(model, cost / 2 if method == "specialised" else cost, seed=seed)
    folder = model.dir / f"{method}-{model.recipe}-{seed}-{cost:.0f}"
    if not (folder / "trained").is_dir():
        with atomic_directory(folder / "trained") as made:
            write_checkpoint(
                made, trained.tensors, config=trained.config, source=model.sorted.path,
                info=trained.info,
            )  # fmt: skip
    chosen = of(model.search(folder / "trained", folder / "search", is_repaired=False))
    if method == "supernet":
        return as_they_are(trained, model, chosen)
    return chosen_ones(model, chosen, cost / 2, seed=seed, cascade=False, start_from=trained)


def run(given: argparse.Namespace) -> None:
    """Everything that is not there yet."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    log = given.out_dir / RESULTS
    given.out_dir.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    keys = ("model", "seed", "wanted", "method", "recipe", "cost")
    done = {tuple(row[key] for key in keys) for row in known}
    for name in given.models:
        for recipe in given.recipes:
            model = Model(name, given.out_dir.resolve(), WANTED[max(6, *given.wanted)], recipe)
            for seed in given.seeds:
                for wanted in given.wanted:
                    for method in given.methods:
                        key = (name, seed, wanted, method, recipe, given.cost)
                        if key in done:
                            continue
                        found = networks_of(model, method, wanted, given.cost, seed)
                        row = {**dict(zip(keys, key, strict=True)), "networks": found}
                        with log.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        losses = {b: round(one["after"], 3) for b, one in sorted(found.items())}
                        print(*key, losses, f"{time.process_time():.0f} s", flush=True)


def report(given: argparse.Namespace) -> None:
    """Tables as Markdown: mean and half the range over seeds."""
    rows = [json.loads(line) for line in (given.out_dir / RESULTS).read_text().splitlines()]
    keys = ("model", "recipe", "wanted", "cost")
    for key in sorted({tuple(row[name] for name in keys) for row in rows}):
        model, recipe, wanted, cost = key
        mine = [row for row in rows if tuple(row[name] for name in keys) == key]
        methods = [method for method in METHODS if any(row["method"] == method for row in mine)]
        budgets = list(map(str, WANTED[wanted]))
        print(f"\n### {model}, {recipe}, {wanted} networks, {cost:g} passes in all")
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
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--cost", type=float, default=480)
    given = parser.parse_args()
    (run if given.step == "run" else report)(given)


if __name__ == "__main__":
    main()
