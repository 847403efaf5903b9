"""What both sides of `scripts/compare_whittle/run.sh` share: models, sizes, batches, the protocol.

Imported by `ours.py` and `peer.py`, each in its own environment.
"""

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from litgpt import GPT, Config
from torch import Tensor, nn

from whittle_nas.metrics.measured import peak_memory_bytes

Sizes = dict[str, int]
NAMES = ("n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size", "n_layer")
LLAMA = {
    "mlp_class_name": "LLaMAMLP",
    "norm_class_name": "RMSNorm",
    "bias": False,
    "parallel_residual": False,
    "rotary_percentage": 1.0,
}
# Llama-3.1-8B at its full width with two layers and a small vocabulary: 1 GB in bfloat16.
SHORT_8B = {"n_layer": 2, "vocab_size": 8192, "padded_vocab_size": 8192, "block_size": 2048}
# Largest, two in between, smallest: the networks of a sandwich step.
FOUR = {
    "pythia-14m": [
        (128, 4, 4, 32, 512, 6), (112, 4, 4, 32, 448, 5), (96, 3, 3, 32, 288, 6),
        (64, 2, 2, 32, 128, 3),
    ],
    "llama-like": [
        (256, 8, 4, 32, 688, 8), (224, 4, 4, 32, 448, 7), (192, 6, 3, 32, 384, 8),
        (128, 4, 2, 32, 256, 4),
    ],
}  # fmt: skip


def config_of(name: str) -> Config:
    """A compared model: `pythia-14m`, `llama-like` (grouped queries), `8b` or `8b-short`."""
    if name == "pythia-14m":
        return Config.from_name(name)
    if name == "llama-like":
        return Config(
            name=name, n_layer=8, n_head=8, n_query_groups=4, n_embd=256, head_size=32,
            intermediate_size=688, vocab_size=32000, padded_vocab_size=32000, block_size=512,
            **LLAMA,
        )  # fmt: skip
    return Config.from_name("Llama-3.1-8B", **(SHORT_8B if name == "8b-short" else {}))


def sizes(values: Sequence[int]) -> Sizes:
    """Sizes by litgpt's names."""
    return dict(zip(NAMES, values, strict=True))


def four(name: str) -> list[Sizes]:
    """The networks of a sandwich step, the full one first."""
    return [sizes(values) for values in FOUR[name]]


def twenty(name: str) -> list[Sizes]:
    """The full network and 19 random ones; MLPs are multiples of half the width, as both allow."""
    rng, full = random.Random(0), FOUR[name][0]
    found = [sizes(full)]
    while len(found) < 20:
        embd = rng.randrange(full[0] // 4, full[0] + 1, 4)
        groups = rng.randint(1, full[2])
        heads = groups * rng.randint(1, full[1] // full[2])
        ratio = rng.choice([n / 2 for n in range(2, 9) if n / 2 * embd <= full[4]])
        layers = rng.randint(1, full[5])
        found.append(sizes((embd, heads, groups, full[3], int(ratio * embd), layers)))
    return found


def shapes_8b(layers: int) -> list[Sizes]:
    """Eight sub-networks of Llama-3.1-8B with all layers, full heads and fewer query groups."""
    shapes = []
    for at in range(8):
        groups = 8 - at % 4
        shapes.append(sizes((4096 - 256 * at, 4 * groups, groups, 128, 14336 - 1024 * at, layers)))
    return shapes


def weights(config: Config) -> dict[str, Tensor]:
    """The same random weights in every process."""
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.02)
    return model.state_dict()


def tokens(name: str, rows: int, columns: int, seed: int) -> Tensor:
    """Random token ids, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config_of(name).vocab_size, (rows, columns), generator=generator)


def batch(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """4 x 256 inputs and the labels of the next position."""
    ids = tokens(name, 4, 257, seed)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def filled(make: Callable[[], Any]) -> Any:
    """A model in bfloat16 whose weights are all 0.01: times do not depend on the values."""
    with torch.device("meta"):
        model = make()
    real = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.fill_(0.01)
    return real


class Side:
    """What both sides can do in the same way."""

    def peak_mb(self, what: str, *args: int) -> float:
        """Most memory of tensors that a call held beyond what was there before, in MiB."""
        run = getattr(self, what)
        return peak_memory_bytes(lambda: run(*args), torch.device("cpu")) / 2**20


def serve(side: Side) -> None:
    """Answer requests, one JSON object a line: `{"do": method, "args": [...]}`.

    An answer has the method's `value` or its `error`, and the wall-clock and process CPU time that
    it took. Whatever libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            answer = {"value": getattr(side, request["do"])(*request["args"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["wall_ms"] = 1e3 * (time.perf_counter() - wall)
        answer["cpu_ms"] = 1e3 * (time.process_time() - cpu)
        print(json.dumps(answer), file=answers, flush=True)
