"""What importance costs: scoring against plain forward passes, sorting against the checkpoint.

    python scripts/bench/bench_importance.py [--out importance.json] [--rounds 7] [--gigabytes 2]

Both sides of a ratio run in turn within one process on the same tokens; ratios are medians of the
ratios of neighbouring runs. Sorting runs in a process of its own, whose peak resident memory
(Python, torch and the mapped pages of the input included) is what the kernel says.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import torch
from litgpt import GPT, Config

from whittle_nas.importance.options import Aggregation
from whittle_nas.importance.pipeline import MeasureOptions, measure, settle
from whittle_nas.importance.statistics import collect
from whittle_nas.metrics.measured import peak_memory_bytes
from whittle_nas.weights.supernet import SuperNetwork

_LLAMA = {
    "mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "bias": False,
    "parallel_residual": False, "rotary_percentage": 1.0,
}  # fmt: skip
MODELS = {
    # the real models' shapes, and one whose matrices fill a core
    "stories260K": Config(
        name="bench", n_layer=5, n_head=8, n_query_groups=4, n_embd=64, head_size=8,
        intermediate_size=172, padded_vocab_size=512, block_size=512, **_LLAMA,
    ),
    "babyllama-char361": Config(
        name="bench", n_layer=5, n_head=8, n_query_groups=4, n_embd=128, head_size=16,
        intermediate_size=352, padded_vocab_size=361, block_size=256, **_LLAMA,
    ),
    "llama-60m": Config(
        name="bench", n_layer=8, n_head=8, n_query_groups=4, n_embd=512, head_size=64,
        intermediate_size=1536, padded_vocab_size=32000, block_size=512, **_LLAMA,
    ),
    "pythia-70m": Config.from_name("pythia-70m", block_size=512),
}  # fmt: skip
BATCH_SIZE, BATCHES = 4, 3  # enough text to rotate all of them


def plain(model: GPT, tokens: torch.Tensor) -> None:
    """The forward passes that a perplexity takes."""
    with torch.inference_mode():
        for batch in tokens.split(BATCH_SIZE):
            model(batch)


def without_head(model: GPT, tokens: torch.Tensor) -> None:
    """The forward passes up to the last norm: what scoring runs inside."""
    head, model.lm_head = model.lm_head, torch.nn.Identity()
    try:
        plain(model, tokens)
    finally:
        model.lm_head = head


def ratios(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bench_scoring(name: str, rounds: int) -> dict[str, float]:
    """Time and memory of scoring one model over its forward passes."""
    torch.manual_seed(0)
    model = GPT(MODELS[name]).eval()
    tokens = torch.randint(
        0, model.config.padded_vocab_size, (BATCH_SIZE * BATCHES, model.config.block_size)
    )
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, tokens),
        "without_head": lambda: without_head(model, tokens),
    }
    for how in (Aggregation.mean_mean, Aggregation.norm_norm, Aggregation.variance_variance):
        runs[how.value] = lambda how=how: collect(
            model, tokens, aggregation=how, batch_size=BATCH_SIZE
        )
    without_order = MeasureOptions(batch_size=BATCH_SIZE)
    runs["bases"] = lambda: measure(model, tokens, without_order)
    seconds = ratios(runs, rounds)
    found = {"plain_s": statistics.median(seconds["plain"])}
    for how in list(runs)[2:]:
        for base in ("plain", "without_head"):
            pairs = zip(seconds[how], seconds[base], strict=True)
            found[f"{how}/{base}"] = statistics.median(a / b for a, b in pairs)
    options = MeasureOptions(batch_size=BATCH_SIZE, layer_blocks=len(tokens))
    scores, supernet = measure(model, tokens, options).scores, SuperNetwork(model)
    runs["with_layer_order"] = lambda: (
        measure(model, tokens, options),
        settle(supernet, tokens, scores, options),
    )
    start = time.perf_counter()
    runs["with_layer_order"]()
    found["with_layer_order/plain"] = (time.perf_counter() - start) / found["plain_s"]
    device = torch.device("cpu")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peaks = {how: weights + peak_memory_bytes(run, device) for how, run in runs.items()}
    for how in list(runs)[2:]:
        found[f"memory {how}/plain"] = peaks[how] / peaks["plain"]
        found[f"memory {how}/without_head"] = peaks[how] / peaks["without_head"]
    return found


def bench_sorting(gigabytes: float, *, rotate: bool) -> dict[str, float]:
    """Peak resident memory of writing a sorted checkpoint, over the size of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "sorted"
        for step in ("make", "rotate" if rotate else "sort"):
            command = [sys.executable, __file__, f"--{step}", str(gigabytes)]
            done = subprocess.run(
                [*command, str(source), str(target)], check=True, capture_output=True, text=True
            )
        size = (source / "lit_model.pth").stat().st_size
        found = json.loads(done.stdout.splitlines()[-1])
        return {"checkpoint_gb": size / 1e9, **found, "ratio": found["peak_bytes"] / size}


def large_config(gigabytes: float) -> Config:
    """A Llama-like model with about so many gigabytes of float32 weights."""
    layers = max(1, round((gigabytes * 1e9 / 4 - 2 * 32000 * 2048) / 50.3e6))
    return Config(
        name="bench", n_layer=layers, n_head=32, n_query_groups=8, n_embd=2048, head_size=64,
        intermediate_size=6400, padded_vocab_size=32000, block_size=512, **_LLAMA,
    )  # fmt: skip


def make(gigabytes: float, source: Path) -> None:
    """Write a large checkpoint with random weights."""
    from whittle_nas.weights.axes import parameter_names, shape
    from whittle_nas.weights.checkpoint import write_checkpoint

    config = large_config(gigabytes)
    source.mkdir()
    tensors = {name: torch.randn(shape(name, config)) for name in parameter_names(config)}
    write_checkpoint(source, tensors, config=config, source=source)


def sort(source: Path, target: Path, *, rotate: bool) -> None:
    """Sort it by random scores, or rotate it at random, and say how much memory that took."""
    from whittle_nas.importance.pipeline import write_sorted
    from whittle_nas.importance.scores import Scores, rank
    from whittle_nas.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source)
    c = checkpoint.config
    scores = Scores(
        embd=torch.rand(c.n_embd),
        neurons=torch.rand(c.n_layer, c.intermediate_size),
        groups=torch.rand(c.n_layer, c.n_query_groups),
        heads=torch.rand(c.n_layer, c.n_query_groups, c.n_head // c.n_query_groups),
        value_channels=torch.rand(c.n_layer, c.n_query_groups, c.head_size),
        qk_channels=torch.zeros(c.n_layer, c.n_query_groups, 0),
        block_importance=torch.rand(c.n_layer),
    )
    bases = rank(scores, c)
    if rotate:
        turn = torch.linalg.qr(torch.randn(c.n_embd, c.n_embd)).Q
        bases = replace(bases, embd=turn)
    target.mkdir()
    before = peak_resident_bytes()
    start = time.perf_counter()
    write_sorted(target, checkpoint, bases)
    took = time.perf_counter() - start
    peak = peak_resident_bytes()
    print(json.dumps({"peak_bytes": peak, "before_bytes": before, "seconds": took}))


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far.

    Not `ru_maxrss`: after fork and exec it still holds the peak of the parent.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Run everything, print it and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("importance.json"))
    parser.add_argument("--rounds", type=int, default=7, help="0 skips scoring")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="0 skips sorting")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--sort", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--rotate", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(float(options.make[0]), Path(options.make[1]))
        return
    if options.sort or options.rotate:
        _, source, target = options.sort or options.rotate
        sort(Path(source), Path(target), rotate=bool(options.rotate))
        return
    results: dict[str, object] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for name in MODELS if options.rounds else ():
        results[name] = found = bench_scoring(name, options.rounds)
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)
    if options.gigabytes > 0:
        for what in ("sorting", "rotating"):
            found = bench_sorting(options.gigabytes, rotate=what == "rotating")
            results[what] = found
            print(what, {key: round(value, 3) for key, value in found.items()})
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
