"""Plans of searches and evaluations."""

from __future__ import annotations

from typing import Any

import torch

from whittle_nas.cli.candidates import choose_candidates
from whittle_nas.cli.common import resolve_dtype
from whittle_nas.cli.planning.running import missing
from whittle_nas.cli.planning.source import BYTES_PER_TOKEN, Source, blocks_of
from whittle_nas.cli.selection import space_of
from whittle_nas.data.options import TextData
from whittle_nas.metrics.latency_parts import Load, most_held
from whittle_nas.metrics.plan import Plan, forward_flops, forward_memory
from whittle_nas.search.objectives import MEASURED, task_of
from whittle_nas.search.options import Method, ProgramOptions

_BATCH = 8  # blocks per forward pass where the command chooses


def search(source: Source, options: Any) -> Plan:
    """What a search takes; see `plan_of`."""
    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    blocks, length, notes = blocks_of(options.data, source)
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
    memory = forward_memory(config, dtype=dtype, batch=batch, tokens=length)
    metrics = search_metrics(options)
    searched = bool(set(metrics) & set(MEASURED))
    at_the_end = options.time_front and "," not in options.device
    if searched:
        notes.append("the latency table is measured on the device, which takes minutes more")
    elif at_the_end:
        notes.append("at the end the networks of the front are timed, which is not counted")
    if searched or at_the_end:
        load = Load(
            options.costs.batch, options.costs.check(config.block_size), torch.device("meta"), dtype
        )
        # Parts are timed beside the super-network, whole networks without it.
        held = most_held(config, load)
        memory["what is timed"] = max(held) if searched else held[1]
    if any(map(task_of, metrics)):
        notes.append("requests of lm-eval tasks are not counted")
    return Plan(
        config,
        {"checkpoint": source.weight_bytes(), "text": blocks * length * BYTES_PER_TOKEN},
        {"trials and front": 2000 * trials},
        memory,
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


def evaluate(source: Source, options: Any) -> Plan:
    """What an evaluation takes; see `plan_of`."""
    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    has_text = options.data != TextData()
    blocks, length, notes = blocks_of(options.data, source) if has_text else (0, 1024, [])
    length = min(length, options.max_length or length, config.block_size)
    index = [options.index] if isinstance(options.index, int) else options.index or []
    if note := missing(options.front, options.subnetworks):
        notes.append(f"{note} once")
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
        {"checkpoint": source.weight_bytes(), "text": blocks * length * BYTES_PER_TOKEN},
        {"results": 4000 * len(subs)},
        forward_memory(config, dtype=dtype, batch=batch, tokens=length),
        work,
        devices=options.devices,
        dtype=dtype,
        rows=batch * length,
        notes=(*notes, f"{len(subs)} networks"),
    )
