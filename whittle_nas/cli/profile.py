"""`nas profile`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from whittle_nas.cli.options import DType, Sizes
from whittle_nas.errors import ConfigError

_SMALLEST = "smallest"  # the sub-network that is shown where none is named
_SHAPES = 12  # in shapes.png
# For people; profile.json has the names and units of `nas search`.
_SHOWN = {
    "flops": ("GFLOPs per sequence", 1e9),
    "weight_bytes": ("weight MB", 1e6),
    "kv_cache_bytes": ("cache MB", 1e6),
    "activation_bytes": ("activation MB", 1e6),
}


def profile(
    *,
    checkpoint_dir: Path | None = None,
    model_name: str | None = None,
    subnetwork: Sizes = Sizes(),
    front: Path | None = None,
    subnetworks: Path | None = None,
    index: int | None = None,
    pick: str | None = None,
    search_space: str | None = None,
    measure: bool = True,
    table: Path | None = None,
    table_networks: int = 30,
    batch: int = 2,
    tokens: int | None = None,
    repeats: int = 10,
    device: str = "auto",
    dtype: DType = DType.stored,
    seed: int = 1337,
    out_dir: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Show what sub-networks cost: parameters, FLOPs, memory and latency on this device.

    Costs that follow from the sizes are computed without building a model. Latency and peak memory
    are measured: all networks are timed in five turns, each in another order, and their times are
    set to one speed of the machine, since machines drift. The whole model is always shown for
    comparison; beside it the sub-network of the given sizes, the entries of a front, or else the
    smallest member of the search space.

    Args:
        checkpoint_dir: The super-network.
        model_name: Instead of a checkpoint, a model of litgpt's list with random weights.
        subnetwork: Sizes; those that are not given are the whole model's.
        front: `front.json` of a search; all its entries are shown, or the one of `index` or `pick`.
        subnetworks: `picks.yaml` of `nas search --budgets`, or another list of sizes.
        index: Which entry of the front.
        pick: Best entry of the front under budgets, as in "num_params <= 6e9".
        search_space: A preset or a YAML file; default: the space that was trained, else
            `fitted` where `nas importance` recorded it, else `aligned`.
        measure: Whether to build the models and time them.
        table: Instead, measure a latency table for `nas search --costs.latency_table` and write it
            to this file.
        table_networks: Random sub-networks that are timed in parts and whole for it.
        batch: Sequences that are run at once.
        tokens: Tokens per sequence: length of the prefill, and of the cache while decoding; by
            default the model's context, at most 512.
        repeats: Timed runs of each network, spread over five turns.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        dtype: Number format of the weights; `stored` is that of the checkpoint, and float32 without
            one.
        seed: Seed of the random tokens and weights.
        out_dir: Where to write `profile.json` and `shapes.png`; nothing is written without it.
        overwrite: Replace what is in `out_dir`.
    """
    from whittle_nas.cli.candidates import library_of
    from whittle_nas.cli.common import (
        check_least,
        resolve_device,
        resolve_dtype,
        seed_everything,
    )
    from whittle_nas.weights.files import check_free

    check_least(1, batch=batch, tokens=tokens, repeats=repeats)
    if out_dir is not None:
        check_free(out_dir, overwrite=overwrite)
    place = resolve_device(device)
    seed_everything(seed)
    source = _source(checkpoint_dir, model_name)
    number = resolve_dtype(dtype) or _stored_dtype(source)
    tokens = length_of(source.config, tokens)
    if table is not None:
        load = (batch, tokens, place, number)
        _write_table(table, source, search_space, load, table_networks, seed)
        return
    subs = chosen(
        source,
        Choice(subnetwork, front, subnetworks, index, pick, search_space),
    )
    supernet = _load(source, place, number) if measure else None
    rows = []
    for name, sub in subs:
        costs = _analytic(source, sub, batch, tokens, number)
        rows.append({"name": name, "subnetwork": sub.to_dict(), **costs})
    if supernet is not None:
        library = library_of(source, front=front, subnetworks=subnetworks)
        measured = _measured(supernet, library, [sub for _, sub in subs], batch, tokens, repeats)
        rows = [row | found for row, found in zip(rows, measured, strict=True)]
    _print(rows, dict(subs), f"batch {batch} x {tokens} tokens on {place}")
    if out_dir is not None:
        load = {"batch": batch, "tokens": tokens, "device": str(place)}
        _write(out_dir, rows, load, dict(subs), overwrite)
    if checkpoint_dir is not None:
        _print_next(checkpoint_dir, None if subs[-1][0] == _SMALLEST else subs[-1][1])


@dataclass(frozen=True)
class Choice:
    """The options by which networks are chosen; see `profile`."""

    subnetwork: Sizes
    front: Path | None
    subnetworks: Path | None
    index: int | None
    pick: str | None
    search_space: str | None


def chosen(source: Any, choice: Any) -> list[tuple[str, Any]]:
    """The whole model and what is profiled beside it, by name.

    Args:
        source: the checkpoint.
        choice: a `Choice`, or all options.
    """
    if choice.subnetworks is not None:
        return _listed(source, choice.subnetwork, choice.front, choice.subnetworks)
    entries = _entries(source, choice.front, choice.index, choice.pick)
    return _chosen(source, choice.subnetwork, entries, choice.search_space)


def _write_table(
    path: Path,
    source: Any,
    search_space: str | None,
    load: tuple[int, int, Any, Any],
    networks: int,
    seed: int,
) -> None:
    from whittle_nas.cli.common import check_least
    from whittle_nas.cli.profile_table import measure_table
    from whittle_nas.cli.selection import space_of
    from whittle_nas.metrics.latency_parts import Load

    check_least(4, table_networks=networks)
    space = space_of(source, search_space)
    measure_table(path, source, space, Load(*load), networks=networks, seed=seed)


def _source(checkpoint_dir: Path | None, model_name: str | None) -> Any:
    """A checkpoint, or one in name only."""
    from litgpt import Config

    from whittle_nas.space import check_supported
    from whittle_nas.weights.checkpoint import Checkpoint, open_checkpoint
    from whittle_nas.weights.info import SupernetInfo

    if checkpoint_dir is not None and model_name is None:
        return open_checkpoint(checkpoint_dir, shortcuts=True, per_layer=True)
    if model_name is None or checkpoint_dir is not None:
        raise ConfigError("give either --checkpoint_dir or --model_name")
    try:
        config = Config.from_name(model_name)
    except ValueError:
        raise ConfigError(
            f"--model_name {model_name} is not in litgpt's list; `litgpt download list` shows it"
        ) from None
    assert config is not None
    check_supported(config)
    return Checkpoint(Path(), config, SupernetInfo.default(config))


def _stored_dtype(source: Any) -> Any:
    import torch

    if source.path == Path():
        return torch.float32
    return source.state_dict()["lm_head.weight"].dtype


def length_of(config: Any, tokens: int | None) -> int:
    """Tokens per sequence; the default is that of `nas search`."""
    if tokens is None:
        return min(config.block_size, 512)
    if tokens > config.block_size:
        raise ConfigError(
            f"--tokens {tokens} is longer than the model's context of {config.block_size}"
        )
    return tokens


def _entries(source: Any, front: Path | None, index: int | None, pick: str | None) -> list[Any]:
    from whittle_nas.cli.fronts import open_front
    from whittle_nas.space.front import pick_entry

    if front is None:
        if index is not None or pick is not None:
            raise ConfigError("--index and --pick choose from a --front; give one")
        return []
    read = open_front(source, front)
    if index is None and pick is None:
        return list(read.entries)
    return [pick_entry(read, index=index, pick=pick)]


def _chosen(
    source: Any, sizes: Sizes, entries: list[Any], search_space: str | None
) -> list[tuple[str, Any]]:
    from whittle_nas.cli.selection import space_of
    from whittle_nas.space import SubNetwork
    from whittle_nas.space.rules import check

    config, channels = source.config, source.info.head_channels
    whole = [("whole model", SubNetwork.from_config(config))]
    if entries:
        subs = [(f"front {e.index}", check(e.subnetwork, config, channels)) for e in entries]
        return whole + subs
    if sizes.given():
        return [*whole, ("chosen", sizes.resolve(source))]
    if getattr(config, "blocks", None) is not None:  # cut already: there is no space around it
        return whole
    return [*whole, (_SMALLEST, space_of(source, search_space).smallest)]


def _listed(
    source: Any, sizes: Sizes, front: Path | None, subnetworks: Path
) -> list[tuple[str, Any]]:
    """The whole model, and the sub-networks of a file by name."""
    from whittle_nas.cli.candidates import choose_candidates
    from whittle_nas.space import SubNetwork

    found = choose_candidates(source, sizes=sizes, front=front, subnetworks=subnetworks)
    whole = [("whole model", SubNetwork.from_config(source.config))]
    return whole + [(one.label, one.subnetwork) for one in found]


def _load(source: Any, device: Any, dtype: Any) -> Any:
    import torch
    from litgpt import GPT

    from whittle_nas.weights.checkpoint import load_supernet
    from whittle_nas.weights.supernet import SuperNetwork

    if source.path != Path():
        return load_supernet(source.path, device=device, dtype=dtype)
    with torch.device(device):
        model = GPT(source.config).to(dtype=dtype)
    return SuperNetwork(model.requires_grad_(False).eval(), source.info)


def _analytic(source: Any, sub: Any, batch: int, tokens: int, dtype: Any) -> dict[str, Any]:
    from whittle_nas.metrics.analytic import AnalyticCosts

    costs = AnalyticCosts(source.config)
    return {
        "num_params": costs.num_params(sub),
        "num_params_non_embedding": costs.num_params_non_embedding(sub),
        "flops": costs.flops(sub, tokens),
        "weight_bytes": costs.weight_bytes(sub, dtype),
        "kv_cache_bytes": costs.kv_cache_bytes(sub, batch=batch, length=tokens, dtype=dtype),
    }


def _measured(
    supernet: Any, library: Any, subs: list[Any], batch: int, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    import torch

    from whittle_nas.metrics import measured
    from whittle_nas.progress import bar

    repeats = -(-repeats // measured.TURNS)

    def alone(sub: Any) -> Any:
        if library is None or sub == supernet.full:
            return supernet.standalone(sub)
        return supernet.standalone(sub, library.patch(sub))

    def times(sub: Any) -> dict[str, float]:
        model = alone(sub)
        prefill = measured.prefill_latency(model, batch=batch, tokens=tokens, repeats=repeats)
        # The timed tokens must still fit into the context behind the cache.
        context = max(1, min(tokens, model.max_seq_length - repeats - 2))
        decode = measured.decode_latency(model, batch=batch, context=context, repeats=repeats)
        return {"latency_ms": prefill.median_ms, "decode_ms_per_token": decode.median_ms}

    def peak(sub: Any) -> int:
        model = alone(sub)
        ids = torch.zeros(batch, tokens, dtype=torch.long, device=model.lm_head.weight.device)
        with torch.inference_mode():
            return measured.peak_memory_bytes(lambda: model(ids), ids.device)

    runs = [partial(times, sub) for sub in subs]
    with bar("timing in turns", measured.TURNS * len(runs)) as shown:
        timed = measured.in_turn(runs, on_progress=lambda _: shown.update(1))
    return [
        found
        | {
            "decode_tokens_per_s": batch * 1e3 / found["decode_ms_per_token"],
            "activation_bytes": peak(sub),
        }
        for sub, found in zip(subs, timed, strict=True)
    ]


def _print(rows: list[dict[str, Any]], subs: dict[str, Any], title: str) -> None:
    """The costs as a table, and the sizes below it."""
    from whittle_nas.cli.common import print_table

    columns = [key for key in rows[0] if key != "subnetwork"]
    names = [_SHOWN[key][0] if key in _SHOWN else key for key in columns]
    cells = [
        [row[key] if key not in _SHOWN else row[key] / _SHOWN[key][1] for key in columns]
        for row in rows
    ]
    print_table(names, cells, title=title)
    if len(rows) <= 3:  # the entries of a front are in front.json
        for name, sub in subs.items():
            print(f"{name}: {sub}")


def _write(
    out_dir: Path,
    rows: list[Any],
    settings: dict[str, Any],
    subs: dict[str, Any],
    overwrite: bool,
) -> None:
    import json

    from whittle_nas.plots import plot_shapes
    from whittle_nas.weights.files import atomic_directory

    (_, whole), *smaller = subs.items()

    with atomic_directory(out_dir, overwrite=overwrite) as partial:
        text = json.dumps({"format": 1, **settings, "subnetworks": rows}, indent=2)
        (partial / "profile.json").write_text(text + "\n", encoding="utf-8")
        if smaller:
            shapes = {name: sub.shares(whole) for name, sub in smaller[:_SHAPES]}
            plot_shapes(partial / "shapes.png", shapes, whole=whole.blocks)
    print(f"wrote {out_dir / 'profile.json'}")


def _print_next(checkpoint_dir: Path, sub: Any) -> None:
    """How the last sub-network of the table is exported; without a choice, how one is found."""
    from whittle_nas.cli.common import command_line
    from whittle_nas.page import size_options

    source, target = ("--checkpoint_dir", checkpoint_dir), ("--out_dir", "<dir>")
    if sub is not None:
        choice = size_options(sub.to_dict())
        print(f"export it with: {command_line('nas', 'export', *source, *choice, *target)}")
    else:
        line = command_line("nas", "search", *source, *target, "--data.files", "<validation text>")
        print(f"find better ones with: {line}")
