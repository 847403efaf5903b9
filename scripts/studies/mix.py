"""Networks and table of scripts/studies/mix.sh.

python scripts/studies/mix.py picks <sorted checkpoint> <picks.yaml>
python scripts/studies/mix.py table <out_dir>
"""

import sys
from pathlib import Path

import yaml
from plots import shown
from repair import sub_of

from whittle_nas.reading import read_yaml
from whittle_nas.weights.checkpoint import load_supernet

SHARES = ("80%", "60%")


def picks(checkpoint: Path, out: Path) -> None:
    """Two sizes, all channels and neurons shrunk alike."""
    net = load_supernet(checkpoint)
    subs = [{"name": share.strip("%"), **sub_of(net, share).to_dict()} for share in SHARES]
    out.write_text(yaml.safe_dump(subs))


def table(out: Path) -> str:
    """Losses before and after by the weights of KL and cross entropy."""
    models = sorted(path.parent.name for path in out.glob("*/picks.yaml"))
    heads = [f"{model} {share}" for model in models for share in SHARES]
    lines = [f"| KL, CE | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    start: list[str] = []
    for mix in dict.fromkeys(path.name for path in sorted(out.glob("*/*,*"))):
        cells, start = [], []
        for model in models:
            for share in SHARES:
                found = sorted((out / model / mix).glob(f"*/{share.strip('%')}/losses.yaml"))
                losses = [read_yaml(path)["nats_per_token"] for path in found]
                start.append(shown(loss[min(loss)]["full"] for loss in losses))
                cells.append(shown(loss[max(loss)]["full"] for loss in losses))
        lines.append(f"| {mix} | {' | '.join(cells)} |")
    lines.insert(2, f"| before | {' | '.join(start)} |")
    return "\n".join(lines)


def together(out: Path) -> str:
    """Losses of the whole network and of the others that were validated, before and after."""
    lines = ["", "| KL, CE | whole | its sub-networks |", "|---|---|---|"]
    for mix in sorted(path for path in out.glob("together/*/*,*")):
        found = [read_yaml(path)["nats_per_token"] for path in sorted(mix.glob("*/losses.yaml"))]
        if not found:
            continue
        for at, name in ((min, "before"), (max, mix.name)):
            whole, others = zip(*(_parts(loss[at(loss)]) for loss in found), strict=True)
            line = f"| {name} | {shown(whole)} | {shown(others)} |"
            if line not in lines:
                lines.append(line)
    return "\n".join(lines)


def _parts(losses: dict[str, float]) -> tuple[float, float]:
    others = [loss for name, loss in losses.items() if name not in ("full", "mean")]
    return losses["full"], sum(others) / len(others)


if __name__ == "__main__":
    if sys.argv[1] == "picks":
        picks(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(table(Path(sys.argv[2])))
        if (Path(sys.argv[2]) / "together").is_dir():
            print(together(Path(sys.argv[2])))
