"""`--dry_run`: from the options of a command to its `Plan`. Nothing is loaded or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from whittle_nas.candidates.parts import grid, is_nothing, with_sizes
from whittle_nas.cli.candidates import choose_candidates
from whittle_nas.cli.common import resolve_dtype
from whittle_nas.cli.selection import choose_subnetwork, default_space, space_for, space_of
from whittle_nas.cli.training_report import Memory
from whittle_nas.data.options import TextData
from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.metrics.plan import (
    EQUATIONS,
    PRODUCTS,
    STREAMS,
    Plan,
    forward_flops,
    forward_memory,
    greedy_flops,
    hessian_flops,
    training_flops,
)
from whittle_nas.search.options import Method, ProgramOptions
from whittle_nas.space.subnetwork import COMPRESSED, PARTS, SubNetwork
from whittle_nas.train.choices import Share
from whittle_nas.train.memory import stored_format
from whittle_nas.weights.checkpoint import Checkpoint
from whittle_nas.weights.counting import matrix_counter, parameter_counter
from whittle_nas.weights.info import SupernetInfo

_BYTES_PER_TOKEN = 4  # of English text
_ASSUMED = 128  # blocks of text where nobody says how much there is
_BATCH = 8  # blocks per forward pass where the command chooses


@dataclass(frozen=True)
class Source:
    """What is read: a checkpoint, of which the config is enough.

    Attributes:
        checkpoint: its directory, which may not be there yet.
        stored: number format of its weights; bfloat16 where there are none.
    """

    checkpoint: Checkpoint
    stored: torch.dtype

    @classmethod
    def of(cls, checkpoint_dir: Path) -> Source:
        """A directory with a `model_config.yaml`, or a path that names a model of litgpt's list.

        Raises:
            ConfigError: if neither.
        """
        from whittle_nas.cli.defaults import model_config

        config = model_config(str(checkpoint_dir))
        info = SupernetInfo.read(checkpoint_dir, config)
        return cls(Checkpoint(checkpoint_dir, config, info), stored_format(checkpoint_dir))

    @property
    def config(self) -> Any:
        """litgpt config of the model."""
        return self.checkpoint.config

    @property
    def full(self) -> SubNetwork:
        """The whole model."""
        return SubNetwork.from_config(self.config)

    def weight_bytes(self, sub: SubNetwork | None = None, dtype: Any = None) -> int:
        """Bytes of the weights of a sub-network, or of the whole."""
        return AnalyticCosts(self.config).weight_bytes(sub or self.full, dtype or self.stored)


def plan_of(command: str, options: Any) -> Plan:
    """The plan of a command.

    Args:
        command: its name.
        options: its options, as its function gets them.

    Raises:
        ConfigError: for a checkpoint that nothing is known of, or options that do not fit it.
    """
    return PLANNERS[command](Source.of(Path(options.checkpoint_dir)), options)


def _blocks(data: TextData | None, source: Source) -> tuple[int, int, list[str]]:
    """Blocks of text, tokens per block, and what is to be said where the number is a guess."""
    data = data or TextData()
    length = data.check(source.config.block_size)
    paths = [path for part in (data, *data.sources) for path in part.paths]
    there = bool(paths) and all(path.is_file() for path in paths)
    found = sum(path.stat().st_size for path in paths) if there else 0
    of_files = max(1, found // (_BYTES_PER_TOKEN * length)) if there else None
    known = [number for number in (data.num_blocks, of_files) if number is not None]
    if known:
        return min(known), length, []
    note = f"the amount of text is not known before it is read: {_ASSUMED} blocks are assumed"
    return _ASSUMED, length, [note]


def _importance(source: Source, options: Any) -> Plan:
    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    blocks, length, notes = _blocks(options.data, source)
    batch = options.micro_batch_size or options.batch_size
    tokens = blocks * length
    sample = min(blocks, options.layer_blocks) * length
    # one product x x^T per norm, and one per layer of what the heads of each group write
    norms = (2 * config.n_layer + 1) * config.n_embd**2
    values = config.n_layer * config.n_head * config.head_size**2
    least = options.min_layers or config.n_layer // 2
    work = {
        "calibration": forward_flops(config, tokens, length),
        "covariances": 2.0 * tokens * (norms + values),
        "norm factors": forward_flops(config, 9 * sample, length),
        "layer order": greedy_flops(config, sample, length, width=options.layer_width, least=least),
        "sweep": forward_flops(config, 20 * options.sweep.num_tokens, length),
    }
    if options.report.num_subnetworks:
        rows = min(blocks, options.report.num_blocks) * length
        work["report"] = forward_flops(config, options.report.num_subnetworks * rows, length)
    memory = forward_memory(config, dtype=dtype, batch=batch, tokens=length)
    memory["covariances"] = 8 * (config.n_embd**2 + values)
    return Plan(
        config,
        {"checkpoint": source.weight_bytes(), "calibration text": tokens * _BYTES_PER_TOKEN},
        {"sorted checkpoint": source.weight_bytes()},
        memory,
        work,
        dtype=dtype,
        rows=batch * length,
        notes=(*notes, "the checkpoint is sorted and written tensor by tensor, on the host"),
    )


def _finetune(source: Source, options: Any) -> Plan:
    from whittle_nas.cli.training import batch_networks
    from whittle_nas.train.fit import MOST_STEPS, num_devices, num_steps
    from whittle_nas.train.run import TrainingOptions

    config = source.config
    training = TrainingOptions(
        **{f.name: getattr(options, f.name) for f in fields(TrainingOptions)}
    )
    alone = _trained_alone(source, options)
    needs = Memory(source.checkpoint.path, config, options.data, apart=bool(alone))
    training = needs.with_adapters(training, options.weights)
    trainer, devices = training.trainer, num_devices(training.trainer)
    blocks, length, notes = _blocks(options.data, source)
    steps = num_steps(
        trainer, num_samples=blocks, batch_size=training.batch_size, world_size=devices
    )
    if trainer.max_steps is None and notes:
        steps = MOST_STEPS
        notes = [f"{steps} steps are assumed: the length follows from the data, which is not read"]
    rows = training.batch_size * length
    tokens = steps * trainer.accumulate_grad_batches * rows * devices
    space = space_for(source.checkpoint, default_space(source.checkpoint, options.search_space))
    per_token: Counter[str] = Counter()
    together = batch_networks(training.sandwich, source.full, space)
    for networks in [{sub: 1.0} for sub in alone] or [together]:
        per_token.update(
            training_flops(
                config,
                networks,
                length=length,
                adapters=training.lora is not None,
                recomputes=training.checkpoint_blocks,
                teacher=training.loss.has_frozen_teacher,
            )
        )
    needed = needs.needed(training)
    of_step = {f.name: getattr(needed, f.name) for f in fields(needed)}
    written = {"checkpoint": source.weight_bytes()}
    if alone:
        count = parameter_counter(config)
        written = {"checkpoints": sum(written["checkpoint"] * count(s) for s in alone)}
        written["checkpoints"] //= count(source.full)
        what = f"{len(alone)} trained one by one" if len(alone) > 1 else "trained alone"
        notes = (*notes, f"networks of {options.subnetworks}: {what}")
    if training.lora is not None:
        written["adapters"] = of_step["adapters"] * (devices if trainer.is_sharded else 1)
    return Plan(
        config,
        {"checkpoint": source.weight_bytes(), "text": tokens * _BYTES_PER_TOKEN},
        written,
        {name: size for name, size in of_step.items() if size},
        {name: tokens * value for name, value in per_token.items()},
        devices=devices,
        dtype=torch.float32 if trainer.precision == "32-true" else torch.bfloat16,
        rows=rows,
        notes=(
            *notes,
            f"{steps} steps of {rows * trainer.accumulate_grad_batches * devices:,} tokens",
        ),
    )


def _trained_alone(source: Source, options: Any) -> list[SubNetwork]:
    """Networks of a training that are trained one by one; the whole one where they aren't known."""
    if options.subnetworks is None or options.share is Share.all:
        return []
    if not options.subnetworks.is_file():  # a stage of a recipe will write it
        return [source.full]
    chosen = choose_candidates(source.checkpoint, subnetworks=options.subnetworks)
    return [one.subnetwork for one in chosen]


def _candidates(source: Source, options: Any) -> Plan:
    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    blocks, length, notes = _blocks(options.data, source)
    sizes = grid(config, options.grid, source.checkpoint.info.head_channels)
    tokens, scored = blocks * length, min(max(1, blocks // 8), options.score_blocks) * length
    made = sum(len(choices) - 1 for choices in sizes.values())  # per layer
    smaller = [
        with_sizes(None, kind, choice)
        for kind, choices in sizes.items()
        for choice in choices[1:]
        if not is_nothing(choice)
    ]
    heads, neurons = config.n_head * config.head_size, config.intermediate_size
    whole = forward_flops(config, 1, length)
    # on average half of the layers stand behind a part; the head always does
    tables = 2 * config.n_embd * config.padded_vocab_size
    work = {
        # each process takes the text through all layers
        "calibration": options.devices * forward_flops(config, tokens, length),
        "sums of products": 2.0 * tokens * config.n_layer * (heads**2 + neurons**2),
        "losses": scored * config.n_layer * made * ((whole - tables) / 2 + tables),
    }
    if options.train.steps:
        of_step = 3 * options.batch_size * forward_flops(config, length, length) / 2
        work["training"] = options.train.steps * len(smaller) * of_step
    memory = forward_memory(config, dtype=dtype, batch=options.batch_size, tokens=length)
    memory[PRODUCTS] = 8 * 4 * max(heads, neurons) ** 2
    memory["states and outputs"] = 3 * tokens * config.n_embd * dtype.itemsize
    rank = options.rank or config.n_embd
    rows = config.n_embd
    # Of an ordinary part its last matrix changes; a map in its place is written whole.
    fitted = [block for block in smaller if not {*block.forms} & {*COMPRESSED}]
    widths = [block.n_head * block.head_size + block.intermediate_size for block in fitted]
    size = sum(min(rank * (rows + w), rows * w) if w else rows * rows for w in widths)
    whole = [block for block in smaller if {*block.forms} & {*COMPRESSED}]
    counts = [matrix_counter(config, part) for part in PARTS]
    size += sum(count(SubNetwork(rows, (block,))) for count in counts for block in whole)
    return Plan(
        config,
        {"checkpoint": source.weight_bytes(), "calibration text": tokens * _BYTES_PER_TOKEN},
        {"library": config.n_layer * size * dtype.itemsize},
        memory,
        work,
        devices=options.devices,
        dtype=dtype,
        rows=options.batch_size * length,
        notes=(*notes, "the solutions of least squares are not counted"),
    )


def _search(source: Source, options: Any) -> Plan:
    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    blocks, length, notes = _blocks(options.data, source)
    space = space_of(source.checkpoint, options.search_space)
    batch = options.batch_size or min(_BATCH, blocks)
    ends = [forward_flops(config, length, length, sub) for sub in (space.smallest, space.largest)]
    of_block = sum(ends) / 2  # a trial is of about middle size
    trials, scored = options.num_trials, min(blocks, options.search_blocks)
    work = {}
    if options.method is Method.ilp:
        programs = _programs_of(options)
        trials = programs.most_trials()
        # Two neighbours of every attention and MLP, and half of the layers stand behind a part.
        around = programs.rounds * max(1, len(programs.budgets)) * 2 * config.n_layer
        work["measuring around"] = around * scored * of_block
        notes.append("the solutions of integer programs are not counted")
        if programs.rounds and (options.devices > 1 or options.ray_address is not None):
            notes.append("rounds measure with one more copy of the model, in this process")
    work["trials"] = trials * scored * of_block
    front = max(1, trials // 10)
    work["front on all blocks"] = front * blocks * of_block
    if options.recovery.budget is not None:
        recovery = options.recovery
        trained = recovery.candidates * recovery.steps * recovery.batch_size * length
        work["recovery"] = 4 * forward_flops(config, trained, length)
    if options.repair:
        notes.append("the repair of every trial is not counted")
    words = str(options.objectives) + str(options.constraints)
    if "latency" in words or "decode" in words:
        notes.append("the latency table is measured on the device, which takes minutes more")
    if "1 - " in words:
        notes.append("requests of lm-eval tasks are not counted")
    return Plan(
        config,
        {"checkpoint": source.weight_bytes(), "text": blocks * length * _BYTES_PER_TOKEN},
        {"trials and front": 2000 * trials},
        forward_memory(config, dtype=dtype, batch=batch, tokens=length),
        work,
        devices=options.devices,
        dtype=dtype,
        rows=batch * length,
        notes=tuple(notes),
    )


def search_metrics(options: Any) -> list[str]:
    """Metrics that a search is asked for.

    Raises:
        ConfigError: for one that is not known.
    """
    from whittle_nas.cli.search import read_metrics

    names, limits = read_metrics(options.objectives, options.constraints)
    if options.method is Method.ilp:
        limits = (
            *limits,
            *(limit for _, asked in _programs_of(options).limits() for limit in asked),
        )
    return [*names, *(limit.metric for limit in limits)]


def _programs_of(options: Any) -> ProgramOptions:
    """What `--method ilp` is asked for.

    Raises:
        ConfigError: for numbers out of range, and without a library.
    """
    from whittle_nas.cli.search import programs_of
    from whittle_nas.search.budgets import parse_budgets

    programs = programs_of(
        options.method,
        options.candidates,
        parse_budgets(options.budgets),
        options.num_solutions,
        options.overlap,
        options.ilp_rounds,
        options.ilp,
        targets=options.targets,
    )
    programs.check()
    return programs


def _evaluate(source: Source, options: Any) -> Plan:
    from whittle_nas.cli.candidates import choose_candidates

    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    has_text = options.data != TextData()
    blocks, length, notes = _blocks(options.data, source) if has_text else (0, 1024, [])
    length = min(length, options.max_length or length, config.block_size)
    index = [options.index] if isinstance(options.index, int) else options.index or []
    if options.front is not None and not Path(options.front).is_file():
        notes.append(f"{options.front} is not there yet: the whole model is counted once")
        subs = [source.full]
    else:
        chosen = choose_candidates(
            source.checkpoint,
            sizes=options.subnetwork,
            front=options.front,
            index=index,
            subnetworks=options.subnetworks,
            include_full=options.include_full,
        )
        subs = [one.subnetwork for one in chosen]
    if options.tasks:
        notes.append("requests of lm-eval tasks are not counted; see --limit for a first look")
    batch = options.batch_size or _BATCH
    work = {}
    if blocks:
        work["text"] = sum(forward_flops(config, blocks * length, length, sub) for sub in subs)
    return Plan(
        config,
        {"checkpoint": source.weight_bytes(), "text": blocks * length * _BYTES_PER_TOKEN},
        {"results": 4000 * len(subs)},
        forward_memory(config, dtype=dtype, batch=batch, tokens=length),
        work,
        devices=options.devices,
        dtype=dtype,
        rows=batch * length,
        notes=(*notes, f"{len(subs)} networks"),
    )


def _export(source: Source, options: Any) -> Plan:
    config, notes = source.config, []
    names = ("front", "subnetworks", "name", "index", "pick", "search_space")
    path = options.front or options.subnetworks
    if path is not None and not Path(path).is_file():
        notes.append(f"{path} is not there yet: the whole model is counted")
        sub = source.full
    else:
        sub = choose_subnetwork(
            source.checkpoint,
            sizes=options.subnetwork,
            extreme=None if options.extreme is None else options.extreme.value,
            **{name: getattr(options, name) for name in names},
        )
    written = source.weight_bytes(sub, resolve_dtype(options.dtype))
    work: dict[str, float] = {}
    table = config.padded_vocab_size * config.n_embd * source.stored.itemsize
    memory = {"largest tensor, read and written": 2 * table}
    if options.repair:
        blocks, length, more = _blocks(options.data, source)
        notes += more
        passes = forward_flops(config, blocks * length, length) + 2 * forward_flops(
            config, blocks * length, length, sub
        )
        work = {"passes": passes, "normal equations": 3 * hessian_flops(config, blocks * length)}
        memory = forward_memory(config, dtype=source.stored, batch=4, tokens=length)
        memory[STREAMS] = 4 * 2 * blocks * length * config.n_embd
        memory[EQUATIONS] = 4 * 8 * max(config.intermediate_size, config.n_embd) ** 2
    return Plan(
        config,
        {"checkpoint": source.weight_bytes()},
        {f"{options.format.value} checkpoint": written},
        memory,
        work,
        dtype=source.stored,
        rows=2048,
        notes=(*notes, f"{sub}", "the files are mapped: pages of what is read do not count"),
    )


def _prune(source: Source, options: Any) -> Plan:
    from whittle_nas.prune.options import MASKS, QUANTISERS, WITHOUT_DATA, Method

    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    method = options.method
    blocks, length, notes = _blocks(options.data, source)
    tokens = 0 if method in WITHOUT_DATA else blocks * length
    once = forward_flops(config, tokens, length)
    memory = forward_memory(config, dtype=dtype, batch=options.batch_size, tokens=length)
    work: dict[str, float] = {}
    if tokens:
        passes = {Method.shortened_llama: config.n_layer / 2}
        passes |= dict.fromkeys((Method.shortened_llama_taylor, Method.llm_pruner), 3.0)
        work["calibration"] = passes.get(method, 2.0) * once
    if method in (*MASKS, *QUANTISERS):  # block by block: one of them is on the device
        memory["weights"] //= config.n_layer
    if method in (Method.sparsegpt, Method.gptq):
        work["Hessians"] = hessian_flops(config, tokens)
        memory["Hessians"] = 2 * 8 * (3 * config.n_embd**2 + config.intermediate_size**2)
    written = source.weight_bytes()
    return Plan(
        config,
        {"checkpoint": written, "calibration text": tokens * _BYTES_PER_TOKEN},
        {"checkpoint, at most": written},
        memory,
        work,
        dtype=dtype,
        rows=options.batch_size * length,
        notes=tuple(notes if tokens else ()),
    )


PLANNERS: dict[str, Callable[[Source, Any], Plan]] = {
    "importance": _importance,
    "finetune": _finetune,
    "finetune-supernet": _finetune,
    "candidates": _candidates,
    "search": _search,
    "evaluate": _evaluate,
    "export": _export,
    "prune": _prune,
}
