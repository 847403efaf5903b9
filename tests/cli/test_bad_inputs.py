"""Everything that can be wrong, for every command: exit 2, one sentence, nothing run or written.

Each row of a table is a command, options beside those that it needs, files that are written before
the run (None removes one), and words that the sentence has to hold. All paths are relative to a
folder with a checkpoint, text, a front and a search space that are right.
"""

import itertools
import json
import os
import pickle
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT, Config

from tests.cli.test_main import nas
from tests.conftest import fill_random, resized, tiny_config, uniform
from whittle_nas.space import SubNetwork
from whittle_nas.space.front import Front, FrontEntry
from whittle_nas.weights.checkpoint import write_checkpoint

Content = str | bytes | dict | list | None | Callable[[Path], object]

PROGRESS = re.compile(r"^[\w ,]+: \d+/\d+ \(\d\d:\d\d(, .*)?\)\n", re.MULTILINE)
HANG = 120  # seconds until a case is given up; each takes well under one
MARKER = "executed"
NEEDED = {
    "importance": "--checkpoint_dir checkpoint --out_dir out --data.files text.jsonl "
    "--data.block_size 32 --data.num_blocks 4 --layer_blocks 2",
    "finetune": "--checkpoint_dir checkpoint --out_dir out --data.files text.jsonl "
    "--data.block_size 32 --data.valid_fraction 0.1 --batch_size 2 --trainer.max_steps 2 "
    "--trainer.accelerator cpu --trainer.enable_progress_bar false --validation.num_networks 1",
    "search": "--checkpoint_dir checkpoint --out_dir out --data.files text.jsonl "
    "--data.block_size 32 --data.num_blocks 4 --search_blocks 2 --num_trials 4",
    "evaluate": "--checkpoint_dir checkpoint --out_dir out --data.files text.jsonl "
    "--data.block_size 32 --data.num_blocks 4",
    "export": "--checkpoint_dir checkpoint --out_dir out",
    "profile": "--checkpoint_dir checkpoint --out_dir out --tokens 8 --repeats 1",
}
# What makes each command read a file, beyond the needed options.
FRONT = {
    "evaluate": "--front front.json",
    "export": "--front front.json --index 0",
    "profile": "--front front.json",
}
SPACE = {
    "finetune": "--search_space space.yaml",
    "search": "--search_space space.yaml",
    "export": "--extreme smallest --search_space space.yaml",
    "profile": "--search_space space.yaml",
    "importance": "--report.num_subnetworks 2 --report.search_space space.yaml "
    "--data.valid_fraction 0.1",
}


class Hostile:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARKER,)


def hostile_pickle() -> bytes:
    return pickle.dumps(Hostile())


def hostile_torch_file(path: Path) -> None:
    """What `torch.save` makes of a dictionary of tensors and one other object."""
    torch.save({"lm_head.weight": torch.zeros(1), "more": Hostile()}, path)


def hostile_yaml(key: str = "n_layer") -> str:
    return f"{key}: !!python/object/apply:os.mkdir [{MARKER}]\n"


def bomb(key: str = "n_layer") -> str:
    """A few lines that unfold to 10^12 values."""
    lines = ["- &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return f"{key}:\n" + "\n".join(f"  {line}" for line in lines) + "\n"


GARBAGE = bytes(range(256)) * 8
DEEP = "[" * 5000


TURNS = itertools.count()


@dataclass(frozen=True)
class Case:
    command: str
    options: str = ""
    files: dict[str, Content] = field(default_factory=dict)
    words: str = ""
    slow: bool = False

    def __str__(self) -> str:
        made = ",".join(self.files)
        return re.sub(r"[^\w.,=-]+", " ", f"{self.command} {self.options} {made}").strip()[:90]


def every(commands: dict[str, str] | list[str], files: dict[str, Content], words: str):
    """The same mistake for several commands, which take turns in the tests that are not slow."""
    options = commands if isinstance(commands, dict) else dict.fromkeys(commands, "")
    turn = next(TURNS) % len(options)
    return [
        Case(command, option, files, words, slow=number != turn)
        for number, (command, option) in enumerate(options.items())
    ]


def options_of(command: str, *rows: tuple[str, str]) -> list[Case]:
    return [Case(command, options, {}, words) for options, words in rows]


def config(**changes: object) -> Callable[[Path], object]:
    """The model's own configuration with some values changed."""

    def write(path: Path) -> None:
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))

    return write


def cut(share: float) -> Callable[[Path], object]:
    """The first part of a file."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return write


def not_finite(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        tensor.fill_(float("nan"))


def too_large_for_float16(state: dict[str, torch.Tensor]) -> None:
    state["lm_head.weight"][0, 0] = 1e6


def front_with(*, entry: dict | None = None, **changes: object) -> Callable[[Path], object]:
    """The right front with changes to it, or to its first entry."""

    def write(path: Path) -> None:
        spec = {**json.loads(path.read_text()), **changes}
        spec["front"][0:1] = [{**item, **(entry or {})} for item in spec["front"][0:1]]
        path.write_text(json.dumps(spec))

    return write


ALL = list(NEEDED)
READERS = ["importance", "finetune", "search", "evaluate"]  # of text and of the tokenizer
WEIGHTS, MODEL = "checkpoint/lit_model.pth", "checkpoint/model_config.yaml"
INFO, TOKENIZER = "checkpoint/supernet.yaml", "checkpoint/tokenizer.json"

CHECKPOINTS = [
    *every(dict.fromkeys(ALL, "--checkpoint_dir nowhere"), {}, "--checkpoint_dir nowhere"),
    *every(dict.fromkeys(ALL, "--checkpoint_dir text.jsonl"), {}, "text.jsonl"),
    *every(ALL, {WEIGHTS: None}, "lit_model.pth missing"),
    *every(ALL, {MODEL: None}, "model_config.yaml missing"),
    *every(ALL, {WEIGHTS: ""}, "lit_model.pth"),
    *every(ALL, {WEIGHTS: GARBAGE}, "lit_model.pth"),
    *every(ALL, {WEIGHTS: cut(0.5)}, "lit_model.pth"),
    *every(ALL, {WEIGHTS: hostile_pickle()}, "lit_model.pth"),
    *every(ALL, {WEIGHTS: hostile_torch_file}, "lit_model.pth"),
    *every(ALL, {WEIGHTS: tensors(lambda state: state.popitem())}, "lit_model.pth lacks"),
    *every(ALL, {WEIGHTS: tensors(lambda s: s.update(x=torch.ones(1)))}, "unknown parameter 'x'"),
    *every(ALL, {MODEL: hostile_yaml()}, "model_config.yaml is not valid YAML"),
    *every(ALL, {MODEL: ""}, "model_config.yaml"),
    *every(ALL, {MODEL: GARBAGE}, "model_config.yaml"),
    *every(ALL, {MODEL: DEEP}, "model_config.yaml"),
    *every(ALL, {MODEL: bomb()}, "model_config.yaml"),
    *every(ALL, {MODEL: "- 1\n"}, "model_config.yaml"),
    *every(ALL, {MODEL: config(n_layer=10**9)}, "n_layer=1000000000"),
    *every(ALL, {MODEL: config(n_layer=500)}, "lit_model.pth lacks"),
    *every(ALL, {MODEL: config(n_embd=10**12)}, "n_embd=1000000000000"),
    *every(ALL, {MODEL: config(n_embd=10**6)}, "lit_model.pth"),
    *every(ALL, {MODEL: config(block_size=10**9)}, "block_size=1000000000"),
    *every(ALL, {MODEL: config(padded_vocab_size=10**15)}, "padded_vocab_size"),
    *every(ALL, {MODEL: config(n_head=-4)}, "model_config.yaml"),
    *every(ALL, {MODEL: config(n_layer=2.5)}, "n_layer=2.5"),
    *every(ALL, {MODEL: config(n_embd="48")}, "model_config.yaml"),
    *every(ALL, {MODEL: config(head_size=None, n_head=0)}, "model_config.yaml"),
    *every(ALL, {MODEL: config(n_query_groups=True)}, "n_query_groups=True"),
    *every(ALL, {MODEL: config(intermediate_size=float("nan"))}, "intermediate_size=nan"),
    *every(ALL, {MODEL: config(rotary_percentage=-1.0)}, "rotary_percentage"),
    *every(ALL, {MODEL: config(norm_class_name="Abnormal")}, "norm_class_name"),
    *every(ALL, {MODEL: config(n_expert="many", no_such_key=1)}, "no_such_key"),
    *every(ALL, {INFO: hostile_yaml("layer_order")}, "supernet.yaml is not valid YAML"),
    *every(ALL, {INFO: ""}, "supernet.yaml"),
    *every(ALL, {INFO: bomb("layer_order")}, "supernet.yaml"),
    *every(ALL, {INFO: "layer_order: [0, 1, 5]\nhead_channels: rope\n"}, "layer_order=[0, 1, 5]"),
    *every(ALL, {INFO: "layer_order: ['0', 1, 2]\nhead_channels: rope\n"}, "layer_order"),
    *every(ALL, {INFO: "layer_order: [0, 1, 2]\nhead_channels: last\n"}, "supernet.yaml"),
    *every(ALL, {INFO: "layer_order: [0, 1, 2]\nhead_channels: rope\nmore: 1\n"}, "more"),
    *every(
        {"search": "", "export": "--extreme smallest", "profile": ""},
        {INFO: "layer_order: [0, 1, 2]\nhead_channels: rope\nsearch_space: {depth: 3}\n"},
        "unknown dimension depth",
    ),
    *every(READERS, {TOKENIZER: None}, "tokenizer"),
    *every(READERS, {TOKENIZER: ""}, "tokenizer"),
    *every(READERS, {TOKENIZER: GARBAGE}, "tokenizer"),
    *every(READERS, {TOKENIZER: cut(0.5)}, "tokenizer"),
    *every(READERS, {TOKENIZER: hostile_pickle()}, "tokenizer"),
    *every(READERS, {TOKENIZER: None, "checkpoint/tokenizer.model": GARBAGE}, "tokenizer"),
    *every(READERS, {"checkpoint/tokenizer_config.json": "{"}, "tokenizer"),
    *every(READERS, {"checkpoint/generation_config.json": GARBAGE}, "checkpoint"),
    Case("search", "", {"checkpoint/grid.yaml": hostile_yaml("members")}, "grid.yaml"),
    Case("search", "", {"checkpoint/grid.yaml": "members: [{n_layer: 2}]"}, "grid.yaml"),
    Case("search", "", {"checkpoint/grid.yaml": GARBAGE}, "grid.yaml"),
    Case("export", "--extreme smallest --format hf", {"checkpoint/config.json": GARBAGE}, "config"),
    Case("export", "--extreme smallest --format hf", {"checkpoint/config.json": "[]"}, "config"),
    Case(
        "importance",
        "",
        {
            INFO: "layer_order: [0, 1, 2]\nhead_channels: rope\nimportance: {}\n",
            "checkpoint/importance.safetensors": hostile_pickle(),
        },
        "importance.safetensors",
    ),
    *every(
        {**dict.fromkeys(ALL, ""), "export": "--extreme largest"},
        {WEIGHTS: tensors(not_finite)},
        "finite",
    ),
    *every(
        {
            "evaluate": "--dtype float16",
            "export": "--extreme largest --dtype float16",
            "profile": "--dtype float16",
        },
        {WEIGHTS: tensors(too_large_for_float16)},
        "not finite in float16",
    ),
    Case(
        "export",
        "--extreme largest --format hf --dtype float16",
        {WEIGHTS: tensors(too_large_for_float16)},
        "not finite in float16",
    ),
]

TEXT = "text.jsonl"
TEXTS = [
    *every(READERS, {TEXT: None}, "text.jsonl"),
    *every(READERS, {TEXT: ""}, "text.jsonl"),
    *every(READERS, {TEXT: GARBAGE}, "text.jsonl"),
    *every(READERS, {TEXT: hostile_pickle()}, "text.jsonl"),
    *every(READERS, {TEXT: '{"text": "one"}\n{"text": \n'}, "line 2"),
    *every(READERS, {TEXT: '{"body": "one"}\n'}, "no column 'text'"),
    *every(READERS, {TEXT: '{"text": "one"}\n'}, "text.jsonl"),
    *every(READERS, {TEXT: '["text", 3]\n'}, "text.jsonl"),
    *every(READERS, {TEXT: DEEP}, "text.jsonl"),
    *every(dict.fromkeys(READERS, "--data.files [text.jsonl,out]"), {}, "out"),
    *every(dict.fromkeys(READERS, "--data.files checkpoint"), {}, "checkpoint"),
    *every(dict.fromkeys(READERS, "--data.block_size 4096"), {}, "block_size=4096"),
    *every(dict.fromkeys(READERS, "--data.block_size -1"), {}, "block_size=-1"),
    *every(dict.fromkeys(READERS, "--data.num_blocks 0"), {}, "num_blocks=0"),
    *every(dict.fromkeys(READERS, "--data.num_documents 0"), {}, "num_documents=0"),
    *every(dict.fromkeys(READERS, "--data.valid_fraction 1"), {}, "valid_fraction=1"),
    *every(dict.fromkeys(READERS, "--data.valid_fraction nan"), {}, "valid_fraction"),
    *every(dict.fromkeys(READERS, "--data.column body"), {}, "body"),
    *every(dict.fromkeys(READERS, "--data.hub somewhere"), {}, "exactly one of"),
    *every(dict.fromkeys(READERS, "--data.files null --data.module Alpacca"), {}, "Alpacca"),
    *every(dict.fromkeys(READERS, "--data.sources [{weight: 1}]"), {}, "data"),
    *every(
        dict.fromkeys(READERS, "--data data.yaml"), {"data.yaml": hostile_yaml("files")}, "data"
    ),
    *every(
        dict.fromkeys(READERS, "--data.files null --data.hub folder"),
        {
            "folder/data.pkl": hostile_pickle(),
            "folder/folder.py": f"import os\nos.mkdir({MARKER!r})",
        },
        "folder",
    ),
]

FRONTS = [
    *every(FRONT, {"front.json": None}, "front.json can't be read"),
    *every(FRONT, {"front.json": ""}, "front.json is not valid JSON"),
    *every(FRONT, {"front.json": GARBAGE}, "front.json is not valid JSON"),
    *every(FRONT, {"front.json": DEEP}, "front.json is not valid JSON"),
    *every(FRONT, {"front.json": cut(0.7)}, "front.json is not valid JSON"),
    *every(FRONT, {"front.json": hostile_pickle()}, "front.json"),
    *every(FRONT, {"front.json": []}, "front.json"),
    *every(FRONT, {"front.json": front_with(format=2)}, "it has format 2"),
    *every(FRONT, {"front.json": front_with(objectives=[])}, "front.json"),
    *every(FRONT, {"front.json": front_with(objectives=["speed"])}, "speed"),
    *every(FRONT, {"front.json": front_with(entry={"index": "../../up"})}, "'../../up'"),
    *every(FRONT, {"front.json": front_with(entry={"index": -1})}, "front.json"),
    *every(FRONT, {"front.json": front_with(entry={"index": 1})}, "index twice"),
    *every(FRONT, {"front.json": front_with(entry={"subnetwork": {"n_layer": 1}})}, "n_embd"),
    *every(FRONT, {"front.json": front_with(entry={"metrics": {"val_loss": "low"}})}, "'low'"),
    *every(FRONT, {"front.json": front_with(entry={"metrics": {"val_loss": float("nan")}})}, "not"),
    *every(FRONT, {"front.json": front_with(entry={"layers": ["../x"]})}, "'../x'"),
    *every(
        FRONT,
        {"front.json": front_with(entry={"subnetwork": uniform(10**9, 8, 4, 8, 72, 3).to_dict()})},
        "",
    ),
    *every(FRONT, {"front.json": front_with(checkpoint_dir=["../x"])}, "front.json"),
    *every(FRONT, {"front.json": front_with(how_measured=[[]])}, "how_measured"),
    Case("export", "--front front.json --index 9", {}, "--index 9"),
    Case("export", "--front front.json", {}, "--index or --pick"),
    Case("export", "--extreme largest --pick 'num_params <= 1e9'", {}, "--pick num_params <= 1e9"),
    Case("export", "--extreme largest --index 0", {}, "--index 0"),
    Case("export", "--front front.json --pick 'num_params'", {}, "'num_params' must be a metric"),
    Case("export", "--front front.json --pick 'num_params <= lots'", {}, "'num_params <= lots'"),
    Case("export", "--front front.json --pick 'speed <= 1'", {}, "'speed'"),
    Case("export", "--front front.json --pick 'num_params <= 1'", {}, "num_params <= 1"),
    Case("evaluate", "--front front.json --index 9", {}, "--index 9"),
    Case("evaluate", "--front front.json --index two", {}, "index"),
    Case("profile", "--front front.json --pick 'num_params <= nan'", {}, "nan"),
]

SPACES = [
    *every(SPACE, {"space.yaml": None}, "space.yaml"),
    *every(SPACE, {"space.yaml": hostile_yaml()}, "space.yaml is not valid YAML"),
    *every(SPACE, {"space.yaml": ""}, "search space"),
    *every(SPACE, {"space.yaml": GARBAGE}, "space.yaml"),
    *every(SPACE, {"space.yaml": "n_layers: [1]\n"}, "n_layers"),
    *every(SPACE, {"space.yaml": "n_layer: [1, two]\n"}, "'two'"),
    *every(SPACE, {"space.yaml": "n_layer: [0, 1]\n"}, "n_layer"),
    *every(SPACE, {"space.yaml": "n_embd: [48, 4096]\n"}, "4096"),
    *every(SPACE, {"space.yaml": "n_embd: {min: 8, max: full, stride: 2}\n"}, "stride"),
    *every(SPACE, {"space.yaml": "n_embd: {min: 40, max: 8}\n"}, "n_embd"),
    *every(SPACE, {"space.yaml": "n_head: [5]\n"}, "n_head"),
    *every(SPACE, {"space.yaml": "head_size: [3]\n"}, "head_size=3"),
    *every(SPACE, {"space.yaml": "mlp_ratio: [.nan]\n"}, "mlp_ratio"),
    *every(SPACE, {"space.yaml": "mlp_ratio: [.inf]\n"}, "mlp_ratio"),
    *every(SPACE, {"space.yaml": "n_embd: {step: 0}\n"}, "step"),
    *every(SPACE, {"space.yaml": bomb("n_embd")}, "space.yaml"),
]

LISTS = [
    case
    for content, words in (
        (None, "list.yaml can't be read"),
        ("", "list.yaml"),
        (GARBAGE, "list.yaml is not valid YAML"),
        (hostile_yaml("members"), "list.yaml is not valid YAML"),
        (bomb("members"), "list.yaml"),
        ("members: [3]\n", "3"),
        ("- {n_layer: two, n_embd: 48}\n", "n_layer"),
        ("- {n_layers: 2}\n", "n_layers"),
        ("- {n_layer: 99}\n", "n_layer"),
    )
    for case in every(
        {
            "evaluate": "--subnetworks list.yaml",
            "finetune": "--sampler.kind fixed --sampler.file list.yaml",
        },
        {"list.yaml": content},
        words,
    )
] + [
    Case("evaluate", "--subnetworks list.yaml", {"list.yaml": [{"name": name, "n_layer": 1}]}, name)
    for name in ("../up", "/tmp/up", "..", ".hidden", "a/b", "pairs")
]

OUT_DIRS = [
    *every(dict.fromkeys(ALL, "--out_dir text.jsonl"), {}, "text.jsonl is a file"),
    *every(dict.fromkeys(ALL, "--out_dir text.jsonl/out"), {}, "inside the file"),
    *every(dict.fromkeys(ALL, "--out_dir /proc/1/out"), {}, "/proc/1/out can't be written"),
    *every(dict.fromkeys(ALL, f"--out_dir {'x' * 300}"), {}, "can't be written"),
    *every(dict.fromkeys(ALL, "--out_dir checkpoint"), {}, "--out_dir checkpoint"),
    *every(ALL, {"out/thesis.tex": "x"}, "not empty"),
    *every(ALL, {"out": lambda path: path.symlink_to("nowhere")}, "--out_dir out"),
    *every(
        dict.fromkeys(
            ["importance", "finetune", "export"], "--out_dir checkpoint --overwrite true"
        ),
        {},
        "--out_dir checkpoint",
    ),
    *every(
        dict.fromkeys(["search", "evaluate", "profile"], "--out_dir checkpoint --overwrite true"),
        {},
        "--out_dir checkpoint",
    ),
    *every(dict.fromkeys(ALL, "--config r.yaml"), {"r.yaml": 'out_dir: "out\\0x"\n'}, "out_dir"),
]

CONFIGS = [
    *every(dict.fromkeys(ALL, "--config r.yaml"), {}, "r.yaml"),
    *every(dict.fromkeys(ALL, "--config r.yaml"), {"r.yaml": hostile_yaml("out_dir")}, "r.yaml"),
    *every(dict.fromkeys(ALL, "--config r.yaml"), {"r.yaml": GARBAGE}, "r.yaml"),
    *every(dict.fromkeys(ALL, "--config r.yaml"), {"r.yaml": "outdir: x\n"}, "outdir"),
    *every(dict.fromkeys(ALL, "--config r.yaml"), {"r.yaml": "- 1\n"}, ""),
    *every(dict.fromkeys(ALL, "--config checkpoint"), {}, "checkpoint"),
    *every(dict.fromkeys(ALL, "--outdir x"), {}, "outdir"),
    *every(dict.fromkeys(ALL, "stray"), {}, "stray"),
    *every(dict.fromkeys(ALL, "--overwrite maybe"), {}, "overwrite"),
    *every(dict.fromkeys(ALL, "--checkpoint_dir"), {}, "checkpoint_dir"),
]

OPTIONS = [
    *options_of(
        "importance",
        ("--batch_size many", "many"),
        ("--batch_size 0", "--batch_size 0"),
        ("--micro_batch_size -1", "--micro_batch_size -1"),
        ("--layer_width 1.5", "--layer_width 1.5"),
        ("--layer_width nan", "layer_width"),
        ("--layer_blocks 0", "--layer_blocks 0"),
        ("--aggregation median", "median"),
        ("--scope galaxy", "galaxy"),
        ("--layer_order taste", "taste"),
        ("--neuron_activation none", "neuron_activation"),
        ("--head_activation none", "head_activation"),
        ("--dtype int3", "int3"),
        ("--device warp", "--device warp"),
        ("--seed 1e400", "seed"),
        (f"--seed {10**30}", "seed"),
        ("--report.num_subnetworks -1", "num_subnetworks"),
        ("--report.num_subnetworks 2 --data.valid_fraction 0", "--report.data.files"),
        ("--report.num_subnetworks 2 --report.data.files none.txt", "none.txt"),
    ),
    *options_of(
        "finetune",
        ("--batch_size 0", "--batch_size 0"),
        ("--batch_size 1.5", "batch_size"),
        ("--data.valid_fraction 0", "valid_fraction"),
        ("--valid.files none.txt", "none.txt"),
        ("--search_space nowhere", "nowhere"),
        ("--sampler.kind psychic", "psychic"),
        ("--sampler.kind fixed", "sampler.file"),
        ("--sampler.num_bins 0", "num_bins"),
        ("--sandwich.strategy club", "club"),
        ("--sandwich.num_random -1", "num_random"),
        ("--loss.distillation magic", "magic"),
        ("--loss.temperature 0", "temperature"),
        ("--loss.forward_share 2", "forward_share"),
        ("--loss.ce_weight nan", "ce_weight"),
        ("--lora.r 0", "lora.r=0"),
        ("--lora.dropout 1", "dropout"),
        ("--optimizer.lr 0", "lr"),
        ("--optimizer.lr nan", "lr"),
        ("--optimizer.beta1 2", "beta1"),
        ("--optimizer.weight_decay -1", "weight_decay"),
        ("--trainer.max_steps 0", "max_steps"),
        ("--trainer.accelerator abacus", "abacus"),
        ("--trainer.devices 0", "devices"),
        ("--trainer.devices some", "devices"),
        ("--trainer.strategy ddp_spawn", "ddp_spawn"),
        ("--trainer.precision 8-bit", "8-bit"),
        ("--trainer.gradient_clip_val 0", "gradient_clip_val"),
        ("--trainer.logger '[{class_path: no.Such}]'", "no.Such"),
        ("--trainer.callbacks '[{class_path: os.path}]'", "os.path"),
        ("--trainer.callbacks [3]", "3"),
        ("--validation.num_networks 0", "num_networks"),
        ("--loss.teacher orignal", "loss.teacher=orignal must be original, in_place or"),
        ("--num_workers -1", "num_workers"),
        (f"--seed {10**30}", "seed"),
        ("--require_importance true", "not sorted"),
        ("--resume perhaps", "resume"),
    ),
    *options_of(
        "search",
        ("--objectives val_loss", "two or more"),
        ("--objectives val_loss,speed", "'speed'"),
        ("--objectives [3,4]", "objectives"),
        ("--constraints 'num_params'", "'num_params'"),
        ("--constraints 'num_params <= much'", "much"),
        ("--constraints 'num_params <= inf'", "inf"),
        ("--constraints 'speed <= 3'", "'speed'"),
        ("--constraints 'num_params <= 1'", "nearest attainable"),
        ("--constraints 'num_params >= 9e9, flops <= 1'", "nearest attainable"),
        ("--budgets 'decode_ms_per_token <= 80%'", "add decode_ms_per_token to --objectives"),
        ("--budgets 'latency_ms <= 80%' --time_front false", "add latency_ms to --objectives"),
        ("--budgets 'speed <= 80%'", "'speed'"),
        ("--method magic", "magic"),
        ("--num_trials 0", "--num_trials 0"),
        ("--num_trials 1.5", "num_trials"),
        ("--search_blocks -3", "--search_blocks -3"),
        ("--batch_size 0", "batch_size"),
        ("--search_space nowhere", "nowhere"),
        ("--costs.batch 0", "--costs.batch 0"),
        ("--costs.tokens 5000", "--costs.tokens 5000"),
        ("--costs.calibrate 2", "--costs.calibrate 2"),
        ("--halving.first_blocks -1", "--halving.first_blocks"),
        ("--halving.first_blocks 2", "--halving.first_blocks"),
        ("--halving.first_blocks 1 --halving.keep 2", "--halving.keep 2"),
        ("--recovery.budget 'num_params <= 1e9'", "--recovery.data.files"),
        ("--recovery.budget 'num_params' --recovery.data.files text.jsonl", "num_params"),
        ("--devices 0", "--devices 0"),
        ("--device warp", "--device warp"),
        ("--device cpu,cuda:99", "cuda:99 is not there"),
        ("--device cpu,cpu --objectives val_loss,latency_ms", "on one device"),
        ("--dtype int3", "int3"),
        (f"--seed {10**30}", "seed"),
        ("--tasks.include_path nowhere --objectives '1 - quiz.acc,flops'", "nowhere"),
    ),
    *options_of(
        "evaluate",
        ("--data.files null", "data.files"),
        ("--limit 0", "--limit 0"),
        ("--limit nan", "limit"),
        ("--num_fewshot -1", "--num_fewshot -1"),
        ("--batch_size 0", "--batch_size 0"),
        ("--devices 0", "--devices 0"),
        ("--max_length 4096", "--max_length 4096"),
        ("--max_length 0", "--max_length 0"),
        ("--bootstrap_iters -1", "--bootstrap_iters -1"),
        ("--include_path nowhere", "nowhere"),
        ("--index 0", "--front"),
        ("--subnetwork.n_layer 99", "n_layer=99"),
        ("--subnetwork.n_layers 2", "n_layers"),
        ("--subnetwork.n_layer 1 --front front.json", "--subnetwork and --front"),
        ("--gen_kwargs 3", "gen_kwargs"),
        ("--device warp", "--device warp"),
        ("--device cpu,warp", "--device warp"),
        ("--device cpu,cpu --devices 2", "--device names 2"),
        ("--dtype int3", "int3"),
        (f"--seed {10**30}", "seed"),
    ),
    *options_of(
        "export",
        ("", "--subnetwork"),
        ("--extreme middle", "middle"),
        ("--extreme smallest --format gguf", "gguf"),
        ("--extreme smallest --dtype int3", "int3"),
        ("--extreme smallest --search_space nowhere", "nowhere"),
        ("--extreme smallest --subnetwork.n_layer 1", "--extreme"),
        ("--subnetwork.n_layer 0", "n_layer=0"),
        ("--subnetwork.n_layer 99", "n_layer=99"),
        ("--subnetwork.n_layer two", "two"),
        ("--subnetwork.n_layer true", "n_layer"),
        ("--subnetwork.n_embd -8", "n_embd=-8"),
        ("--subnetwork.n_embd 1e3", "n_embd"),
        ("--subnetwork.n_head 6", "n_head=6"),
        ("--subnetwork.head_size 3", "head_size=3"),
        ("--subnetwork.depth 3", "depth"),
        ("--index 0", "--front"),
    ),
    *options_of(
        "profile",
        ("--model_name pythia-14m", "either"),
        ("--checkpoint_dir null", "--checkpoint_dir or --model_name"),
        ("--checkpoint_dir null --model_name GPT-9", "GPT-9"),
        ("--checkpoint_dir null --model_name Mixtral-8x7B-v0.1", "mixture of experts"),
        ("--batch 0", "--batch 0"),
        ("--tokens 0", "--tokens 0"),
        ("--tokens 99999", "--tokens 99999"),
        ("--repeats 0", "--repeats 0"),
        ("--measure maybe", "measure"),
        ("--table table.json --table_networks 2", "--table_networks 2"),
        ("--table text.jsonl", "text.jsonl"),
        ("--table checkpoint", "checkpoint"),
        ("--subnetwork.n_embd 10000", "n_embd=10000"),
        ("--index 0", "--front"),
        ("--device cpu,cpu", "this command runs on one device"),
        ("--device cuda:99", "cuda:99"),
        ("--dtype int3", "int3"),
        (f"--seed {10**30}", "seed"),
    ),
]

# These read lm-eval's index of all tasks first, which takes some seconds.
TASKS = [
    Case("evaluate", "--data.files null --tasks nonsense", {}, "'nonsense'", slow=True),
    Case("search", "--objectives '1 - nonsense.acc,flops'", {}, "'nonsense'", slow=True),
    Case(
        "search",
        "--method ilp --candidates library --start_from front.json",
        {},
        "--start_from front.json",
    ),
    *(
        Case(
            "evaluate",
            "--data.files null --tasks evil --include_path tasks",
            {"tasks/evil.yaml": content},
            "'evil'",
            slow=True,
        )
        for content in ("task: evil\n" + hostile_yaml("dataset_path"), GARBAGE)
    ),
]

SEARCHED = {"out/search.json": "{}", "out/trials.csv": "trial,status\n0,complete\n"}
EARLIER = [  # what an earlier run left in `out_dir` is damaged
    Case("search", "--resume true", {**SEARCHED, "out/search.json": ""}, "search.json"),
    Case("search", "--resume true", {**SEARCHED, "out/search.json": "[]"}, "search.json"),
    Case("search", "--resume true", {**SEARCHED, "out/search.json": GARBAGE}, "search.json"),
    Case("search", "--resume true", {**SEARCHED, "out/search.json": '{"ahead": "x"}'}, "ahead"),
    Case("search", "--resume true", SEARCHED, "search.json"),
    Case("search", "--resume true", {"out/trials.csv": "trial\n"}, "search.json is missing"),
    *every(
        {"search": "--objectives val_loss,latency_ms --costs.latency_table table.json"},
        {"table.json": hostile_pickle()},
        "table.json",
    ),
    Case(
        "finetune",
        "--resume true",
        {"out/checkpoints/step=00000001.ckpt": hostile_pickle()},
        "step=00000001.ckpt",
    ),
    Case(
        "finetune",
        "--resume true",
        {"out/checkpoints/step=00000001.ckpt": hostile_torch_file},
        "step=00000001.ckpt",
    ),
    Case(
        "finetune",
        "--resume true",
        {"out/checkpoints/step=00000001.ckpt": GARBAGE},
        "step=00000001.ckpt",
    ),
]

GROUPS = {
    "checkpoint": CHECKPOINTS, "text": TEXTS, "front": FRONTS, "space": SPACES, "list": LISTS,
    "out_dir": OUT_DIRS, "config": CONFIGS, "options": OPTIONS, "tasks": TASKS,
    "earlier": EARLIER,
}  # fmt: skip


@pytest.fixture(scope="module")
def right(tmp_path_factory, bundled) -> Path:
    """A folder in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("right")
    source = Config.from_file(bundled / "model_config.yaml")
    sizes = {name: getattr(source, name) for name in ("vocab_size", "padded_vocab_size")}
    model = tiny_config("Llama-3.1-8B", block_size=128, **sizes)
    (folder / "checkpoint").mkdir()
    weights = fill_random(GPT(model)).state_dict()
    write_checkpoint(folder / "checkpoint", weights, config=model, source=bundled)
    shutil.copyfile(bundled / "config.json", folder / "checkpoint" / "config.json")
    lines = [f"{i} is a number, and so is {i * i}, its square. " * 3 for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    full = SubNetwork.from_config(model)
    subs = [resized(full, n_layer=layers) for layers in (1, 2)]
    entries = tuple(
        FrontEntry(index, sub, {"val_loss": 3.0, "num_params": 1e5})
        for index, sub in enumerate(subs)
    )
    front = Front(("val_loss", "num_params"), entries, str(folder / "checkpoint"))
    (folder / "front.json").write_text(front.dump())
    (folder / "space.yaml").write_text("n_layer: [1, 2, 3]\nn_embd: [24, 48]\n")
    return folder


@pytest.fixture
def folder(right, tmp_path, monkeypatch) -> Path:
    """A copy of the right folder, in which the command runs."""
    shutil.copytree(right, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError(f"not answered within {HANG} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANG)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    elif content is None:
        path.unlink(missing_ok=True)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def everything(folder: Path) -> dict[str, object]:
    """All files and folders below a folder, with their content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else path.is_dir()
        for path in folder.rglob("*")
    }


def parameters() -> Iterator[object]:
    """All cases; of those that are not slow by themselves one in three is tried by fast tests."""
    turn = itertools.count()
    for group, cases in GROUPS.items():
        for case in cases:
            slow = case.slow or next(turn) % 3 > 0
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(case, id=f"{group}: {case}", marks=marks)


@pytest.mark.parametrize("case", list(parameters()))
def test_one_sentence_and_nothing_else(case, folder, capfd):
    for name, content in case.files.items():
        make(folder / name, content)
    before = everything(folder)
    status = nas(case.command, *shlex.split(NEEDED[case.command]), *shlex.split(case.options))
    shown = capfd.readouterr()
    assert status == 2, shown
    # What takes ten seconds shows its progress, as slow cases may on a slow machine.
    said = PROGRESS.sub("", shown.err) if case.slow else shown.err
    assert said.startswith("nas: ")
    assert said.count("\n") == 1
    assert len(said) < 1500
    assert case.words in said
    assert everything(folder) == before
