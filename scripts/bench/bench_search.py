"""What a search costs beside its evaluations, and how well it spreads over workers.

    python scripts/bench/bench_search.py [--out out.json]
        [--parts proposing evaluating latency workers]

Ratios are of runs that take turns within one process where that is possible, and all torch work is
single-threaded. The bundled checkpoint and text are used unless --checkpoint_dir and --text say
otherwise.
"""

import argparse
import json
import os
import random
import signal
import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from litgpt import GPT, Config
from scipy.stats import spearmanr

from whittle_nas.assets import bundled_checkpoint
from whittle_nas.data import TextData, load_blocks
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.metrics.latency_parts import Load, Phase
from whittle_nas.metrics.latency_table import LatencyTable, calibration_networks
from whittle_nas.search.costs import Costs
from whittle_nas.search.evaluation import EvaluationSpec, Evaluator, Job
from whittle_nas.search.options import Method
from whittle_nas.search.searchers import Problem, make_searcher
from whittle_nas.space import SearchSpace, SubNetwork, load_space
from whittle_nas.weights.checkpoint import open_checkpoint
from whittle_nas.weights.info import SupernetInfo

OBSERVATIONS = 500
PROPOSALS = 20
TRIALS = 40
# A Llama of 32 layers as far as proposing goes: 10^6 members, nothing is built.
LARGE = Config.from_name("Llama-3.1-8B")
# Long enough a forward pass for the clock, short enough for a bench.
TIMED = Config(
    name="bench", n_layer=8, n_head=8, n_query_groups=4, n_embd=256, head_size=32,
    intermediate_size=688, vocab_size=4096, padded_vocab_size=4096, block_size=512,
    mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", bias=False, parallel_residual=False,
    rotary_percentage=1.0,
)  # fmt: skip


def toy_loss(sub: SubNetwork) -> float:
    """Smooth and saturating, as losses of super-networks are."""
    full = SubNetwork.from_config(LARGE)
    sizes = zip(sub.summary().values(), full.summary().values(), strict=True)
    return 2.0 + sum((1 - size / most) ** 2 for size, most in sizes)


def bench_proposing() -> dict:
    """Seconds per proposal with many results known, mean over a few batches, for every method."""
    space = load_space("aligned", LARGE)
    load = Load(2, 512, torch.device("cpu"), torch.bfloat16)
    costs = Costs(LARGE, SupernetInfo.default(LARGE), load)
    found = {}
    for objectives in (("val_loss", "num_params"), ("val_loss", "flops", "memory_bytes")):
        for method in Method:
            problem = Problem(
                space,
                objectives,
                costs.estimators(objectives),
                size=costs.estimators(["num_params"])["num_params"],
            )
            seconds = time_proposals(make_searcher(method, problem, 0), costs, objectives)
            found[f"{method.value}, {len(objectives)} objectives"] = seconds
            print(f"{method.value:14s} {len(objectives)} objectives {1e3 * seconds:8.1f} ms")
    return found


def time_proposals(searcher, costs: Costs, objectives: tuple[str, ...]) -> float:
    """Mean time of a proposal and of taking its result, after `OBSERVATIONS` random ones."""
    rng = random.Random(1)

    def observe(sub: SubNetwork) -> None:
        values = [toy_loss(sub), *(costs.value(sub, name) for name in objectives[1:])]
        searcher.observe(sub, np.array(values))

    while len(searcher.proposals) < OBSERVATIONS:
        sub = searcher.space.sample(rng)
        searcher.accept(sub)
        observe(sub)
    start = time.perf_counter()
    for _ in range(PROPOSALS):
        searcher.suggest()
        observe(searcher.proposals[-1])
    return (time.perf_counter() - start) / PROPOSALS


def bench_evaluating(checkpoint_dir: Path, text: Path) -> dict:
    """A trial against the same loss of a stand-alone model with weights of its own."""
    evaluator = make_evaluator(checkpoint_dir, text, blocks=32)
    space = load_space("aligned", evaluator.supernet.config)
    rng = random.Random(0)
    ratios = []
    for number in range(12):
        sub = space.sample(rng)
        alone = GPT(evaluator.supernet.plan(sub).config)
        slices = evaluator.supernet.slices(sub)
        alone.load_state_dict({name: tensor.clone() for name, tensor in slices.items()})
        alone.requires_grad_(False).eval()
        pairs = []
        for _ in range(5):
            start = time.perf_counter()
            trial = evaluator.evaluate(Job(number, sub)).metrics["val_loss"]
            middle = time.perf_counter()
            loss = nats_per_token(alone, evaluator.tokens)
            pairs.append((middle - start) / (time.perf_counter() - middle))
            assert abs(trial - loss) < 1e-5
        ratios.append(statistics.median(pairs))
    found = {"median": statistics.median(ratios), "highest": max(ratios)}
    print(f"trial / stand-alone model: {found['median']:.3f}, highest {found['highest']:.3f}")
    return found


def bench_latency(directory: Path) -> dict:
    """The latency table against whole networks that its correction has not seen."""
    space: SearchSpace = load_space("aligned", TIMED)
    load = Load(2, 128, torch.device("cpu"), torch.float32)
    path = directory / "bench_latency_table.json"
    path.unlink(missing_ok=True)
    table = LatencyTable(path, TIMED, SupernetInfo.default(TIMED), load)
    found = {}
    for phase in Phase:
        fitted = table.calibrate(calibration_networks(space, 16, 0), phase)
        rng = random.Random(2)
        subs = [space.sample(rng) for _ in range(30)]
        sums, corrected, whole = [], [], []
        for sub in subs:
            whole.append(table.whole(sub, phase))
            sums.append(sum(table.parts(sub, phase)))
            corrected.append(table.milliseconds(sub, phase))
        errors = [np.abs(np.array(t) / np.array(whole) - 1) for t in (sums, corrected)]
        found[phase.value] = {
            "coefficients": fitted.coefficients,
            "sum_error": float(np.median(errors[0])),
            "corrected_error": float(np.median(errors[1])),
            "corrected_error_90%": float(np.quantile(errors[1], 0.9)),
            "rank_correlation": float(spearmanr(corrected, whole).statistic),
            "milliseconds": [min(whole), max(whole)],
        }
        print(phase.value, json.dumps(found[phase.value]))
    return found


def bench_workers(checkpoint_dir: Path, text: Path) -> dict:
    """The same trials by one worker, by two, and by two of which one is killed."""
    evaluator = make_evaluator(checkpoint_dir, text, blocks=128)
    space = load_space("aligned", evaluator.supernet.config)
    rng = random.Random(0)
    jobs = [Job(number, space.sample(rng)) for number in range(TRIALS)]
    found = {"trials": TRIALS, "started_s": {}, "seconds": {}}
    for name, workers in (("one", 1), ("two", 2), ("two, one killed", 2)):
        start = time.perf_counter()
        pool = make_pool(evaluator, workers)
        found["started_s"][name] = time.perf_counter() - start
        start = time.perf_counter()
        for job in jobs:
            pool.submit(job)
        results = {}
        while len(results) < TRIALS:
            number, evaluation = pool.next()
            results[number] = evaluation.metrics["val_loss"]
            if len(results) == 10 and "killed" in name:
                os.kill(a_worker(), signal.SIGKILL)
        found["seconds"][name] = time.perf_counter() - start
        pool.close()
        assert len(results) == TRIALS
        print(f"{name:18s} {found['seconds'][name]:6.1f} s for {len(results)} trials")
    found["ratio"] = found["seconds"]["two"] / found["seconds"]["one"]
    print(f"two workers / one: {found['ratio']:.3f}")
    return found


def make_pool(evaluator: Evaluator, workers: int):
    """Workers that evaluate what `evaluator` does."""
    from whittle_nas.search.ray_pool import RayPool

    return RayPool(evaluator.spec, evaluator.tokens, workers=workers)


def a_worker() -> int:
    """Process id of one of our Ray workers."""
    import psutil

    children = psutil.Process().children(recursive=True)
    return next(c.pid for c in children if any("BoundEvaluator" in part for part in c.cmdline()))


def make_evaluator(checkpoint_dir: Path, text: Path, blocks: int) -> Evaluator:
    """A checkpoint and some blocks of text."""
    config = open_checkpoint(checkpoint_dir).config
    block_size = min(256, config.block_size)
    data = TextData(files=text, block_size=block_size, num_blocks=blocks)
    tokens = load_blocks(data, checkpoint_dir, config=config).tokens
    metrics = ("val_loss", "perplexity")
    where = checkpoint_dir.absolute()
    spec = EvaluationSpec(where, metrics, dtype=torch.float32, threads=1)
    return Evaluator(spec, tokens)


def main() -> None:
    """Read the options and run the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = ["proposing", "evaluating", "latency", "workers"]
    parser.add_argument("--parts", nargs="+", choices=known, default=list(known))
    parser.add_argument("--checkpoint_dir", type=Path, default=bundled_checkpoint())
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("bench_search.json"))
    options = parser.parse_args()
    if "workers" in options.parts and find_spec("ray") is None:
        print("workers: left out, because Ray is not installed (pip install '.[ray]')")
        options.parts.remove("workers")
    torch.set_num_threads(1)
    text = options.text or bundled_checkpoint() / "valid.jsonl"
    runs = {
        "proposing": bench_proposing,
        "evaluating": lambda: bench_evaluating(options.checkpoint_dir, text),
        "latency": lambda: bench_latency(options.out.parent),
        "workers": lambda: bench_workers(options.checkpoint_dir, text),
    }
    found = {part: runs[part]() for part in options.parts}
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
