"""The Markdown table of `scripts/compare_whittle/compare.py`."""

from typing import Any


def table(found: dict[str, Any]) -> str:
    """All parts that are in the results, and what did not run."""
    lines = [
        "# Side by side with whittle 0.6.0",
        "",
        f"Threads per process: {found.get('machine', {}).get('threads', '?')}. Medians; ratios are "
        "medians of ours / peer within rounds (below 1: ours is faster).",
        "",
        "| what | ours | peer | litgpt alone | wall ratio | CPU ratio | CPU, alone / peer | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, part in found.items():
        if "error" not in part:
            lines += _rows(name, part)
    lines += _memory(found) + _counts(found)
    if "ours surrogate" in found.get("search", {}):
        lines += _search(found["search"])
    if "training_s" in found.get("pipeline", {}).get("ours", {}):
        lines += _pipeline(found["pipeline"])
    lines += _failures(found)
    return "\n".join(lines) + "\n"


def _rows(name: str, part: dict[str, Any]) -> list[str]:
    if "unseen" in part:
        unseen = _row(f"{name}, sizes not seen before", part["unseen"])
        return [unseen, _row(f"{name}, seen before", part["again"])]
    return [_row(name, part)] if "wall_ms" in part.get("peer", {}) else []


def _row(name: str, part: dict[str, Any]) -> str:
    ours, alone = part["ours"], part.get("alone")
    cells = [
        name,
        _ms(ours),
        _ms(part["peer"]),
        _ms(alone) if alone else "",
        f"{ours['wall_to_peer']:.2g}",
        f"{ours['cpu_to_peer']:.2g}",
        f"{alone['cpu_to_peer']:.2g}" if alone else "",
        f"{part['load']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _ms(side: dict[str, Any]) -> str:
    value = side["wall_ms"]
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _memory(found: dict[str, Any]) -> list[str]:
    lines = ["", "| peak memory of a step, MiB | ours | peer | litgpt alone |", "|---|---|---|---|"]
    for name, part in found.items():
        if "peak_mb" in part.get("ours", {}):
            cells = [f"{part[side]['peak_mb']:.0f}" for side in ("ours", "peer", "alone")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 3 else []


def _counts(found: dict[str, Any]) -> list[str]:
    """Whether both sides mean the same by a loss and by a number of parameters."""
    lines = [""]
    for name, part in found.items():
        if "parameters" in part:
            wrong = [(ours, peer) for ours, peer in part["parameters"] if ours != peer]
            example = f", for instance ours {wrong[0][0]:,}, peer {wrong[0][1]:,}" if wrong else ""
            lines.append(
                f"- {name}: losses differ by at most {part['largest_loss_difference']:.1e}; the "
                f"numbers of parameters differ for {len(wrong)} of {len(part['parameters'])}"
                f"{example}."
            )
    return lines if len(lines) > 1 else []


def _search(part: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"Search, {part['seconds_of_a_search']} s after the first trial (equal CPU: "
        f"{part['cpu_seconds']:.1f} s), per seed; hypervolume over validation loss and parameters "
        "in percent of the joint front's.",
        "",
        "| search | hypervolume | at equal CPU | trials | mean size | start-up | loss of largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in part.items():
        if not isinstance(run, dict):
            continue
        shares = [
            ", ".join(f"{value:.1f}" for value in run[key])
            for key in ("hypervolume_percent", "hypervolume_percent_equal_cpu")
        ]
        trials = ", ".join(map(str, run["trials"]))
        sizes = ", ".join(f"{value / 1e3:.0f} k" for value in run["mean_parameters"])
        cells = [name, *shares, trials, sizes, f"{run['start_up_s']:.1f} s"]
        lines.append("| " + " | ".join([*cells, f"{run['largest_loss']:.4f}"]) + " |")
    return lines


def _pipeline(part: dict[str, Any]) -> list[str]:
    shares = list(part["ours"]["loss_below"])
    heads = " | ".join(f"loss, <= {float(share):.0%} of the parameters" for share in shares)
    lines = [
        "",
        f"Training for about the same time and {part['seconds_of_a_search']} s of search, from the "
        "same pretrained model; values per seed.",
        "",
        f"| tool | sandwich steps | training, s | hypervolume | {heads} |",
        "|---" * (4 + len(shares)) + "|",
    ]
    for side in ("ours", "peer"):
        run = part[side]
        cells = [
            str(part["steps"][side]),
            ", ".join(f"{value:.0f}" for value in run["training_s"]),
            ", ".join(f"{value:.1f}" for value in run["hypervolume_percent"]),
            *(", ".join(f"{v:.3f}" for v in run["loss_below"][share]) for share in shares),
        ]
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return lines


def _failures(found: dict[str, Any]) -> list[str]:
    lines = ["", "What the peer did with these commands:", ""]
    for name, part in found.items():
        if "error" in part:
            lines.append(f"- {name}: {part['error']}")
    for name, run in found.get("refusals", {}).items():
        if isinstance(run, dict):
            lines.append(f"- {name}: `{run['command']}` (exit {run['code']}): {run['message']}")
    return lines if len(lines) > 3 else []
