"""Which shape keeps most of a model's quality without any training, at equal parameters.

    python scripts/studies/unast.py <sorted checkpoint> <library> <out.jsonl> --search <text>
        --held_out <text> [--budgets 90 80 70 60] [--routes uniform depth widths ...]

The library is that of `nas candidates` on the checkpoint; the finer its grid, the nearer the best
uniform network comes to its budget. Shares are of the parameters inside the blocks. Networks are
chosen by their loss on the text of `--search` and reported on that of `--held_out`. Rows that are
in the output file are not computed again.

Routes: `depth` drops the least important layers, `shortgpt`, `shortened_llama` and
`shortened_llama_taylor` those that these methods of `nas prune` name on the text of `--search`
(Taylor+ protects the first and the last layer). `uniform` gives all layers the same candidates.
`skips`, `attention`, `mlp`, `widths`, `linear` and `everything` are integer programs over these
candidates, each as the first program has it and after every round around the best network so far.
`half_attention` and `half_mlp` give every attention, or every MLP, its candidate of about half the
size, whatever the budget.

`--beside` and `--beside_route` add the difference to the row of the same budget in another file, of
another route, or both, with the standard error of its mean over blocks.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from whittle_nas.candidates.costs import changes
from whittle_nas.candidates.library import Library, Solution, open_library
from whittle_nas.candidates.parts import ATTENTION, KINDS, MLP, Sizes, form_of, is_nothing
from whittle_nas.candidates.scoring import losses_around
from whittle_nas.data import TextData, load_blocks
from whittle_nas.evaluate.perplexity import nats_per_block
from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.prune.shortened_llama import shortened_llama, shortened_llama_taylor
from whittle_nas.prune.shortgpt import shortgpt
from whittle_nas.search.ilp import Program, solve
from whittle_nas.space.subnetwork import LINEAR, SubNetwork
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint

POOLS = ("skips", "attention", "mlp", "widths", "everything")
ROUTES = ("depth", "uniform", *POOLS)
HALVES = {"half_attention": ATTENTION, "half_mlp": MLP}
DROPS = ("depth", "shortgpt", "shortened_llama", "shortened_llama_taylor")
MORE = (*DROPS[1:], "linear", *HALVES)
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
        per_token = self.per_block(solution, text)
        apart = per_token - self.per_block(self.library.original, text)
        return float(per_token.mean()), float(apart.std() / len(apart) ** 0.5)

    def per_block(self, solution: Solution, text: Any) -> Any:
        """Nats per token of every block in a network."""
        known = self.__dict__.setdefault("_known", {})
        if (solution, id(text)) not in known:
            sub = self.library.subnetwork(solution)
            model = self.net.standalone(sub, self.library.patch(sub))
            per_block = nats_per_block(model, text, batch_size=self.batch_size)
            known[solution, id(text)] = per_block / (text.shape[1] - 1)
        return known[solution, id(text)]

    def around(self, solution: Solution, pool: Sequence[Sequence[bool]]) -> list[list[float]]:
        """What each neighbouring candidate of a pool changes, measured; infinite for others."""
        library = self.library
        scores = [[math.inf] * len(choices) for choices in library.candidates]
        near = {}
        for at, chosen in enumerate(solution):
            ways = range(chosen - 1, -1, -1), range(chosen + 1, len(pool[at]))
            near[at] = [j for way in ways for j in self._next(at, way, pool[at])]
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

    def _next(self, at: int, way: Sequence[int], pool: Sequence[bool]) -> Iterator[int]:
        """The next candidate of a pool, and on from linear maps to the next plain one."""
        for j in way:
            if pool[j]:
                yield j
                if not form_of(self.library.candidates[at][j].sizes):
                    return


def allowed(pool: str, kind: str, j: int, sizes: Sizes) -> bool:
    """Whether a program may choose a candidate; the original always."""
    nothing = is_nothing(sizes)
    fits = {
        "skips": nothing,
        "attention": kind == ATTENTION,
        "mlp": kind == MLP,
        "linear": form_of(sizes) == LINEAR,
        "widths": not nothing and not form_of(sizes),
    }
    return j == 0 or fits.get(pool, True)


def keepers(study: Study, route: str, kept: int) -> Sequence[int]:
    """The layers that stay."""
    order, model = study.net.info.layer_order, study.net.model
    if route == "depth":
        return order[:kept]
    drop = len(order) - kept
    if route == "shortgpt":
        return shortgpt(model, study.search, drop=drop)
    if route == "shortened_llama":
        return shortened_llama(model, study.search, drop=drop)[0]
    return shortened_llama_taylor(model, study.search, drop=drop, first=1, last=1)[0]


def depth(study: Study, budget: float, route: str) -> Solution:
    """As many of the most important layers as fit, whole."""
    library, (cost, _, whole) = study.library, study.costs
    for kept in range(study.net.config.n_layer - 1, 0, -1):
        layers = keepers(study, route, kept)
        solution = tuple(
            0 if part.layer in layers else len(choices) - 1
            for part, choices in zip(library.parts, library.candidates, strict=True)
        )
        if cost(library.subnetwork(solution)) <= budget * whole:
            return solution
    raise SystemExit(f"nothing fits into {budget:.0%}")


def half(study: Study, kind: str) -> Solution:
    """Every part of a kind at about half of its size, all others whole."""
    found = []
    for part, choices in zip(study.library.parts, study.library.candidates, strict=True):
        first = [0 if form_of(one.sizes) else float(one.sizes[0]) for one in choices]
        apart = [abs(size - first[0] / 2) for size in first]
        found.append(apart.index(min(apart)) if part.kind == kind else 0)
    return tuple(found)


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
    if route in DROPS:
        found = iter([(math.nan, depth(study, budget, route))])
    elif route in HALVES:
        found = iter([(math.nan, half(study, HALVES[route]))])
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
            "whole": study.losses(study.library.original, study.held_out)[0],
            "per_block": study.per_block(solution, study.held_out).tolist(),
            "seconds": time.perf_counter() - start,
            "subnetwork": sub.to_dict(),
        }


def part_errors(library: Library) -> dict[str, float]:
    """Shares of a part's output that its smaller versions and matrices get wrong, means by kind."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for part, choices in zip(library.parts, library.candidates, strict=True):
        found[part.kind] += [one.error for one in choices[1:] if not is_nothing(one.sizes)]
    return {kind: mean(errors) for kind, errors in found.items()}


def difference(row: dict[str, Any], others: Sequence[dict[str, Any]], route: str | None) -> str:
    """To the last row of the same budget, with the standard error over blocks."""
    same = row["budget"], route or row["route"]
    beside = [one for one in others if (one["budget"], one["route"]) == same]
    if not beside or beside[-1] is row:
        return ""
    pairs = zip(row["per_block"], beside[-1]["per_block"], strict=True)
    apart = [mine - other for mine, other in pairs]
    return f"  beside {mean(apart):+.4f} (s.e. {stdev(apart) / len(apart) ** 0.5:.4f})"


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
    parser.add_argument("--routes", nargs="+", default=ROUTES, choices=(*ROUTES, *MORE))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--beside_route", choices=(*ROUTES, *MORE))
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
    compared = given.beside or given.beside_route
    others = [json.loads(line) for line in given.beside.open()] if given.beside else done
    widest = max([10, *(len(row["route"]) for row in done)])
    for row in done:
        print(
            f"{row['budget']:.0%} {row['route']:<{widest}} round {row['round']}  "
            f"{row['share']:.1%}  predicted {row['predicted']:.3f}  searched "
            f"{row['search_loss']:.3f}  held out {row['held_out']:.3f} (whole {row['whole']:.3f}, "
            f"s.e. of the rise {row['stderr_of_rise']:.3f})"
            + (difference(row, others, given.beside_route) if compared else "")
        )
    errors = part_errors(study.library)
    print("mean error of smaller parts: " + ", ".join(f"{k} {e:.4f}" for k, e in errors.items()))


if __name__ == "__main__":
    main()
