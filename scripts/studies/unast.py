"""Which shape keeps most of a model's quality without any training, at equal parameters.

    python scripts/studies/unast.py <sorted checkpoint> <library> <out.jsonl> --search <text>
        --held_out <text> [--budgets 90 80 70 60] [--routes uniform depth widths ...]

The library is that of `nas candidates` on the checkpoint; the finer its grid, the nearer the best
uniform network comes to its budget. Shares are of the parameters inside the blocks. Networks are
chosen by their loss on the text of `--search` and reported on that of `--held_out`. Rows that are
in the output file are not computed again.

Routes: `depth` drops the least important layers, `uniform` gives all layers the same candidates,
`skips`, `attention`, `mlp`, `widths` and `everything` are integer programs over these candidates,
each as the first program has it and after every round around the best network so far.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from whittle_nas.candidates.costs import changes
from whittle_nas.candidates.library import Library, Solution, open_library
from whittle_nas.candidates.parts import ATTENTION, KINDS, MLP, Sizes, is_nothing
from whittle_nas.candidates.scoring import losses_around
from whittle_nas.data import TextData, load_blocks
from whittle_nas.evaluate.perplexity import nats_per_block
from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.search.ilp import Program, solve
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint

POOLS = ("skips", "attention", "mlp", "widths", "everything")
ROUTES = ("depth", "uniform", *POOLS)
CHANGES = (4, 8, 12, 20)
COST = "num_params_non_embedding"


@dataclass
class Study:
    """A checkpoint, its library and two texts."""

    library: Library
    net: Any
    search: Any
    held_out: Any
    rounds: int
    batch_size: int

    @cached_property
    def costs(self) -> tuple[Any, list[list[float]], float]:
        """The cost of a network, what candidates change of it, and that of the whole model."""
        cost = getattr(AnalyticCosts(self.net.config), COST)
        return cost, changes(self.library, cost), cost(self.net.full)

    def losses(self, solution: Solution, text: Any) -> tuple[float, float]:
        """Nats per token on a text, and the standard error of their difference to the whole's."""
        sub = self.library.subnetwork(solution)
        model = self.net.standalone(sub, self.library.patch(sub))
        per_token = nats_per_block(model, text, batch_size=self.batch_size) / (text.shape[1] - 1)
        apart = per_token - self.whole(text)
        return float(per_token.mean()), float(apart.std() / len(apart) ** 0.5)

    def whole(self, text: Any) -> Any:
        """Nats per token of every block in the whole model."""
        known = self.__dict__.setdefault("_whole", {})
        if id(text) not in known:
            per_block = nats_per_block(self.net.model, text, batch_size=self.batch_size)
            known[id(text)] = per_block / (text.shape[1] - 1)
        return known[id(text)]

    def around(self, solution: Solution, pool: Sequence[Sequence[bool]]) -> list[list[float]]:
        """What each neighbouring candidate of a pool changes, measured; infinite for others."""
        library = self.library
        scores = [[math.inf] * len(choices) for choices in library.candidates]
        near = {
            at: [j for j in (chosen - 1, chosen + 1) if 0 <= j < len(pool[at]) and pool[at][j]]
            for at, chosen in enumerate(solution)
        }
        sizes = {
            library.parts[at]: [library.candidates[at][j].sizes for j in js]
            for at, js in near.items()
        }
        base, losses = losses_around(
            self.net,
            library.subnetwork(solution),
            sizes,
            self.search,
            patch_of=library.block_patch,
            batch_size=self.batch_size,
        )
        for at, js in near.items():
            scores[at][solution[at]] = 0.0
            for j in js:
                one = library.candidates[at][j].sizes
                scores[at][j] = losses[library.parts[at], one] - base
        return scores


def allowed(pool: str, kind: str, j: int, sizes: Sizes) -> bool:
    """Whether a program may choose a candidate; the original always."""
    nothing = is_nothing(sizes)
    fits = {"skips": nothing, "attention": kind == ATTENTION, "mlp": kind == MLP}
    return j == 0 or fits.get(pool, pool == "everything" or not nothing)


def depth(study: Study, budget: float) -> Solution:
    """As many of the most important layers as fit, whole."""
    library, (cost, _, whole) = study.library, study.costs
    order = study.net.info.layer_order
    for kept in range(len(order), 0, -1):
        solution = tuple(
            0 if part.layer in order[:kept] else len(choices) - 1
            for part, choices in zip(library.parts, library.candidates, strict=True)
        )
        if cost(library.subnetwork(solution)) <= budget * whole:
            return solution
    raise SystemExit(f"nothing fits into {budget:.0%}")


def uniform(study: Study, budget: float) -> Solution:
    """The best of all networks with equal layers: for each attention the widest MLP that fits."""
    library, (cost, _, whole) = study.library, study.costs
    first = dict(zip(KINDS, library.candidates, strict=False))
    found = []
    for a, heads in enumerate(first[ATTENTION]):
        fitting = (
            (a, m) * (len(library.parts) // 2)
            for m, mlp in enumerate(first[MLP])
            if not is_nothing(heads.sizes) and not is_nothing(mlp.sizes)
        )
        for solution in fitting:
            if cost(library.subnetwork(solution)) <= budget * whole:
                found.append((study.losses(solution, study.search)[0], solution))
                break
    return min(found)[1]


def programs(study: Study, budget: float, pool_name: str) -> Iterator[tuple[float, Solution]]:
    """What the first program finds, then the best after every round, with its prediction."""
    library, (_, costs, whole) = study.library, study.costs
    pool = [
        [allowed(pool_name, part.kind, j, one.sizes) for j, one in enumerate(choices)]
        for part, choices in zip(library.parts, library.candidates, strict=True)
    ]
    scores = [
        [one.loss if fine else math.inf for one, fine in zip(choices, fines, strict=True)]
        for choices, fines in zip(library.candidates, pool, strict=True)
    ]

    def program(scores: list[list[float]]) -> Program:
        return Program(scores, {COST: costs}, {COST: budget * whole}, {COST: whole})

    best = solve(program(scores))
    if best is None:
        return
    base = study.losses(library.original, study.search)[0]
    loss = study.losses(best, study.search)[0]
    yield base + program(scores).score(best), best
    for _ in range(study.rounds):
        asked, near = program(study.around(best, pool)), best
        tried = {solve(asked, near=near, max_changes=most) for most in CHANGES} - {None, near}
        measured = [(study.losses(one, study.search)[0], one) for one in tried if one]
        better = min(measured, default=(loss, best))
        if better[0] >= loss:
            return
        yield loss + asked.score(better[1]), better[1]
        loss, best = better


def rows_of(study: Study, budget: float, route: str) -> Iterator[dict[str, Any]]:
    """The rows of one route, one per round of a program."""
    start = time.perf_counter()
    if route == "depth":
        found = iter([(math.nan, depth(study, budget))])
    elif route == "uniform":
        found = iter([(math.nan, uniform(study, budget))])
    else:
        found = programs(study, budget, route)
    cost, _, whole = study.costs
    for number, (predicted, solution) in enumerate(found):
        sub: SubNetwork = study.library.subnetwork(solution)
        held_out, stderr = study.losses(solution, study.held_out)
        yield {
            "budget": budget,
            "route": route,
            "round": number,
            "share": cost(sub) / whole,
            "predicted": predicted,
            "search_loss": study.losses(solution, study.search)[0],
            "held_out": held_out,
            "stderr_of_rise": stderr,
            "whole": float(study.whole(study.held_out).mean()),
            "seconds": time.perf_counter() - start,
            "subnetwork": sub.to_dict(),
        }


def main() -> None:
    """Append the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "library", "out"):
        parser.add_argument(name, type=Path)
    for name in ("search", "held_out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
        parser.add_argument(f"--{name}_column", default="text")
        parser.add_argument(f"--{name}_blocks", type=int, default=16)
        parser.add_argument(f"--{name}_skip", type=int, default=0)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--budgets", type=float, nargs="+", default=[90, 80, 70, 60])
    parser.add_argument("--routes", nargs="+", default=ROUTES, choices=ROUTES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4)
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.checkpoint)

    def text(name: str) -> Any:
        skip = getattr(given, f"{name}_skip")
        data = TextData(
            files=[getattr(given, name)],
            column=getattr(given, f"{name}_column"),
            num_blocks=skip + getattr(given, f"{name}_blocks"),
            block_size=given.block_size,
        )
        return load_blocks(data, checkpoint.path, config=checkpoint.config).tokens[skip:]

    study = Study(
        open_library(given.library, checkpoint),
        load_supernet(checkpoint.path),
        text("search"),
        text("held_out"),
        given.rounds,
        given.batch_size,
    )
    done = [json.loads(line) for line in given.out.open()] if given.out.is_file() else []
    known = {(row["budget"], row["route"]) for row in done}
    for budget in given.budgets:
        for route in given.routes:
            if (budget / 100, route) in known:
                continue
            rows = list(rows_of(study, budget / 100, route))
            with given.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            done += rows
    for row in done:
        print(
            f"{row['budget']:.0%} {row['route']:<10} round {row['round']}  {row['share']:.1%}  "
            f"predicted {row['predicted']:.3f}  searched {row['search_loss']:.3f}  held out "
            f"{row['held_out']:.3f} (whole {row['whole']:.3f}, s.e. of the rise "
            f"{row['stderr_of_rise']:.3f})"
        )


if __name__ == "__main__":
    main()
