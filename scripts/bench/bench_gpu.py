"""GPU figures: training, importance, evaluation and latency at the sizes of a large model.

    python scripts/bench/bench_gpu.py [--model Llama-3.1-8B] [--out gpu.json] [--parts step ...]
        [--smollm2 <its checkpoint>] [--minutes 8]

Random weights, bf16, one device. Every part has a share of the minutes, and more where those before
it took less: what it would begin later is left out and named in the file. The file keeps the parts
of earlier runs on the same device. `--small` does the same with a model of a few layers on whatever
device is there, to see that everything runs. scripts/bench/gpu.sh installs and calls this.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config, lora
from litgpt.utils import chunked_cross_entropy

from whittle_nas.__main__ import main as nas
from whittle_nas.assets import bundled_checkpoint
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
from whittle_nas.train.batches import Sample, collate, from_blocks
from whittle_nas.train.options import Distillation, LossOptions
from whittle_nas.train.step import Network, Role, accumulate, finish_gradients
from whittle_nas.weights.assembly import assemble
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

    def __init__(
        self, model: str, out_dir: Path, *, small: bool, smollm2: Path | None = None
    ) -> None:
        self.small, self.out_dir, self.checkpoint_dir = small, out_dir, smollm2
        self.until, self.left_out = float("inf"), []
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = replace(Config.from_name(model), **(SMALL if small else {}))
        self.batch, self.tokens = (2, 32) if small else (8, 512)
        self.rounds = 2 if small else 5
        torch.manual_seed(0)

    def has_time_for(self, what: str) -> bool:
        """Whether the running part may begin something more; else it is left out."""
        if time.monotonic() < self.until:
            return True
        self.left_out.append(what)
        return False

    def build(self, kind: Callable[[Any], Any], config: Any) -> Any:
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
        if not self.has_time_for("litgpt's own steps"):
            return found
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
        """As the training's loader makes it: where labels are is known on the host."""
        rows = self.ids(self.batch, self.tokens + 1).cpu()
        return collate(from_blocks(rows)).to(self.device)

    def _adapted(self, config: Any) -> SuperNetwork:
        model = self.build(lora.GPT, config)
        lora.mark_only_lora_as_trainable(model)
        return SuperNetwork(model)

    def _sandwich(self, config: Any) -> dict[str, Any]:
        supernet = self._adapted(config)
        model = supernet.model
        batch, networks = self._batch(), self._networks(config)
        trained = [p for p in model.parameters() if p.requires_grad]
        found: dict[str, Any] = {"batch": f"{self.batch} x {self.tokens}"}
        for name, loss, recompute in (
            ("sandwich", Distillation.none, False),
            ("sandwich, recomputing", Distillation.none, True),
            ("sandwich, forward KL, recomputing", Distillation.forward_kl, True),
        ):
            if name != "sandwich" and not self.has_time_for(name):
                continue
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

    def unseen(self) -> dict[str, Any]:
        """Gradients and losses of networks whose shapes are new, over the same once more."""
        given = {f.name: getattr(self.config, f.name) for f in fields(self.config) if f.init}
        trained, batch = self._adapted(lora.Config(**{**given, **LORA})), self._batch()
        whole, loss = Network(trained.full, Role.full), LossOptions(Distillation.none)

        def step(subs: list[SubNetwork]) -> None:
            networks = [whole, *(Network(sub, Role.sampled) for sub in subs)]
            accumulate(trained, batch, networks, loss, checkpoint_blocks=True)

        evaluated = SuperNetwork(self.build(GPT, self.config).eval().requires_grad_(False))
        tokens = self.ids(*((2, 65) if self.small else (16, 1025)))

        def evaluation(subs: list[SubNetwork]) -> None:
            for sub in subs:
                nats_per_token(evaluated.standalone(sub), tokens)

        space, rng = self._varied_space(0.75), random.Random(0)
        found: dict[str, Any] = {}
        for run in (step, evaluation):
            pairs: list[tuple[float, float]] = []
            for turn in range(self.rounds + 1):  # the first warms up
                if turn > 1 and not self.has_time_for(f"{run.__name__}, rounds from {turn}"):
                    break
                once = partial(run, [space.sample(rng) for _ in range(2)])
                pairs.append((self.seconds(once), self.seconds(once)))
            found[run.__name__] = {
                "unseen_s": statistics.median(first for first, _ in pairs[1:]),
                "seen_s": statistics.median(again for _, again in pairs[1:]),
                "unseen_over_seen": statistics.median(one / two for one, two in pairs[1:]),
            }
        return found

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
        if not self.has_time_for("scores and orders"):
            return found
        options = MeasureOptions(batch_size=4, layer_order=LayerCriterion.block_importance)
        found["scores_and_orders_s"] = self.seconds(lambda: measure(model, tokens, options))
        return found

    def evaluation(self) -> dict[str, Any]:
        """Loss of one sub-network on 64 x 1024 tokens, in place and as a model of its own."""
        supernet = SuperNetwork(self.build(GPT, self.config).eval().requires_grad_(False))
        half = self._uniform()["75 %"]
        tokens = self.ids(*((4, 65) if self.small else (64, 1025)))
        alone = self._exported(supernet, half)
        found: dict[str, Any] = {"tokens": f"{tokens.shape[0]} x {tokens.shape[1] - 1}"}
        for name, model in (("in_place_s", supernet.standalone(half)), ("alone_s", alone)):
            nats_per_token(model, tokens[:2])
            if name == "alone_s" and not self.has_time_for(name):
                break
            found[name] = self.seconds(lambda model=model: nats_per_token(model, tokens))
        return found

    def table(self) -> dict[str, Any]:
        """The latency table of the v3 joint space: time to build, and error of its sums."""
        space = load_space("v3-joint", self.config)
        load = Load(2, self.tokens, self.device, torch.bfloat16)
        path = self.out_dir / "bench_gpu_latency_table.json"
        path.unlink(missing_ok=True)
        table = LatencyTable(path, self.config, SupernetInfo.default(self.config), load)
        subs = calibration_networks(space, 4 if self.small else 6, 0)
        found: dict[str, Any] = {"networks": len(subs)}
        for phase in Phase:
            if found.keys() != {"networks"} and not self.has_time_for(phase.value):
                break
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
        longest = min(4096, self.config.block_size)
        prompts = ((2, 64), (1, 128)) if self.small else ((2, 512), (1, longest))
        found: dict[str, Any] = {}
        for name, sub in {**self._uniform(), **self._varied()}.items():
            if found and not self.has_time_for(name):
                continue
            model = self._exported(supernet, sub)
            found[name] = {"params": sum(p.numel() for p in model.parameters())}
            for batch, tokens in prompts:
                timing = prefill_latency(model, batch=batch, tokens=tokens)
                found[name][f"prefill_{batch}x{tokens}_ms"] = timing.median_ms
            for batch in (1, 16):
                timing = decode_latency(model, batch=batch, context=prompts[0][1])
                found[name][f"decode_{batch}_ms"] = timing.median_ms
        return found

    def smollm2(self) -> dict[str, Any]:
        """The whole line through the commands, on the text that ships with the package."""
        folder, text = self.out_dir / "smollm2", bundled_checkpoint()
        shutil.rmtree(folder, ignore_errors=True)
        front = ("--front", folder / "front" / "front.json")
        train = ("--data.files", text / "train.jsonl")
        valid = ("--data.files", text / "valid.jsonl", "--data.num_blocks", 8 if self.small else 64)
        length = ("--data.block_size", 64 if self.small else 512)
        blocks = ("--data.num_blocks", 8 if self.small else 128)
        trials, steps = (4, 2) if self.small else (30, 30)
        few = ("--report.num_subnetworks", 0)
        lines = {
            "importance": ("importance", self.checkpoint_dir, *train, *length, *blocks, *few),
            "search": (
                "search", folder / "importance", *valid, *length, "--num_trials", trials,
                "--objectives", "val_loss,num_params",
            ),
            "finetune": (
                "finetune", folder / "importance", *train, *length, "--valid.files",
                text / "valid.jsonl", "--valid.num_blocks", 8 if self.small else 64,
                "--trainer.max_steps", steps,
            ),
            "export": ("export", folder / "finetune", *front, "--index", 0, "--format", "hf"),
            "evaluate": (
                "evaluate", folder / "finetune", *front, "--index", "[0]", *valid, *length,
            ),
        }  # fmt: skip
        outputs = {"search": folder / "front"}
        found: dict[str, Any] = {}
        for name, (command, source, *words) in lines.items():
            if found and not self.has_time_for(name):
                break
            where = ("--checkpoint_dir", source, "--out_dir", outputs.get(name, folder / name))
            line = [command, *map(str, where), *map(str, words)]
            status = 0

            def run(line=line) -> None:
                nonlocal status
                status = nas(line)

            found[name] = {"seconds": self.seconds(run), "status": status}
            self.free()
            if status:
                break
        return found

    def _exported(self, supernet: SuperNetwork, sub: SubNetwork) -> Any:
        """A stand-alone model with memory of its own."""
        model = self.build(assemble, supernet.plan(sub)).eval().requires_grad_(False)
        model.load_state_dict(supernet.slices(sub))
        return model

    def _uniform(self) -> dict[str, SubNetwork]:
        """The whole model and aligned members near 90, 75 and 50 % of its parameters."""
        space, count = load_space("aligned", self.config), parameter_counter(self.config)
        grid = build_grid(space, count, seed=0, num_bins=30).subs
        full = SubNetwork.from_config(self.config)

        def nearest(share: float) -> SubNetwork:
            return min(grid, key=lambda sub: abs(count(sub) - share * count(full)))

        return {"100 %": full, **{f"{p} %": nearest(p / 100) for p in SHARES}}

    def _varied(self) -> dict[str, SubNetwork]:
        """Networks of the same numbers of parameters whose layers differ."""
        count = parameter_counter(self.config)
        whole = count(SubNetwork.from_config(self.config))

        def nearest(share: float) -> SubNetwork:
            space, rng = self._varied_space(share), random.Random(0)
            drawn = [space.sample(rng) for _ in range(100)]
            return min(drawn, key=lambda sub: abs(count(sub) - share * whole))

        return {f"{p} % per layer": nearest(p / 100) for p in SHARES}

    def _varied_space(self, share: float) -> Any:
        """Heads and neurons per layer around a share of all parameters; tables stay whole."""
        config = self.config
        tables = 2 * config.padded_vocab_size * config.n_embd / num_params(config)
        middle = (share - tables) / (1 - tables)
        apart = min(1 - middle, 0.25)

        def sizes(full: int, step: int) -> list[int]:
            low, high = (round((middle + d) * full / step) for d in (-apart, apart))
            return [step * at for at in range(max(1, low), high + 1)]

        return load_space(
            {
                "intermediate_size": sizes(config.intermediate_size, 32 if self.small else 128),
                "n_query_groups": sizes(config.n_query_groups, 1),
                "per_layer": ["intermediate_size", "n_query_groups"],
            },
            config,
        )


def sub_config(config: Any, sub: SubNetwork) -> Any:
    """Config of a sub-network."""
    return plan_slices(sub, config).config


SHARES = (90, 75, 50)  # per cent of the parameters
# The order in which they run, and their shares of the time.
PARTS = {
    "step": 0.2, "latency": 0.17, "evaluation": 0.06, "unseen": 0.1, "importance": 0.17,
    "smollm2": 0.15, "table": 0.15,
}  # fmt: skip


def last_moments(parts: list[str], begin: float, seconds: float) -> dict[str, float]:
    """When each part must begin nothing more, so that those behind it have their shares."""
    total, done, found = sum(PARTS[part] for part in parts), 0.0, {}
    for part in parts:
        done += PARTS[part]
        found[part] = begin + seconds * done / total
    return found


def kept_parts(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What a file of the same device and model holds.

    Raises:
        ValueError: if it is of another one.
    """
    if not path.is_file():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    for name in ("device", "model"):
        if kept.get(name) != about[name]:
            raise ValueError(
                f"--out {path} has figures of {kept.get(name)}, these are of {about[name]}: give "
                "another file"
            )
    return {part: kept[part] for part in PARTS if part in kept}


def main() -> None:
    """Run the parts one after the other; each is written as soon as it is there."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smollm2", type=Path, default=os.environ.get("SMOLLM2") or None)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--small", action="store_true", help="a few layers, on any device")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.small:
        parser.error("torch sees no CUDA device here; --small tries everything on the CPU")
    if options.smollm2 is not None and not options.smollm2.is_dir():
        parser.error(f"--smollm2 {options.smollm2} is not a directory")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "model": options.model + (", small" if options.small else ""),
        "skipped": [],
    }
    try:
        results |= kept_parts(options.out, results)
    except ValueError as error:
        parser.error(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.model, options.out.parent, small=options.small, smollm2=options.smollm2)
    results["matmul_flops"] = bench.matmul_flops()
    wanted = [part for part in PARTS if part in options.parts]
    if options.smollm2 is None and "smollm2" in wanted:
        wanted.remove("smollm2")
        results["skipped"].append("smollm2: no SMOLLM2=<checkpoint> was given")
    until = last_moments(wanted, began, 60 * options.minutes)
    for part in wanted:
        start = time.monotonic()
        if start >= began + 60 * options.minutes:
            results["skipped"].append(part)
            continue
        bench.until, bench.left_out = until[part], []
        found = getattr(bench, part)()
        bench.free()
        found["took_s"] = time.monotonic() - start
        results["skipped"] += [f"{part}: {what}" for what in bench.left_out]
        results[part] = found
        print(part, json.dumps(found, indent=1), flush=True)
        write(options.out, results)
    write(options.out, results)
    if results["skipped"]:
        print("left out:", ", ".join(results["skipped"]))


def write(path: Path, results: dict[str, Any]) -> None:
    """All of it, or what was there before."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
