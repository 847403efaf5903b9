"""Plans of running single networks: `nas profile` and `nas generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from whittle_nas.cli.common import check_least, resolve_dtype
from whittle_nas.cli.planning.source import BYTES_PER_TOKEN, Source
from whittle_nas.cli.selection import choose_subnetwork, space_of
from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.metrics.latency_parts import Load, most_held
from whittle_nas.metrics.measured import TURNS
from whittle_nas.metrics.plan import Plan, forward_flops, forward_memory
from whittle_nas.space.subnetwork import SubNetwork

_WARMUPS = 2  # of every timing
_SHOWN_BYTES = 2000  # of a network in profile.json


def profile(source: Source, options: Any) -> Plan:
    """What a profile takes; see `plan_of`."""
    from whittle_nas.cli.profile import length_of

    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    length = length_of(config, options.tokens)
    check_least(1, batch=options.batch, repeats=options.repeats)
    load = Load(options.batch, length, torch.device("meta"), dtype)
    subs, notes = _profiled(source, options)
    rows = load.batch * length
    memory, work = {}, {}
    writes = {"profile and pictures": _SHOWN_BYTES * len(subs)} if options.out_dir else {}
    whole = source.weight_bytes(dtype=dtype)
    if options.table is not None:
        memory = {"a whole network": whole, "beside it": most_held(config, load)[1]}
        writes = {"latency table": _SHOWN_BYTES * options.table_networks}
        notes.append("the table is measured until times are steady, which takes minutes")
    elif options.measure:
        cache = AnalyticCosts(config).kv_cache_bytes(
            source.full, batch=load.batch, length=length, dtype=dtype
        )
        memory = forward_memory(config, dtype=dtype, batch=load.batch, tokens=length)
        memory["logits"] = rows * config.padded_vocab_size * dtype.itemsize
        memory["cache"] = cache
        runs = TURNS * (_WARMUPS + -(-options.repeats // TURNS))
        passes = sum(forward_flops(config, rows, length, sub) for sub in subs)
        # A cache is filled in every turn, and a last run is for the peak of the memory.
        work = {
            "prefill": (runs + TURNS + 1) * passes,
            "decoding": runs * passes / length,
        }
    there = options.checkpoint_dir is not None and (options.measure or options.table is not None)
    return Plan(
        config,
        {"checkpoint": source.weight_bytes()} if there else {},
        writes,
        memory,
        work,
        dtype=dtype,
        rows=rows,
        notes=(*notes, f"{len(subs)} networks"),
    )


def _profiled(source: Source, options: Any) -> tuple[list[SubNetwork], list[str]]:
    """The networks of a profile, and a note where their file is not there yet."""
    from whittle_nas.cli.profile import chosen

    if options.table is not None:
        check_least(4, table_networks=options.table_networks)
        space_of(source.checkpoint, options.search_space)
        return [source.full], [f"{options.table_networks} networks are timed for the table"]
    if note := missing(options.front, options.subnetworks):
        return [source.full], [note]
    return [sub for _, sub in chosen(source.checkpoint, options)], []


def generate(source: Source, options: Any) -> Plan:
    """What continuing a text takes; see `plan_of`."""
    config, dtype = source.config, resolve_dtype(options.dtype) or source.stored
    check_least(1, max_new_tokens=options.max_new_tokens, top_k=options.top_k)
    sub, notes = source.full, []
    if note := missing(options.front, options.subnetworks):
        notes.append(note)
    elif options.subnetwork.given() or options.front or options.subnetworks:
        names = ("front", "subnetworks", "name", "index", "pick")
        sub = choose_subnetwork(
            source.checkpoint,
            sizes=options.subnetwork,
            **{name: getattr(options, name) for name in names},
        )
    prompt = max(1, len(options.prompt) // BYTES_PER_TOKEN)
    length = min(prompt + options.max_new_tokens, config.block_size)
    memory = forward_memory(config, dtype=dtype, batch=1, tokens=prompt)
    memory["cache"] = AnalyticCosts(config).kv_cache_bytes(sub, batch=1, length=length, dtype=dtype)
    memory["logits"] = prompt * config.padded_vocab_size * dtype.itemsize
    return Plan(
        config,
        {"checkpoint": source.weight_bytes()},
        {},
        memory,
        {
            "prompt": forward_flops(config, prompt, prompt, sub),
            "new tokens": forward_flops(config, options.max_new_tokens, length, sub),
        },
        dtype=dtype,
        rows=1,  # a token at a time, for each of which all weights are read
        notes=(*notes, f"{sub}", f"a prompt of {prompt} tokens is assumed"),
    )


def missing(*paths: Path | None) -> str | None:
    """What is to be said of the first file that another command is still to write."""
    path = next((path for path in paths if path is not None and not Path(path).is_file()), None)
    return None if path is None else f"{path} is not there yet: the whole model is counted"
