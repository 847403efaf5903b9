"""Peak memory and time of `nas prune` on a large random checkpoint.

    python scripts/bench/bench_pruning.py [--gigabytes 1] [--out pruning.json] [method ...]

The checkpoint (bfloat16, made in a temporary directory and removed) has the proportions of a small
Llama: 1024 channels, 2816 neurons, as many layers as it takes. Anonymous memory is what the process
itself asked for, Python and torch included, without the pages of the checkpoint's file; it is
sampled. A Hessian is float64 of neurons x neurons whatever the number of layers, so that the ratio
of `sparsegpt` and `gptq` is larger for models with few wide layers.
"""

import argparse
import json
import tempfile
from pathlib import Path

from bench_export import make_checkpoint, measured

SIZES = {
    "n_embd": 1024, "n_head": 16, "n_query_groups": 4, "head_size": 64, "intermediate_size": 2816,
}  # fmt: skip
OPTIONS = {
    "wanda": ("--sparsity", "2:4"),
    "sparsegpt": ("--sparsity", "2:4"),
    "gptq": ("--group_size", 64),
    "flap": ("--sparsity", 0.2),
    "llm_pruner": ("--sparsity", 0.2),
    "shortened_llama_taylor": ("--sparsity", 0.2),
    "laco": ("--sparsity", 0.1, "--laco.threshold", -1),
    "minitron": ("--sparsity", 0.2),
    "slicegpt": ("--sparsity", 0.2),
    "slicegpt_global": ("--sparsity", 0.2),
}
TEXT = "The quick brown fox jumps over the lazy dog and asks why it was so lazy today.\n" * 400


def main() -> None:
    """Prune one checkpoint with every method in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(OPTIONS)}; default: all")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--blocks", type=int, default=4, help="of 512 tokens")
    parser.add_argument("--out", type=Path, default=Path("pruning.json"))
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        source, text = Path(folder) / "source", Path(folder) / "text.txt"
        make_checkpoint(source, options.gigabytes, **SIZES)
        text.write_text(TEXT)
        size = (source / "lit_model.pth").stat().st_size
        for method in options.methods or OPTIONS:
            results[method] = measured(
                method, size,
                "-m", "whittle_nas", "prune", "--checkpoint_dir", source, "--method", method,
                *OPTIONS[method], "--data.files", text, "--data.num_blocks", options.blocks,
                "--data.block_size", 512, "--device", "cpu",
                "--out_dir", Path(folder) / "out", "--overwrite", "true",
            )  # fmt: skip
    options.out.write_text(json.dumps({"input_bytes": size, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
