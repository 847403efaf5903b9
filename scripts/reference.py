"""Write docs/reference: one page per command, from the same signatures as `nas <command> --help`.

    python scripts/reference.py [folder]       default: docs/reference

A test compares what is there with what this would write.
"""

from __future__ import annotations

import inspect
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any

from whittle_nas.cli.commands import COMMANDS, function_of
from whittle_nas.cli.parser import make_parser

ROOT = Path(__file__).parents[1]
ORDER = (
    "init",
    "run",
    "importance",
    "finetune",
    "candidates",
    "search",
    "evaluate",
    "export",
    "generate",
    "prune",
    "profile",
)
ABOUT = """Every option is also a key of a `--config` file, where a nested one is nested:
`nas <command> --print_config` prints a file to start from. Wrong input is answered by one sentence
and exit status 2. After an interruption type the command again, `nas finetune` and `nas search`
with `--resume true`."""


def main() -> None:
    """Write every page."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Every page of the reference by its file name."""
    names = [name for name in ORDER if name in COMMANDS]
    names += [name for name in COMMANDS if name not in names and name != "finetune-supernet"]
    rows = [f"| [nas {name}]({name}.md) | {COMMANDS[name][2]} |" for name in names]
    table = "\n".join(["| command | what it does |", "|---|---|", *rows])
    index = f"# Commands\n\n{ABOUT}\n\n{table}\n"
    return {"index.md": index, **{f"{name}.md": page(name) for name in names}}


def page(name: str) -> str:
    """One command's page: its own options first, then each group of nested ones."""
    function = function_of(name)
    required = {
        f"--{key}"
        for key, value in inspect.signature(function).parameters.items()
        if value.default is inspect.Parameter.empty
    }
    groups: dict[str, list[str]] = {"": []}
    for action in make_parser(name, function)._actions:
        option = next((text for text in action.option_strings if text.startswith("--")), "")
        if not option or action.dest in ("help", "config", "print_config") or _is_group(action):
            continue
        default = "required" if option in required else _default(action)
        row = f"| `{option}` | {default} | {_help(action)} |"
        groups.setdefault(option.rpartition(".")[0], []).append(row)
    about = inspect.cleandoc(function.__doc__ or "").split("\nArgs:")[0]
    lines = [f"# nas {name}", "", _markdown(about)]
    for group, rows in groups.items():
        heading = f"## `{group}`" if group else "## Options"
        lines += ["", heading, "", "| option | default | meaning |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _is_group(action: Any) -> bool:
    """`--data` alone takes a file of the group's options; its members have rows of their own."""
    return type(action).__name__ == "_ActionConfigLoad"


def _default(action: Any) -> str:
    value = action.default
    if "SUPPRESS" in str(value):
        return ""
    value = getattr(value, "value", value)
    if value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text and len(text) < 60 else ""


def _help(action: Any) -> str:
    text = re.sub(r"\s*\((required, )?type: .*", "", action.help or "", flags=re.DOTALL)
    text = text.replace("%%", "%")
    kind = getattr(action, "_typehint", None)
    if inspect.isclass(kind) and issubclass(kind, Enum):
        choices = ", ".join(f"`{member.value}`" for member in kind)
        text = f"{text.rstrip('. ')}. One of {choices}."
    return _markdown(text).replace("|", "\\|").replace("\n", " ").strip()


def _markdown(text: str) -> str:
    """Angle brackets would be HTML."""
    return re.sub(r"<([\w -]+)>(?![^`]*`(?:[^`]*`[^`]*`)*[^`]*$)", r"&lt;\1&gt;", text.strip())


if __name__ == "__main__":
    main()
