"""Super-network, specialised networks or networks alone: fronts at equal total cost.

    python scripts/studies/front.py run <out_dir> <model> <seed> <variant> <cost>
    python scripts/studies/front.py report <out_dir>

`variant` is `new` (rotated where that is exact, repaired, taught by the frozen original, fitted
space) or `plain` (an order, cross entropy, the space `aligned`). `cost` is what a method may spend
in all, for however many networks are wanted, in forward and backward passes of the whole model over
a batch of 8 x 256 tokens; a forward pass alone is a third, and a sub-network costs its share of the
parameters. Sorting costs all methods the same and is left out. Finished stages are kept.

Methods, for 1, 3, 6 and 12 wanted networks:
    start         the best of a search over the sorted model, (repaired,) not trained
    supernet      everything on the super-network; a search; its choices as they are
    specialised   half on the super-network; a search; the rest on its choices, one by one
    alone         a search over the sorted model; everything on its choices, one by one
    depth         networks that only lack layers; everything on them, one by one
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
WANTED = {1: (60,), 3: (50, 70, 90), 6: tuple(range(40, 91, 10)), 12: tuple(range(40, 96, 5))}
ALL = WANTED[12]
TRIALS, SEARCH_BLOCKS, BATCH = 48, 32, 8
BOUND = 0.5  # so that the fitted space reaches down to the smallest budget
TIED = ("stories260K",)  # whose head a rotation unties: an eighth more parameters for nothing
RATES = {"stories260K": 2e-3, "babyllama-char361": 2e-4}
FORWARD = 1 / 3


@dataclass(frozen=True)
class Run:
    """One model, seed and variant."""

    out: Path
    model: str
    seed: int
    variant: str
    cost: float

    @property
    def is_new(self) -> bool:
        """Whether the new start, teacher and space are used."""
        return self.variant == "new"

    @property
    def dir(self) -> Path:
        """Where its stages are."""
        return self.out / self.model / str(self.seed) / self.variant

    @property
    def original(self) -> Path:
        """The checkpoint as it came in, whose parameters the budgets are shares of."""
        return DATA / "checkpoints" / self.model

    @property
    def whole(self) -> int:
        """Its number of parameters."""
        return whole_size(self.original)

    @property
    def text(self) -> list[str]:
        """Options of the training data; what is validated is the test text."""
        train, test = (str(DATA / "tinystories" / f"{part}.jsonl") for part in ("train", "test"))
        return [
            "--data.files",
            train,
            "--data.block_size",
            "256",
            "--valid.files",
            test,
            "--valid.block_size",
            "256",
        ]

    def stage(self, path: Path, *command: Any) -> Path:
        """Run a command that writes `path`, unless it has."""
        if not (path / "run.yaml").is_file():
            from whittle_nas.__main__ import main

            path.parent.mkdir(parents=True, exist_ok=True)
            words = [*map(str, command), "--out_dir", str(path), "--overwrite", "true"]
            print("--", path, flush=True)
            with (
                (path.parent / f"{path.name}.log").open("w") as log,
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
            ):
                code = main(words)
            if code:
                raise SystemExit(f"{path}: status {code}, see {log.name}")
        return path

    def sorted(self) -> Path:
        """The sorted checkpoint."""
        basis = "auto" if self.is_new and self.model not in TIED else "permutation"
        return self.stage(
            self.dir / "sorted", "importance",
            "--checkpoint_dir", self.original, "--basis", basis,
            "--data.files", DATA / "tinystories" / "train.jsonl", "--data.num_blocks", 64,
            "--data.seed", self.seed, "--sweep.bound", BOUND,
        )  # fmt: skip

    def recipe(self, steps: int) -> list[Any]:
        """Options of every training."""
        loss = ["--sandwich.full_weight", 1]
        loss += [] if self.is_new else ["--loss.distillation", "none"]
        return [
            "--lora", "null", "--optimizer.lr", RATES[self.model], "--optimizer.warmup_steps", 10,
            "--trainer.gradient_clip_val", 1, "--batch_size", BATCH, "--trainer.max_steps", steps,
            "--trainer.max_epochs", 1000, "--trainer.accelerator", "cpu", "--trainer.logger", "[]",
            "--trainer.enable_progress_bar", "false", "--validation.num_samples", 64,
            "--validation.every_n_steps", 10**6, "--trainer.checkpoint_every_n_steps", 10**6,
            "--seed", self.seed, *self.text, *loss,
        ]  # fmt: skip

    def supernet(self, name: str, cost: float) -> Path:
        """A super-network trained for a cost."""
        start = self.sorted()
        sizes = members(start, self.is_new)
        full, smallest, mean = 1.0, sizes[0], sum(sizes) / len(sizes)
        per_step = full + smallest + 2 * mean + FORWARD * self.is_new
        sampler = ["--sampler.kind", "pareto" if self.is_new else "random"]
        return self.stage(
            self.dir / name, "finetune", "--checkpoint_dir", start,
            *self.recipe(max(1, int(cost / per_step))), *sampler, "--validation.num_networks", 2,
        )  # fmt: skip

    def picks(self, checkpoint: Path) -> tuple[dict[int, Any], float]:
        """The best under every budget by a search on validation text, and what it cost."""
        found = self.stage(
            checkpoint.parent / f"{checkpoint.name}_search", "search",
            "--checkpoint_dir", checkpoint, "--num_trials", TRIALS, "--seed", self.seed,
            "--data.files", DATA / "tinystories" / "valid.jsonl", "--data.block_size", 256,
            "--data.num_blocks", SEARCH_BLOCKS, "--search_blocks", SEARCH_BLOCKS,
        )  # fmt: skip
        entries = json.loads((found / "front.json").read_text())["front"]
        whole, share = self.whole, sum(members(checkpoint, self.is_new)[:]) / 64
        cost = TRIALS * SEARCH_BLOCKS / BATCH * FORWARD * share
        chosen = {}
        for budget in ALL:
            fits = [e for e in entries if e["metrics"]["num_params"] <= whole * budget / 100]
            if fits:
                chosen[budget] = min(fits, key=lambda e: e["metrics"]["val_loss"])["subnetwork"]
        return chosen, cost

    def tune(self, name: str, start: Path, chosen: dict[int, Any], cost: float) -> dict[int, Any]:
        """Train networks one by one with equal shares of a cost; losses by budget."""
        distinct = {json.dumps(sub, sort_keys=True): sub for sub in chosen.values()}
        found = {}
        for number, (key, sub) in enumerate(distinct.items()):
            share = size_of(start, sub)
            per_step = share + FORWARD * self.is_new
            steps = max(1, int(cost / len(distinct) / per_step))
            picks = self.dir / name / f"{number}.yaml"
            picks.parent.mkdir(parents=True, exist_ok=True)
            picks.write_text(yaml.safe_dump([{"name": "network", **sub}]))
            path = self.stage(
                self.dir / name / str(number), "finetune", "--checkpoint_dir", start,
                "--subnetworks", picks, *self.recipe(steps),
                *self.with_teacher(),
            )  # fmt: skip
            history = yaml.safe_load((path / "network" / "losses.yaml").read_text())
            losses = history["nats_per_token"]
            found[key] = {
                "params": share, "before": losses[0]["full"], "after": losses[max(losses)]["full"]
            }  # fmt: skip
            for heavy in (path / "network").glob("*.pth"):
                heavy.unlink()
        return {budget: found[json.dumps(sub, sort_keys=True)] for budget, sub in chosen.items()}

    def with_teacher(self) -> list[Any]:
        """A network that is trained alone learns from the checkpoint as it once came in."""
        return ["--repair", "true", "--loss.teacher", self.original] if self.is_new else []

    def as_they_are(self, name: str, checkpoint: Path, chosen: dict[int, Any]) -> dict[int, Any]:
        """Losses of sub-networks of a checkpoint that nobody trains further."""
        from whittle_nas.data import TextData, load_blocks
        from whittle_nas.evaluate.perplexity import nats_per_token
        from whittle_nas.weights.checkpoint import load_supernet

        path = self.dir / f"{name}.json"
        if path.is_file():
            return {int(budget): found for budget, found in json.loads(path.read_text()).items()}
        supernet = load_supernet(checkpoint)
        test = TextData(files=DATA / "tinystories" / "test.jsonl", block_size=256, num_blocks=64)
        tokens = load_blocks(test, checkpoint, config=supernet.config).tokens
        found = {}
        for budget, sizes in chosen.items():
            sub = named(checkpoint, sizes)
            loss = nats_per_token(supernet.standalone(sub), tokens)
            found[budget] = {"params": size_of(checkpoint, sizes), "after": loss}
        path.write_text(json.dumps(found))
        return found

    def write(self) -> None:
        """Everything, into `results.json`."""
        start = self.sorted()
        chosen, search_cost = self.picks(start)
        found: dict[str, Any] = {"start": self.as_they_are("start", start, chosen)}
        trained = self.supernet("supernet", self.cost - search_cost)
        own, _ = self.picks(trained)
        found["supernet"] = self.as_they_are("supernet_choices", trained, own)
        half = self.supernet("half", self.cost / 2)
        shared, _ = self.picks(half)
        depth = self.depths(start)
        for number, budgets in WANTED.items():
            left = self.cost - search_cost
            for name, begin, subs, cost in (
                ("specialised", half, shared, left - self.cost / 2),
                ("alone", start, chosen, left),
                ("depth", start, depth, self.cost),
            ):
                wanted = {b: subs[b] for b in budgets if b in subs}
                label = f"{name}_{number}"
                found[label] = self.tune(label, begin, wanted, cost)
                (self.dir / "results.json").write_text(json.dumps(found, indent=1))

    def depths(self, checkpoint: Path) -> dict[int, Any]:
        """The deepest network of full width under every budget."""
        layers = range(1, config_of(checkpoint).n_layer)
        subs = [{"n_layer": count} for count in layers]
        sizes = [100 * size_of(checkpoint, sub) for sub in subs]
        return {
            budget: subs[max(i for i, size in enumerate(sizes) if size <= budget)]
            for budget in ALL
            if min(sizes) <= budget
        }


def config_of(checkpoint: Path) -> Any:
    """litgpt's configuration."""
    from litgpt import Config

    return Config.from_file(checkpoint / "model_config.yaml")


def counter(checkpoint: Path) -> tuple[Callable[[Any], int], Any]:
    """Counts sub-networks; and the checkpoint."""
    from whittle_nas.weights.checkpoint import open_checkpoint
    from whittle_nas.weights.counting import parameter_counter

    opened = open_checkpoint(checkpoint)
    return parameter_counter(opened.config), opened


def whole_size(checkpoint: Path) -> int:
    """Parameters of the whole model."""
    from whittle_nas.space import SubNetwork

    count, opened = counter(checkpoint)
    return count(SubNetwork.from_config(opened.config))


def named(checkpoint: Path, sizes: Any) -> Any:
    """The sub-network of sizes, as the commands read them."""
    from whittle_nas.cli.candidates import choose_candidates

    path = checkpoint.parent / f"{checkpoint.name}_sizes.yaml"
    path.write_text(yaml.safe_dump([sizes]))
    (found,) = choose_candidates(counter(checkpoint)[1], subnetworks=path)
    return found.subnetwork


def size_of(checkpoint: Path, sizes: Any) -> float:
    """A sub-network's share of the parameters."""
    return counter(checkpoint)[0](named(checkpoint, sizes)) / whole_size(checkpoint)


def members(checkpoint: Path, fitted: bool) -> list[float]:
    """Shares of the parameters of 64 random members of the space, ascending."""
    import random

    from whittle_nas.cli.selection import space_of

    count, opened = counter(checkpoint)
    space, rng = space_of(opened, None if fitted else "aligned"), random.Random(0)
    whole = whole_size(checkpoint)
    return sorted(count(space.sample(rng)) / whole for _ in range(64))


def report(out: str) -> None:
    """Tables of all results as Markdown, mean over seeds."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for path in sorted(Path(out).glob("*/*/*/results.json")):
        groups.setdefault((path.parts[-4], path.parts[-2]), []).append(json.loads(path.read_text()))
    for (model, variant), found in groups.items():
        print(f"\n### {model}, {variant}, {len(found)} seeds: held-out nats per token\n")
        names = list(found[0])
        print(f"| budget | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for budget in map(str, ALL):
            cells = []
            for name in names:
                kept = [one[name] for one in found if budget in one.get(name, {})]
                values = [curve[budget]["after"] for curve in kept]
                cells.append(f"{sum(values) / len(values):.3f}" if values else "")
            print(f"| {budget} % | {' | '.join(cells)} |")


if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    if step == "report":
        report(*arguments)
    else:
        out_dir, name, seed, variant, cost = arguments
        Run(Path(out_dir).resolve(), name, int(seed), variant, float(cost)).write()
