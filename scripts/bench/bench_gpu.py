"""GPU figures: training, importance, evaluation and latency at the sizes of a large model.

    python scripts/bench/bench_gpu.py [--model Llama-3.1-8B] [--out gpu.json] [--parts step ...]

Random weights, bf16, one device; about eight minutes on one large GPU. `--small` does the same with
a model of a few layers on whatever device is there, to see that everything runs.
scripts/bench/gpu.sh installs and calls this.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config, lora
from litgpt.utils import chunked_cross_entropy

from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.importance.options import LayerCriterion
from whittle_nas.importance.pipeline import MeasureOptions, measure
from whittle_nas.importance.statistics import collect
from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.metrics.latency_parts import Load, Phase
from whittle_nas.metrics.latency_table import LatencyTable, calibration_networks
from whittle_nas.metrics.measured import decode_latency, peak_memory_bytes, prefill_latency
from whittle_nas.space import SubNetwork, load_space
from whittle_nas.space.samplers import build_grid
from whittle_nas.train.batches import Sample
from whittle_nas.train.options import Distillation, LossOptions
from whittle_nas.train.step import Network, Role, accumulate, finish_gradients
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.slicing import plan_slices
from whittle_nas.weights.supernet import SuperNetwork

SMALL = {
    "n_layer": 4, "n_head": 32, "n_query_groups": 8, "n_embd": 256, "head_size": 128,
    "intermediate_size": 896, "vocab_size": 2000, "padded_vocab_size": 2048, "block_size": 1024,
}  # fmt: skip
LORA = {
    "lora_r": 32, "lora_alpha": 16, "lora_query": True, "lora_key": True, "lora_value": True,
    "lora_projection": True, "lora_mlp": True, "lora_head": True,
}  # fmt: skip


class Bench:
    """One device, one model, and sizes of the work that fit both."""

    def __init__(self, model: str, out_dir: Path, *, small: bool) -> None:
        self.small, self.out_dir = small, out_dir
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = replace(Config.from_name(model), **(SMALL if small else {}))
        self.batch, self.tokens = (2, 32) if small else (8, 512)
        self.rounds = 2 if small else 5
        torch.manual_seed(0)

    def build(self, kind: type, config: Any) -> Any:
        """A model with random weights on the device, in bf16."""
        with torch.device(self.device):
            torch.set_default_dtype(torch.bfloat16)
            try:
                model = kind(config)
            finally:
                torch.set_default_dtype(torch.float32)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        return model

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall time of one call, the device included."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what the last part held."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def ids(self, batch: int, tokens: int) -> torch.Tensor:
        """Random token ids, (batch, tokens)."""
        return torch.randint(self.config.vocab_size, (batch, tokens), device=self.device)

    def matmul_flops(self) -> float:
        """Operations per second of a large bf16 matrix product: what is to be had here."""
        size = 512 if self.small else 8192
        a = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        for _ in range(3):
            a @ a
        return 2 * size**3 / min(self.seconds(lambda: a @ a) for _ in range(10))

    def step(self) -> dict[str, Any]:
        """A sandwich LoRA step against litgpt's own steps of the same four networks."""
        given = {f.name: getattr(self.config, f.name) for f in fields(self.config) if f.init}
        config = lora.Config(**{**given, **LORA})
        found = self._sandwich(config)
        self.free()
        alone = [self._alone(sub_config(config, n.sub)) for n in self._networks(config)]
        found["litgpt, sum of the four"] = {
            "seconds": sum(one["seconds"] for one in alone),
            "peak_gib": max(one["peak_gib"] for one in alone),
        }
        seconds = found["sandwich"]["seconds"]
        found["ratio"] = seconds / found["litgpt, sum of the four"]["seconds"]
        # Of frozen weights only the gradient with respect to the input is computed: 2 passes.
        forward = [AnalyticCosts(config).flops(n.sub, self.tokens) for n in self._networks(config)]
        found["model_flops"] = 2 * self.batch * sum(forward)
        found["utilisation"] = found["model_flops"] / seconds / self.matmul_flops()
        return found

    def _networks(self, config: Any) -> list[Network]:
        """The largest, two in between, the smallest."""
        space = load_space("aligned", config)
        grid = build_grid(space, parameter_counter(config), seed=0, num_bins=4).subs
        subs = (SubNetwork.from_config(config), grid[1], grid[2], space.smallest)
        return [Network(sub, Role.full if at == 0 else Role.sampled) for at, sub in enumerate(subs)]

    def _batch(self) -> Sample:
        rows = self.ids(self.batch, self.tokens + 1)
        return Sample(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def _sandwich(self, config: Any) -> dict[str, Any]:
        model = self.build(lora.GPT, config)
        lora.mark_only_lora_as_trainable(model)
        supernet = SuperNetwork(model)
        batch, networks = self._batch(), self._networks(config)
        trained = [p for p in model.parameters() if p.requires_grad]
        found: dict[str, Any] = {"batch": f"{self.batch} x {self.tokens}"}
        for name, loss, recompute in (
            ("sandwich", Distillation.none, False),
            ("sandwich, recomputing", Distillation.none, True),
            ("sandwich, forward KL, recomputing", Distillation.forward_kl, True),
        ):
            optimizer = torch.optim.AdamW(trained, lr=1e-5)

            def run(loss=loss, recompute=recompute, optimizer=optimizer) -> None:
                options = LossOptions(loss, teacher="in_place")
                accumulate(supernet, batch, networks, options, checkpoint_blocks=recompute)
                finish_gradients(trained, batch.labels.numel())
                optimizer.step()
                optimizer.zero_grad()

            found[name] = self._training(run)
        return found

    def _alone(self, config: Any) -> dict[str, float]:
        model, batch = self.build(lora.GPT, config), self._batch()
        lora.mark_only_lora_as_trainable(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

        def run() -> None:
            logits = model(batch.input_ids, lm_head_chunk_size=128)
            chunked_cross_entropy(logits, batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return self._training(run)

    def _training(self, run: Callable[[], None]) -> dict[str, float]:
        run()
        seconds = statistics.median(self.seconds(run) for _ in range(self.rounds))
        resident = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        return {
            "seconds": seconds,
            "peak_gib": (resident + peak_memory_bytes(run, self.device)) / 2**30,
        }

    def importance(self) -> dict[str, Any]:
        """Scores on 100 batches of 4 x 1024 tokens against their forward passes."""
        model = self.build(GPT, self.config).eval().requires_grad_(False)
        count, length = (2, 64) if self.small else (100, 1024)
        tokens = self.ids(4 * count, length + 1)

        @torch.inference_mode()
        def plain() -> None:
            for rows in tokens[:, :-1].split(4):
                model(rows, lm_head_chunk_size=128)

        collect(model, tokens[:4, :-1], batch_size=4)
        found: dict[str, Any] = {"batches": f"{count} x 4 x {length}"}
        found["forward_s"] = self.seconds(plain)
        found["scores_s"] = self.seconds(lambda: collect(model, tokens[:, :-1], batch_size=4))
        options = MeasureOptions(batch_size=4, layer_order=LayerCriterion.block_importance)
        found["scores_and_orders_s"] = self.seconds(lambda: measure(model, tokens, options))
        return found

    def evaluation(self) -> dict[str, Any]:
        """Loss of one sub-network on 64 x 1024 tokens, in place and as a model of its own."""
        supernet = SuperNetwork(self.build(GPT, self.config).eval().requires_grad_(False))
        half = self._subs()["75 %"]
        tokens = self.ids(*((4, 65) if self.small else (64, 1025)))
        alone = self._exported(supernet, half)
        found: dict[str, Any] = {"tokens": f"{tokens.shape[0]} x {tokens.shape[1] - 1}"}
        for name, model in (("in_place_s", supernet.standalone(half)), ("alone_s", alone)):
            nats_per_token(model, tokens[:2])
            found[name] = self.seconds(lambda model=model: nats_per_token(model, tokens))
        return found

    def table(self) -> dict[str, Any]:
        """The latency table of the v3 joint space: time to build, and error of its sums."""
        space = load_space("v3-joint", self.config)
        load = Load(2, self.tokens, self.device, torch.bfloat16)
        path = self.out_dir / "bench_gpu_latency_table.json"
        path.unlink(missing_ok=True)
        table = LatencyTable(path, self.config, SupernetInfo.default(self.config), load)
        subs = calibration_networks(space, 4 if self.small else 16, 0)
        found: dict[str, Any] = {"networks": len(subs)}
        for phase in Phase:
            found[f"{phase.value}_parts_s"] = self.seconds(
                lambda phase=phase: [table.parts(sub, phase) for sub in subs]
            )
            accuracy = table.calibrate(subs, phase)
            found[phase.value] = {
                "sum_error": accuracy.sum_error,
                "corrected_error": accuracy.corrected_error,
                "rank_correlation": accuracy.rank_correlation,
            }
        return found

    def latency(self) -> dict[str, Any]:
        """Prefill and decoding of sub-networks against the whole model: are they faster?"""
        supernet = SuperNetwork(self.build(GPT, self.config).eval().requires_grad_(False))
        found = {}
        for name, sub in self._subs().items():
            model = self._exported(supernet, sub)
            length = 64 if self.small else 512
            found[name] = {
                "params": num_params(model.config),
                "prefill_2x512_ms": prefill_latency(model, batch=2, tokens=length).median_ms,
                "decode_1_ms": decode_latency(model, batch=1, context=length).median_ms,
                "decode_16_ms": decode_latency(model, batch=16, context=length).median_ms,
            }
        return found

    def _exported(self, supernet: SuperNetwork, sub: SubNetwork) -> Any:
        """A stand-alone model with memory of its own."""
        model = self.build(GPT, supernet.plan(sub).config).eval().requires_grad_(False)
        model.load_state_dict(supernet.slices(sub))
        return model

    def _subs(self) -> dict[str, SubNetwork]:
        """The whole model and aligned members near 90, 75 and 50 % of its parameters."""
        space, count = load_space("aligned", self.config), parameter_counter(self.config)
        grid = build_grid(space, count, seed=0, num_bins=30).subs
        full = SubNetwork.from_config(self.config)

        def nearest(share: float) -> SubNetwork:
            return min(grid, key=lambda sub: abs(count(sub) - share * count(full)))

        return {"100 %": full, **{f"{p} %": nearest(p / 100) for p in (90, 75, 50)}}


def sub_config(config: Any, sub: SubNetwork) -> Any:
    """Config of a sub-network."""
    return plan_slices(sub, config).config


PARTS = ("step", "importance", "evaluation", "table", "latency")


def main() -> None:
    """Run the parts one after the other; each is written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--small", action="store_true", help="a few layers, on any device")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.model, options.out.parent, small=options.small)
    on_gpu = bench.device.type == "cuda"
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "model": options.model + (", small" if options.small else ""),
    }
    results["matmul_flops"] = bench.matmul_flops()
    for part in options.parts:
        began = time.perf_counter()
        results[part] = getattr(bench, part)()
        bench.free()
        results[part]["took_s"] = time.perf_counter() - began
        print(part, json.dumps(results[part], indent=1), flush=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
