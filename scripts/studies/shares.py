"""Steps and table of scripts/studies/shares.sh.

python scripts/studies/shares.py steps <sorted checkpoint> <whole share>,<smallest share> <passes>
python scripts/studies/shares.py table <out_dir>
"""

import sys
from pathlib import Path

from plots import shown

from whittle_nas.reading import read_yaml
from whittle_nas.space import load_space
from whittle_nas.weights.checkpoint import load_supernet
from whittle_nas.weights.counting import parameter_counter

SAMPLED = 2  # networks of a step beside the whole and the smallest


def steps(checkpoint: Path, shares: str, passes: float) -> int:
    """So many steps cost so many passes; a sampled network is taken as half-way."""
    net = load_supernet(checkpoint)
    count = parameter_counter(net.config)
    least = count(load_space("aligned", net.config).smallest) / count(net.full)
    whole, smallest = map(float, shares.split(","))
    sampled = (SAMPLED + 1 - whole + 1 - smallest) * (1 + least) / 2
    return round(passes / (whole + smallest * least + sampled))


def table(out: Path) -> str:
    """Losses of the whole, of the smallest, and of the others that were validated."""
    lines = [
        "| model | whole, smallest | steps | whole | smallest | the others |",
        "|---" * 6 + "|",
    ]
    for mix in sorted(path for path in out.glob("*/*,*") if any(path.glob("*/losses.yaml"))):
        found = [read_yaml(path)["nats_per_token"] for path in sorted(mix.glob("*/losses.yaml"))]
        for at, name in ((min, "before"), (max, mix.name)):
            cells = zip(*(_parts(loss[at(loss)]) for loss in found), strict=True)
            taken = "" if at is min else str(max(found[0]))
            line = f"| {mix.parent.name} | {name} | {taken} | {' | '.join(map(shown, cells))} |"
            if line not in lines:
                lines.append(line)
    return "\n".join(lines)


def _parts(losses: dict[str, float]) -> tuple[float, float, float]:
    named = ("full", "mean", "smallest")
    others = [loss for name, loss in losses.items() if name not in named]
    return losses["full"], losses["smallest"], sum(others) / len(others)


if __name__ == "__main__":
    if sys.argv[1] == "steps":
        print(steps(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])))
    else:
        print(table(Path(sys.argv[2])))
