"""Peak memory and time of export, merging adapters and a search on a large random checkpoint.

    python scripts/bench/bench_export.py [--gigabytes 2] [--parts merge export search]
        [--out export.json]

The checkpoint is made in a temporary directory (twice its size is needed on disk) and removed.
Peak resident memory is the kernel's figure for the whole process: Python, torch and the pages of
the checkpoint's file that were read, which the kernel takes back when others need memory. Of these,
anonymous memory is what the process itself asked for; it is sampled. The search is over latency,
with few trials and little text: what it holds is the model, and models that are timed.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from litgpt import Config

from whittle_nas.assets import bundled_checkpoint
from whittle_nas.weights import axes
from whittle_nas.weights.checkpoint import write_checkpoint


class RandomWeights(Mapping[str, torch.Tensor]):
    """A state dict that makes each tensor when it is asked for."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.names = list(axes.parameter_names(config))

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.randn(axes.shape(name, self.config)).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def make_checkpoint(path: Path, gigabytes: float, **sizes: int) -> None:
    """A Llama-like checkpoint of about the given size in bfloat16; `sizes` are those of litgpt."""
    sizes = {"padded_vocab_size": 32_000, **sizes}
    layer = Config.from_name("Llama-3.2-1B", n_layer=1, **sizes)
    rest = Config.from_name("Llama-3.2-1B", n_layer=2, **sizes)
    per_layer = axes.num_params(rest) - axes.num_params(layer)
    fixed = axes.num_params(layer) - per_layer
    n_layer = max(1, round((gigabytes * 1e9 / 2 - fixed) / per_layer))
    config = Config.from_name("Llama-3.2-1B", n_layer=n_layer, **sizes)
    path.mkdir()
    weights = RandomWeights(config, torch.bfloat16)
    write_checkpoint(path, weights, config=config, source=bundled_checkpoint())


def merge(source: Path, out_dir: Path) -> None:
    """What ends a training with adapters: load, merge and write."""
    from whittle_nas.train.options import LoraOptions
    from whittle_nas.train.prepare import TrainedTensors, load_trainable
    from whittle_nas.weights.checkpoint import open_checkpoint

    found = open_checkpoint(source)
    supernet = load_trainable(found, LoraOptions(), precision="bf16-mixed")
    out_dir.mkdir()
    tensors = TrainedTensors(supernet, found.state_dict())
    write_checkpoint(out_dir, tensors, config=found.config, source=source)


def run(*arguments: object) -> tuple[float, int, int]:
    """Seconds, peak resident and peak anonymous bytes of one Python process."""
    start = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    process = os.posix_spawn(sys.executable, command, os.environ)
    anonymous = ended = 0
    while not ended:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            lines = Path(f"/proc/{process}/status").read_text().split("RssAnon:")
            anonymous = max(anonymous, 1024 * int(lines[1].split()[0]))
        time.sleep(0.02)
    assert status == 0, arguments
    return time.perf_counter() - start, usage.ru_maxrss * 1024, anonymous


def measured(name: str, size: int, *arguments: object) -> dict[str, float]:
    """What `run` says, beside the bytes of a checkpoint; printed as it comes."""
    seconds, peak, anonymous = run(*arguments)
    print(
        f"{name}: {seconds:.1f} s, peak {peak / size:.2f} x {size:,} bytes, "
        f"anonymous {anonymous / size:.2f} x",
        flush=True,
    )
    over = {"peak_over_input": peak / size, "anonymous_over_input": anonymous / size}
    return {"seconds": seconds, **over}


def search(source: Path, folder: Path) -> tuple[object, ...]:
    """Arguments of a short search with whole networks to time before it and after it."""
    text, space = folder / "text.txt", folder / "space.yaml"
    text.write_text("def f(x):\n    return x + 1\n\n\n" * 400)
    space.write_text("n_layer: {min: 1}\n")
    costs = ("--costs.calibrate", 4, "--costs.batch", 1, "--costs.tokens", 32)
    return (
        "-m", "whittle_nas", "search", "--checkpoint_dir", source, "--out_dir", folder / "front",
        "--objectives", "val_loss,latency_ms", "--search_space", space, "--num_trials", 2,
        "--data.files", text, "--data.block_size", 32, "--data.num_blocks", 2, *costs,
        "--device", "cpu",
    )  # fmt: skip


PARTS = ("merge", "export", "search")


def main() -> None:
    """Merge, export the largest and a smaller sub-network in both formats, and search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("export.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--merge", type=Path, nargs=2, help="of a process of its own")
    options = parser.parse_args()
    if options.merge:
        merge(*options.merge)
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        make_checkpoint(source, options.gigabytes)
        size = (source / "lit_model.pth").stat().st_size
        runs = {"merge": (__file__, "--merge", source, Path(folder) / "merged")}
        for extreme in ("largest", "smallest"):
            for layout in ("litgpt", "hf"):
                runs[f"export_{extreme}_{layout}"] = (
                    "-m", "whittle_nas", "export", "--checkpoint_dir", source, "--extreme", extreme,
                    "--format", layout, "--out_dir", Path(folder) / "out", "--overwrite", "true",
                )  # fmt: skip
        runs["search"] = search(source, Path(folder))
        for name, arguments in runs.items():
            if name.partition("_")[0] not in options.parts:
                continue
            results[name] = measured(name, size, *arguments)
    options.out.write_text(json.dumps({"input_bytes": size, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
