"""A report as one page that needs nothing else, neither files nor a network.

The page has a chart of one column against another, a table that sorts by every column, and for
each sub-network the `nas export` line that writes it. Its layout, style and script are files in
`assets/report`; what it shows is a `Report`.
"""

from __future__ import annotations

import html
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from string import Template
from typing import Any

_SCRIPTS = ("chart.js", "shape.js", "table.js", "page.js")
SIZES = "sizes"


@dataclass(frozen=True)
class Column:
    """One number of every sub-network.

    Attributes:
        name: by which rows hold its numbers; different from all others.
        group: what stands above neighbouring columns of the table.
        label: what stands below that; empty: the name.
        lower_is_better: None where it is neither.
        extra: in the table only if the reader asks for all columns.
        words: what it is and its unit, for axes and menus; empty: the name.
    """

    name: str
    group: str
    label: str = ""
    lower_is_better: bool | None = None
    extra: bool = False
    words: str = ""


@dataclass(frozen=True)
class Row:
    """One sub-network.

    Attributes:
        label: its name.
        values: numbers by the name of the column, where they are known.
        stderrs: standard errors by the name of the column, where they are known.
        command: line that exports it.
        shape: for each layer of the whole model, which shares of its heads and neurons are kept;
            empty where no shapes are shown.
    """

    label: str
    values: Mapping[str, float | None]
    stderrs: Mapping[str, float | None] = field(default_factory=dict)
    command: str = ""
    shape: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Attributes:
        title: of the page.
        summary: a sentence below the title.
        columns: of the table; those of one group are neighbours.
        rows: sub-networks of the table.
        x: name of the column that is drawn across at first.
        y: name of the column that is drawn upwards at first.
        named: what the rows are, for the legend.
        others: points without a row in the table.
        others_named: what those are.
        original: the whole model, a star in the chart.
        growth: dominated share of the objectives' range after each trial.
        details: texts to unfold, by their heading.
        numbers: file with the same numbers.
    """

    title: str
    summary: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    x: str
    y: str
    named: str = "sub-networks"
    others: Sequence[Row] = ()
    others_named: str = ""
    original: Row | None = None
    growth: Sequence[float] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    numbers: str = ""


def size_columns(names: Iterable[str]) -> list[Column]:
    """The columns of a sub-network's sizes."""
    return [Column(name, SIZES) for name in names]


def export_line(checkpoint_dir: str, choice: Sequence[str], name: str) -> str:
    """The command that exports a sub-network, ready for a shell.

    Args:
        checkpoint_dir: the super-network.
        choice: options that name the sub-network.
        name: of the directory to write.
    """
    words = ["nas", "export", "--checkpoint_dir", checkpoint_dir, *choice, "--out_dir", name]
    return shlex.join(words)


def size_options(sizes: Mapping[str, Any]) -> list[str]:
    """The options of `nas export` for the plain form of a sub-network."""
    return [
        word
        for name, size in sizes.items()
        for word in (f"--subnetwork.{name}", json.dumps(size, separators=(",", ":")))
    ]


def render(report: Report) -> str:
    """The page as HTML."""
    assert {report.x, report.y} <= {column.name for column in report.columns}, "unknown axis"
    unfolded = (
        f"<details><summary>{html.escape(heading)}</summary><pre>{html.escape(text)}</pre></details>"
        for heading, text in report.details.items()
    )
    return Template(_asset("page.html")).substitute(
        title=html.escape(report.title),
        summary=html.escape(report.summary),
        numbers=html.escape(report.numbers),
        details="\n".join(unfolded),
        data=_embedded(_plain(report)),
        script="".join(_asset(name) for name in _SCRIPTS),
        style=_asset("style.css"),
    )


def _plain(report: Report) -> dict[str, Any]:
    names = [column.name for column in report.columns]

    def of(row: Row) -> dict[str, Any]:
        return {
            "label": row.label,
            "values": [_finite(row.values.get(name)) for name in names],
            "stderrs": [_finite(row.stderrs.get(name)) for name in names] if row.stderrs else [],
            "command": row.command,
            "shape": [[round(share, 3) for share in layer] for layer in row.shape],
        }

    return {
        "columns": [
            {**asdict(c), "label": c.label or c.name, "words": c.words or c.name}
            for c in report.columns
        ],
        "rows": [of(row) for row in report.rows],
        "others": [of(row) for row in report.others],
        "original": of(report.original) if report.original else None,
        "names": {"rows": report.named, "others": report.others_named},
        "sizes": SIZES,
        "x": report.x,
        "y": report.y,
        "growth": [round(value, 6) for value in report.growth],
    }


def _finite(value: float | None) -> float | None:
    """JSON knows no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _embedded(data: object) -> str:
    """JSON that no parser of HTML takes for a tag, a comment or the end of the script."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (files("whittle_nas.assets") / "report" / name).read_text(encoding="utf-8")
