"""What a sandwich step costs over litgpt's LoRA steps of the same four networks built alone.

    python scripts/bench/bench_training.py [--out training.json] [--rounds 9]
        [--distillation forward_kl] [--full] [--teacher original] [--busy] [--unseen 32]

A step is forward, backward and AdamW on the same batch, for the full network, the smallest and two
members of a grid. litgpt's steps are those of its own `finetune lora`: the head in chunks of 128
positions, `chunked_cross_entropy`. Both sides run in turn in one process; ratios are medians of
the ratios of neighbouring runs. The instruction batches come from ../shared/data.

With `--unseen <layers>`: what a step costs whose sampled networks have shapes that no step had
before, over the same step again, in a model of so many layers.
"""

import argparse
import copy
import json
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import torch
from litgpt import GPT, Config, lora
from litgpt.utils import chunked_cross_entropy

from whittle_nas.metrics.measured import peak_memory_bytes
from whittle_nas.space import load_space
from whittle_nas.space.samplers import build_grid
from whittle_nas.train.batches import IGNORE, Sample, collate, from_labelled
from whittle_nas.train.forward import labels_of
from whittle_nas.train.options import IN_PLACE, ORIGINAL, Distillation, LossOptions
from whittle_nas.train.step import Network, Role, accumulate, finish_gradients
from whittle_nas.train.teacher import Teacher, has_adapters, without_adapters
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.supernet import SuperNetwork

DATA = Path(__file__).parents[3] / "shared" / "data"
CONFIG = lora.Config(
    name="bench", n_layer=8, n_head=8, n_query_groups=4, n_embd=256, head_size=32,
    intermediate_size=688, vocab_size=50277, padded_vocab_size=50432, block_size=1024,
    mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", bias=False, parallel_residual=False,
    rotary_percentage=1.0, lora_r=8, lora_alpha=16, lora_query=True, lora_key=True,
    lora_value=True, lora_projection=True, lora_mlp=True, lora_head=True,
)  # fmt: skip


class Sandwich:
    """Our step: all networks inside one super-network."""

    def __init__(self, networks: list[Network], supernet: SuperNetwork, loss: LossOptions) -> None:
        self.networks, self.supernet, self.loss = networks, supernet, loss
        frozen = loss.distillation is not Distillation.none and loss.teacher == ORIGINAL
        self.teacher = Teacher(original(supernet)) if frozen else None
        self.trained = [p for p in supernet.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def step(self, batch: Sample) -> None:
        """One optimiser step."""
        accumulate(self.supernet, batch, self.networks, self.loss, teacher=self.teacher)
        finish_gradients(self.trained, len(labels_of(batch)))
        self.optimizer.step()
        self.optimizer.zero_grad()


def original(supernet: SuperNetwork) -> SuperNetwork:
    """The model before its training: adapters off, or a frozen copy."""
    if has_adapters(supernet.model):
        return without_adapters(supernet, without_lora(CONFIG))
    return SuperNetwork(copy.deepcopy(supernet.model).requires_grad_(False).eval())


def without_lora(config: lora.Config) -> Config:
    """The plain config: by the other one litgpt's own GPT, too, gets MLPs with adapters."""
    return Config(**{field.name: getattr(config, field.name) for field in fields(Config)})


class Alone:
    """litgpt's own step of one network."""

    def __init__(self, network: Network, supernet: SuperNetwork) -> None:
        self.model = type(supernet.model)(supernet.plan(network.sub).config)
        self.model.load_state_dict({n: t.clone() for n, t in supernet.slices(network.sub).items()})
        if isinstance(self.model, lora.GPT):
            lora.mark_only_lora_as_trainable(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(self, batch: Sample) -> None:
        """One optimiser step; `labels` belong to the positions before, as ours do."""
        logits = self.model(batch.input_ids, lm_head_chunk_size=128)
        chunked_cross_entropy(logits, batch.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_supernet(config: lora.Config, *, full: bool) -> SuperNetwork:
    """Random weights, all trained or their adapters."""
    torch.manual_seed(0)
    model = GPT(without_lora(config)) if full else lora.GPT(config)
    if not full:
        lora.mark_only_lora_as_trainable(model)
    return SuperNetwork(model)


def make_sides(loss: LossOptions, *, full: bool) -> tuple[Sandwich, Sandwich, list[Alone]]:
    """Our step, the same without a teacher, and litgpt's, all with equal weights."""
    supernet = make_supernet(CONFIG, full=full)
    space = load_space("aligned", CONFIG)
    grid = build_grid(space, parameter_counter(CONFIG), seed=0, num_bins=4).subs
    networks = [Network(supernet.full, Role.full)]
    networks += [Network(sub, Role.sampled) for sub in grid[1:3]]
    networks.append(Network(space.smallest, Role.smallest))
    labels = replace(loss, distillation=Distillation.none)
    plain = Sandwich(networks, supernet, labels)
    return Sandwich(networks, supernet, loss), plain, [Alone(n, supernet) for n in networks]


def random_batches(count: int) -> list[tuple[Sample, Sample]]:
    """4 x 256 random tokens, every one a label; the same for both sides."""
    batches = []
    for _ in range(count):
        tokens = torch.randint(CONFIG.vocab_size, (4, 257))
        batch = Sample(tokens[:, :-1], tokens[:, 1:])
        batches.append((batch, batch))
    return batches


def instruction_batches(name: str, count: int) -> list[tuple[Sample, Sample]]:
    """Batches of 4 with masked prompts, in our form and in litgpt's collated form."""
    from litgpt.data import JSON, get_sft_collate_fn
    from litgpt.tokenizer import Tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = JSON(DATA / "instruct" / name, mask_prompt=True, val_split_fraction=0.05)
    tokenizer = Tokenizer(DATA / "tokenizers" / "neox20b")
    tokenizer.eos_id = 0  # <|endoftext|>; the folder holds the vocabulary only
    module.connect(tokenizer, batch_size=4, max_seq_length=512)
    module.setup()
    together = get_sft_collate_fn(max_seq_length=512, ignore_index=IGNORE)
    assert module.train_dataset is not None
    rows = [module.train_dataset[i] for i in range(4 * count)]
    batches = []
    for at in range(0, len(rows), 4):
        ours = collate([from_labelled(r["input_ids"], r["labels"]) for r in rows[at : at + 4]])
        theirs = together(rows[at : at + 4])
        labels = torch.full_like(theirs["labels"], IGNORE)
        labels[:, :-1] = theirs["labels"][:, 1:]  # their loss leaves the last position out
        batches.append((ours, Sample(theirs["input_ids"], labels)))
    return batches


def clock(now, run, *arguments) -> float:
    """Milliseconds of one call, by a clock in seconds."""
    start = now()
    run(*arguments)
    return 1e3 * (now() - start)


def measure(
    ours: Sandwich,
    plain: Sandwich,
    alone: list[Alone],
    batches: list[tuple[Sample, Sample]],
    now=time.perf_counter,
) -> dict:
    """Times of all sides on every batch, their ratios, and the peak memory of a step."""
    ours.step(batches[0][0])
    plain.step(batches[0][0])
    for one in alone:
        one.step(batches[0][1])
    pairs = []
    for turn, (batch, theirs) in enumerate(batches):
        times = {}
        for side in ("ours", "plain", "alone") if turn % 2 else ("alone", "plain", "ours"):
            models, rows = {
                "ours": ([ours], batch),
                "plain": ([plain], batch),
                "alone": (alone, theirs),
            }[side]
            times[side] = sum(clock(now, model.step, rows) for model in models)
        pairs.append((times["ours"], times["alone"], times["plain"]))
    cpu = torch.device("cpu")
    largest = max(batches, key=lambda pair: pair[1].input_ids.numel())
    peak = peak_memory_bytes(lambda: ours.step(largest[0]), cpu)
    peak_alone = peak_memory_bytes(lambda: alone[0].step(largest[1]), cpu)
    labels = sum(int((b.labels != IGNORE).sum()) for _, b in batches)
    return {
        "sandwich_ms": statistics.median(a for a, _, _ in pairs),
        "four_alone_ms": statistics.median(b for _, b, _ in pairs),
        "ratio": statistics.median(a / b for a, b, _ in pairs),
        "over_no_distillation": statistics.median(a / c for a, _, c in pairs),
        "labelled_share": labels / sum(b.labels.numel() for _, b in batches),
        "peak_mb": peak / 2**20,
        "peak_mb_full_alone": peak_alone / 2**20,
        "peak_ratio": peak / peak_alone,
    }


def measure_unseen(layers: int, rounds: int, now: Callable[[], float], *, full: bool) -> dict:
    """Steps of the whole network and of two per-layer ones that are new in every round, and again.

    The gradients alone are timed: the optimiser's step does not know shapes.
    """
    supernet = make_supernet(replace(CONFIG, n_layer=layers), full=full)
    varied = {
        "n_embd": {"min": "half", "max": "full"},
        "intermediate_size": {"min": "half", "max": "full"},
        "n_query_groups": {"min": "half", "max": "full"},
        "n_layer": {"min": layers - 2, "max": "full"},
        "per_layer": ["intermediate_size", "n_query_groups"],
    }
    space, rng = load_space(varied, supernet.config), random.Random(0)
    whole, loss = Network(supernet.full, Role.full), LossOptions(Distillation.none)
    pairs = []
    for batch, _ in random_batches(rounds + 1):
        networks = [whole, *(Network(space.sample(rng), Role.sampled) for _ in range(2))]
        pairs.append([clock(now, accumulate, supernet, batch, networks, loss) for _ in range(2)])
    pairs = pairs[1:]  # the first warms up
    return {
        "layers": layers,
        "unseen_ms": statistics.median(first for first, _ in pairs),
        "seen_ms": statistics.median(second for _, second in pairs),
        "unseen_over_seen": statistics.median(first / second for first, second in pairs),
    }


def main() -> None:
    """Run everything, print it and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("training.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--distillation", type=Distillation, default=Distillation.none)
    parser.add_argument("--teacher", choices=(ORIGINAL, IN_PLACE), default=ORIGINAL)
    parser.add_argument("--top_k", type=int, default=None)
    parser.add_argument("--full", action="store_true", help="train all weights, no adapters")
    parser.add_argument("--chunk_elements", type=int, default=None)
    parser.add_argument("--cases", nargs="+", help="of the batches, all by default")
    parser.add_argument("--unseen", type=int, metavar="LAYERS", help="this alone is measured")
    parser.add_argument(
        "--busy", action="store_true", help="CPU time of one thread, where the machine is not quiet"
    )
    options = parser.parse_args()
    if options.busy:
        torch.set_num_threads(1)
    now = time.process_time if options.busy else time.perf_counter
    if options.unseen:
        measured = measure_unseen(options.unseen, options.rounds, now, full=options.full)
        print(measured, flush=True)
        options.out.write_text(json.dumps(measured, indent=2) + "\n")
        return
    loss = LossOptions(
        options.distillation,
        teacher=options.teacher,
        teacher_top_k=options.top_k,
        chunk_elements=options.chunk_elements,
    )
    ours, plain, alone = make_sides(loss, full=options.full)
    results: dict[str, object] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "distillation": options.distillation.value,
        "teacher": options.teacher,
        "trained": "all weights" if options.full else "adapters",
        "networks": [asdict(network.sub) for network in ours.networks],
    }
    cases = {"random_4x256": random_batches(options.rounds)}
    for name in ("alpaca_en_demo", "gsm_8k_train_alpaca_format", "gpteacher_roleplay"):
        if (DATA / "instruct" / f"{name}.json").is_file():
            cases[name] = instruction_batches(f"{name}.json", options.rounds)
    for name in options.cases or cases:
        results[name] = measured = measure(ours, plain, alone, cases[name], now)
        print(name, {key: round(value, 3) for key, value in measured.items()}, flush=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
