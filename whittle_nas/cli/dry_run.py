"""What `--dry_run true` prints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from whittle_nas.cli.common import print_table
from whittle_nas.cli.planning import plan_of
from whittle_nas.metrics.plan import Plan

_GIB = 2**30
_ON_ONE = ("prune", "profile")  # what runs on one device only


def dry_run(name: str, options: Any) -> None:
    """Print the plan of a command; nothing is loaded or written.

    Args:
        name: of the command.
        options: as its function gets them.

    Raises:
        ConfigError: for options that do not fit the model.
    """
    show_plan(name, options)
    print("dry run: nothing was written")


def show_plan(name: str, options: Any, source: Any = None) -> float:
    """Print a plan, and return its seconds; arguments are those of `planning.plan_of`.

    Raises:
        ConfigError: for options that do not fit the model.
    """
    from whittle_nas.cli.common import resolve_device, resolve_devices
    from whittle_nas.metrics.plan import placed_memory, placed_rate
    from whittle_nas.train.memory import device_bytes
    from whittle_nas.weights.axes import num_params

    plan = plan_of(name, options, source)
    given = _device(options)
    placed_on = (resolve_device(given),) if name in _ON_ONE else resolve_devices(given)
    _check_devices(name, options, placed_on)
    device = placed_on[0]
    config, kind = plan.config, str(plan.dtype).removeprefix("torch.")
    print(f"nas {name}: {config.name}, {num_params(config):,} parameters, {kind}")
    _print_bytes("reads", plan.reads)
    _print_bytes("writes", plan.writes)
    if len(placed_on) == 1:
        _print_memory(plan, device_bytes(device), str(device))
    elif plan.memory:
        memory = placed_memory(config, plan.memory, placed_on)
        _print_placed({str(d): (parts, device_bytes(d)) for d, parts in memory.items()})
    seconds = 0.0
    if plan.flops:
        wide = (plan.rows, config.n_embd, config.intermediate_size)
        rates = {one: _rate(one, plan.dtype, *wide) for one in dict.fromkeys(placed_on)}
        rate = placed_rate(config, placed_on, rates)
        _print_work(plan, rate, len(rates))
        seconds = plan.seconds(rate)
    print("".join(f"note: {note}\n" for note in plan.notes), end="")
    if plan.devices > 1 and device.type == "cpu":
        print("note: processes on one machine share its memory and its cores")
    return seconds


@cache
def _rate(device: Any, dtype: Any, *sizes: int) -> float:
    """Measured once for each shape among the stages of a recipe."""
    from whittle_nas.metrics.measured import matmul_rate

    return matmul_rate(device, dtype, *sizes)


def _check_devices(name: str, options: Any, placed_on: Sequence[Any]) -> None:
    """What the command itself refuses on several devices."""
    from whittle_nas.cli.evaluation import check_processes
    from whittle_nas.cli.planning.scoring import search_metrics
    from whittle_nas.search.request import check_placed

    if name == "evaluate":
        check_processes(placed_on, options.devices)
    elif name == "search":
        check_placed(placed_on, search_metrics(options), options.recovery)


def _device(options: Any) -> str:
    trainer = getattr(options, "trainer", None)
    name = str(options.device if trainer is None else trainer.accelerator)
    return {"gpu": "cuda"}.get(name, name)


def _print_bytes(verb: str, files: Any) -> None:
    shown = (f"{what} {'?' if size is None else _size(size)}" for what, size in files.items())
    print(f"{verb}: {', '.join(shown) or 'nothing'}")


def _print_memory(plan: Plan, there: int, device: str) -> None:
    if not plan.memory:
        return
    rows = [(what, size / _GIB) for what, size in plan.memory.items()]
    of = f"each of {plan.devices} devices" if plan.devices > 1 else device
    print(f"memory of {of}:")
    print_table(("part", "GiB"), [*rows, ("total", plan.memory_total / _GIB)])
    fits = "fits" if plan.memory_total <= there else "does not fit"
    print(f"{fits}: {device} of this machine has {there / _GIB:.1f} GiB")


def _print_placed(memory: dict[str, tuple[dict[str, int], int]]) -> None:
    """A column for each device that a model is shared out between: bytes by part, and its own."""
    print("memory of the devices that hold one model:")
    most = next(iter(memory.values()))[0]  # the first device has all parts
    rows = [(what, *(parts.get(what, 0) / _GIB for parts, _ in memory.values())) for what in most]
    totals = {name: sum(parts.values()) for name, (parts, _) in memory.items()}
    print_table(
        ("part (GiB)", *memory), [*rows, ("total", *(size / _GIB for size in totals.values()))]
    )
    for name, (_, there) in memory.items():
        fits = "fits" if totals[name] <= there else "does not fit"
        print(f"{fits}: {name} of this machine has {there / _GIB:.1f} GiB")


def _print_work(plan: Plan, rate: float, several: int) -> None:
    rows = [
        (what, flops / 1e12, time_words(flops / (rate * plan.devices)))
        for what, flops in plan.work.items()
    ]
    total = ("total", plan.flops / 1e12, time_words(plan.seconds(rate)))
    many = "this device" if several == 1 else f"these {several} devices, which take turns"
    if plan.devices > 1:
        many = f"{plan.devices} {'devices like this one' if several == 1 else f'times {many}'}"
    print(f"work of {many}, whose matrix products reach {rate / 1e12:.3g} TFLOP/s:")
    print_table(("part", "TFLOP", "at least"), [*rows, total])


def _size(size: int) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.3g} {unit}"
    return f"{size} bytes"


def time_words(seconds: float) -> str:
    """A time with a unit in which it has few digits."""
    for unit, step in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * step:
            return f"{seconds / step:.3g} {unit}"
    return f"{seconds:.2g} s"
