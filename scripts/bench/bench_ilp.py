"""Seconds that the integer programs of `nas search --method ilp` take.

    python scripts/bench/bench_ilp.py [--layers 32] [--candidates 15] [--solutions 9] [--out x]

Random libraries: every candidate of a part costs less the worse it scores, about as measured ones
do. One budget of 70 % of the parameters, every two solutions agree in at most 70 % of the parts.
"""

import argparse
import json
import random
import time
from pathlib import Path

from whittle_nas.search.ilp import Program, overlap, solve_many


def random_program(parts: int, candidates: int, seed: int = 0) -> Program:
    """Scores that rise as the cost falls, with noise."""
    rng = random.Random(seed)
    costs, scores = [], []
    for _ in range(parts):
        size, hurt = rng.uniform(0.5e8, 2e8), rng.lognormvariate(-3, 1)
        kept = [1.0, *sorted((rng.random() for _ in range(candidates - 2)), reverse=True), 0.0]
        costs.append([round(size * share) for share in kept])
        scores.append([hurt * (1 - share) ** 2 * rng.uniform(0.7, 1.3) for share in kept])
    budget = 0.7 * sum(part[0] for part in costs)
    return Program(scores, {"num_params": costs}, {"num_params": budget}, {})


def main() -> None:
    """Print the time and what was checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=15)
    parser.add_argument("--solutions", type=int, default=100)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    program = random_program(2 * given.layers, given.candidates)
    start, used = time.perf_counter(), time.process_time()
    found = solve_many(program, given.solutions, max_overlap=0.7)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    limit, most = program.budgets["num_params"], int(0.7 * program.num_parts + 1e-9)
    within = sum(program.cost("num_params", one) <= limit for one in found)
    apart = all(overlap(a, b) <= most for at, a in enumerate(found) for b in found[:at])
    best, last = program.score(found[0]), program.score(found[-1])
    row = {
        "seconds": seconds,
        "cpu_seconds": used,
        "solutions": len(found),
        "within": within,
        "apart": apart,
    }
    if given.out is not None:
        given.out.write_text(json.dumps({**vars(given), "out": None, **row}) + "\n")
    print(
        f"{len(found)} solutions of {given.layers} layers x {given.candidates} candidates in "
        f"{seconds:.0f} s ({used:.0f} s of CPU time); {within} within the budget, overlap kept: "
        f"{apart}; scores {best:.3f} to {last:.3f}"
    )


if __name__ == "__main__":
    main()
