"""The Markdown table and the picture of `table1.py`, of whatever rows and passes are there."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whittle_nas.reading import read_json

Known = Mapping[str, Any]


def write(out: Path, names: Sequence[str], tasks: Mapping[str, str]) -> None:
    """Write `table1.md` and `table1.png` into the study's folder."""
    files = [out / name / "row.json" for name in names]
    rows = [read_json(file) for file in files if file.is_file()]
    rows = [row for row in rows if "model" in row]
    text = "\n".join(_table(rows, tasks)) + "\n"
    (out / "table1.md").write_text(text)
    print(text)
    _picture(out / "table1.png", rows)


def _table(rows: Sequence[Known], tasks: Mapping[str, str]) -> list[str]:
    whole = rows[0]["model"]["num_params"]
    columns = [
        "method",
        "parameters",
        "MB",
        "WikiText ppl",
        "C4 ppl",
        "mean accuracy",
        *tasks,
        "prefill ms",
        "decode ms",
        "recovered: ppl",
        "C4 ppl of it",
        "accuracy",
    ]
    table = []
    for row in rows:
        model, latency = row["model"], row.get("latency", {})
        scores = row.get("tasks", {})
        cells = [
            row["label"],
            f"{100 * model['num_params'] / whole:.1f} %",
            f"{model['bytes'] / 1e6:.0f}",
            _ppl(row.get("text"), "wikitext"),
            _ppl(row.get("text"), "c4"),
            _mean(scores, tasks),
            *[f"{scores[t][0]:.3f} ± {scores[t][1]:.3f}" if t in scores else "" for t in tasks],
            f"{latency['latency_ms']:.0f}" if latency else "",
            f"{latency['decode_ms_per_token']:.1f}" if latency else "",
            _ppl(row.get("recovered_text"), "wikitext"),
            _ppl(row.get("recovered_text"), "c4"),
            _mean(row.get("recovered_tasks", {}), tasks),
        ]
        table.append(cells)
    there = [at for at in range(len(columns)) if any(cells[at] for cells in table)]
    lines = [[columns[at] for at in there], ["---"] * len(there)]
    lines += [[cells[at] for at in there] for cells in table]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _ppl(found: Known | None, name: str) -> str:
    """Perplexity and its standard error, of nats per token and theirs."""
    if not found:
        return ""
    value = math.exp(found[f"{name}_nats"])
    error = value * found[f"{name}_stderr"]
    return f"{value:.1f} ± {error:.1f}" if value < 1000 else f"{value:.0f}"


def _mean(scores: Known, tasks: Mapping[str, str]) -> str:
    """Mean over the tasks, whose errors are independent."""
    if not all(task in scores for task in tasks):
        return ""
    values = [scores[task] for task in tasks]
    error = math.sqrt(sum(v[1] ** 2 for v in values)) / len(values)
    return f"{sum(v[0] for v in values) / len(values):.3f} ± {error:.3f}"


def _picture(path: Path, rows: Sequence[Known]) -> None:
    """Perplexity against bytes, and against latency where it was measured."""
    from matplotlib.figure import Figure

    x = {
        "MB (16 bits but for what was compressed)": lambda r: r["model"]["bytes"] / 1e6,
        "prefill of 512 tokens, ms": lambda r: r["latency"]["latency_ms"],
    }
    having = [[r for r in rows if "text" in r], [r for r in rows if {"text", "latency"} <= {*r}]]
    panels = [(label, x[label], found) for label, found in zip(x, having, strict=True) if found]
    if not panels:
        return
    figure = Figure(figsize=(2.2 + 5.6 * len(panels), 5), layout="constrained")
    labels = list(dict.fromkeys(row["label"] for row in rows))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for (label, across, found), ax in zip(panels, axes, strict=True):
        for name in labels:
            points = [r for r in found if r["label"] == name]
            at = labels.index(name)
            style = {"color": f"C{at % 10}", "marker": "osD^vPX"[at % 7]}
            if any(row["name"] == "dense" for row in points):  # the whole model
                style = {"color": "black", "marker": "*", "markersize": 12}
            for kind, fill in (("text", "none"), ("recovered_text", "full")):
                those = sorted(
                    (across(r), math.exp(r[kind]["wikitext_nats"])) for r in points if kind in r
                )
                if those:
                    ax.plot(
                        *zip(*those, strict=True),
                        fillstyle=fill,
                        linewidth=0.8,
                        **style,
                        label=name if kind == "text" else None,
                    )
        recovered = any("recovered_text" in row for row in found)
        also = ", filled: recovered" if recovered else ""
        ax.set(yscale="log", xlabel=label, ylabel=f"perplexity of WikiText-2{also}")
        ax.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
