"""The last step of scripts/reproduce.sh: one Markdown file of all tables and pictures.

python scripts/studies/summary.py <out_dir>
"""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

PARTS = {
    "importance": "What sorting is worth: RPD of random sub-networks, and the share that improved",
    "ablation": "Samplers, losses and sorting",
    "fronts": "Fronts against the alternatives",
}


def main() -> None:
    """Write `summary.md` and print where it is."""
    out = Path(sys.argv[1])
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "litgpt", "lightning"))
    text = "# Studies of nas\n\n"
    text += f"{packages}, Python {platform.python_version()}, {os.cpu_count()} CPU cores. "
    text += "Everything is mean +- standard deviation over the seeds.\n"
    for part, title in PARTS.items():
        if not (out / part / "table.md").is_file():
            continue
        seconds = out / f"{part}.seconds"
        took = f" ({int(seconds.read_text()) / 60:.0f} minutes)" if seconds.is_file() else ""
        text += f"\n## {title}{took}\n\n{(out / part / 'table.md').read_text().strip()}\n"
        for picture in sorted((out / part).glob("*.png")):
            text += f"\n![{picture.stem}]({part}/{picture.name})\n"
    (out / "summary.md").write_text(text)
    print(f"all tables and pictures: {out / 'summary.md'}")


if __name__ == "__main__":
    main()
