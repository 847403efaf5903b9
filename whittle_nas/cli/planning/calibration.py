"""Plans of what runs calibration text through a model and trains nothing."""

from __future__ import annotations

from typing import Any

from whittle_nas.candidates.parts import grid, is_nothing, with_sizes
from whittle_nas.cli.common import resolve_dtype
from whittle_nas.cli.planning.running import missing
from whittle_nas.cli.planning.source import BYTES_PER_TOKEN, Source, blocks_of
from whittle_nas.cli.selection import choose_subnetwork
from whittle_nas.metrics.plan import (
    EQUATIONS,
    PRODUCTS,
    STREAMS,
    Plan,
    forward_flops,
    forward_memory,
    greedy_flops,
    hessian_flops,
)
from whittle_nas.space.subnetwork import COMPRESSED, PARTS, SubNetwork
from whittle_nas.weights.axes import is_gated
from whittle_nas.weights.counting import matrix_counter


def importance(source: Source, options: Any) -> Plan:
    """What sorting takes; see `plan_of`."""
    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    blocks, length, notes = blocks_of(options.data, source)
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
        {"checkpoint": source.weight_bytes(), "calibration text": tokens * BYTES_PER_TOKEN},
        {"sorted checkpoint": source.weight_bytes()},
        memory,
        work,
        dtype=dtype,
        rows=batch * length,
        notes=(*notes, "the checkpoint is sorted and written tensor by tensor, on the host"),
    )


def _trained(config: Any, block: Any, rank: int | None) -> int:
    """Numbers that the training of one smaller part writes: adapters, or its matrices."""
    if rank is None:
        counts = [matrix_counter(config, part) for part in PARTS]
        return sum(count(SubNetwork(config.n_embd, (block,))) for count in counts)
    heads, values = block.n_head * block.head_size, 2 * block.n_query_groups * block.head_size
    sides = (config.n_embd + heads + values) + (heads + config.n_embd) if heads else 0
    matrices = 3 if is_gated(config) else 2
    neurons = block.intermediate_size
    return rank * (sides + (matrices * (config.n_embd + neurons) if neurons else 0))


def candidates(source: Source, options: Any) -> Plan:
    """What a library takes; see `plan_of`."""
    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    blocks, length, notes = blocks_of(options.data, source)
    sizes = grid(config, options.grid, source.checkpoint.info.head_channels)
    devices = min(options.devices, config.n_layer)
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
        "calibration": devices * forward_flops(config, tokens, length),
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
    if options.train.steps:
        trained = [_trained(config, block, options.train.rank) for block in fitted]
        size += sum(trained)
        memory["training of a part"] = 16 * max(trained, default=0)  # float32, gradient, Adam's two
    return Plan(
        config,
        {"checkpoint": source.weight_bytes(), "calibration text": tokens * BYTES_PER_TOKEN},
        {"library": config.n_layer * size * dtype.itemsize},
        memory,
        work,
        devices=devices,
        dtype=dtype,
        rows=options.batch_size * length,
        notes=(*notes, "the solutions of least squares are not counted"),
    )


def export(source: Source, options: Any) -> Plan:
    """What an export takes; see `plan_of`."""
    config, notes = source.config, []
    names = ("front", "subnetworks", "name", "index", "pick", "search_space")
    if note := missing(options.front, options.subnetworks):
        notes.append(note)
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
        blocks, length, more = blocks_of(options.data, source)
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


def prune(source: Source, options: Any) -> Plan:
    """What `nas prune` takes; see `plan_of`."""
    from whittle_nas.prune.options import (
        MASKS,
        QUANTISERS,
        WITHOUT_DATA,
        Method,
        check_sequential,
    )

    check_sequential(options.sequential, options.method)
    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    method = options.method
    blocks, length, notes = blocks_of(options.data, source)
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
        {"checkpoint": written, "calibration text": tokens * BYTES_PER_TOKEN},
        {"checkpoint, at most": written},
        memory,
        work,
        dtype=dtype,
        rows=options.batch_size * length,
        notes=tuple(notes if tokens else ()),
    )
