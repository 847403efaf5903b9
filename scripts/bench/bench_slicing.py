"""What running a sub-network inside the super-network costs over the same model built alone.

    python scripts/bench/bench_slicing.py [--out slicing.json] [--rounds 15]

Both models run in turn within one process; ratios are medians of the ratios of neighbouring runs,
which other load on the machine hardly moves.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import torch
from litgpt import lora
from measuring import in_turn

from whittle_nas.metrics.measured import peak_memory_bytes
from whittle_nas.space import Block, SubNetwork
from whittle_nas.weights.supernet import SuperNetwork

CONFIG = lora.Config(
    name="bench", n_layer=8, n_head=8, n_query_groups=4, n_embd=256, head_size=32,
    intermediate_size=688, vocab_size=4096, padded_vocab_size=4096, block_size=512,
    mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", bias=False, parallel_residual=False,
    rotary_percentage=1.0, lora_r=8, lora_alpha=16, lora_query=True, lora_key=True,
    lora_value=True, lora_projection=True, lora_mlp=True, lora_head=True,
)  # fmt: skip
HALF = SubNetwork(128, (Block(4, 4, 32, 344),) * 8)
SHAPES = [(4, 256), (1, 32)]


def make_models() -> tuple[SuperNetwork, torch.nn.Module]:
    """A LoRA super-network with random weights, and its half-size member built alone."""
    torch.manual_seed(0)
    model = lora.GPT(CONFIG)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    lora.mark_only_lora_as_trainable(model)
    supernet = SuperNetwork(model)
    alone = lora.GPT(supernet.plan(HALF).config)
    alone.load_state_dict({name: t.clone() for name, t in supernet.slices(HALF).items()})
    lora.mark_only_lora_as_trainable(alone)
    return supernet, alone


def train_step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Forward and backward; gradients pile up as they do in a sandwich step."""
    logits = model(ids)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()


@torch.no_grad()
def forward(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Forward pass alone."""
    model(ids)


def compare(run, inside, alone, ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of both and the median of their ratios."""
    inner = max(1, 2048 // ids.numel())
    found = in_turn(lambda: run(inside, ids), lambda: run(alone, ids), rounds, inner=inner)
    return {
        "inside_ms": 1e3 * found["ours_s"],
        "alone_ms": 1e3 * found["other_s"],
        "ratio": found["ratio"],
    }


def new_shape_ms(supernet: SuperNetwork, count: int = 20) -> float:
    """Median time of preparing a sub-network of a shape not seen before."""
    times = []
    for at in range(count):
        start = time.perf_counter()
        supernet.subnet(SubNetwork(128, (Block(4, 4, 32, 100 + at),) * 8))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Run everything, print it and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("slicing.json"))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    supernet, alone = make_models()
    inside = supernet.subnet(HALF)
    device = torch.device("cpu")
    results: dict[str, object] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "subnetwork": HALF.to_dict(),
        "new_shape_ms": new_shape_ms(supernet),
    }
    for batch, tokens in SHAPES:
        ids = torch.randint(0, CONFIG.vocab_size, (batch, tokens))
        for name, run in (("lora_forward_backward", train_step), ("forward", forward)):
            key = f"{name}_{batch}x{tokens}"
            measured = compare(run, inside, alone, ids, options.rounds)
            for model in (inside, alone):  # gradients are there before memory is measured
                run(model, ids)
            bytes_inside = peak_memory_bytes(lambda run=run, ids=ids: run(inside, ids), device)
            bytes_alone = peak_memory_bytes(lambda run=run, ids=ids: run(alone, ids), device)
            weights = sum(p.numel() * p.element_size() for p in alone.parameters())
            measured["extra_memory"] = (bytes_inside - bytes_alone) / (bytes_alone + weights)
            measured["peak_mb_inside"] = bytes_inside / 2**20
            measured["peak_mb_alone"] = bytes_alone / 2**20
            results[key] = measured
            print(key, {name: round(value, 4) for name, value in measured.items()})
    print(f"a new shape costs {results['new_shape_ms']:.1f} ms once")
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
