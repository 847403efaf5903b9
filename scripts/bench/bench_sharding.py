"""Peak memory of each process of a training with FSDP, against one that holds the whole model.

    python scripts/bench/bench_sharding.py [--gigabytes 1] [--processes 2] [--out sharding.json]

Every process loads a random checkpoint in bfloat16, trains two steps and writes the result, on the
CPU with gloo. Anonymous memory is its own; resident memory also counts pages of mapped files. Both
are given above those of a process with the same imports that does nothing.
"""

import argparse
import json
import os
import socket
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_export import make_checkpoint

from whittle_nas.train.batches import from_blocks
from whittle_nas.train.options import LoraOptions, LossOptions
from whittle_nas.train.prepare import (
    TrainedTensors,
    adapters,
    follow,
    load_trainable,
    part_loader,
)
from whittle_nas.train.step import Network, Role, accumulate, finish_gradients
from whittle_nas.train.teacher import make_teacher, shard_teacher
from whittle_nas.weights.checkpoint import open_checkpoint, write_checkpoint
from whittle_nas.weights.sharding import Sharding

# Many small blocks and a small vocabulary, as a share of the whole what they are of 70B.
SIZES = {"n_embd": 1024, "intermediate_size": 3072, "padded_vocab_size": 2048, "vocab_size": 2000}
KINDS = {"anonymous": "RssAnon", "resident": "VmRSS"}


class Watch:
    """The highest memory of this process until `stop`, in bytes."""

    def __init__(self) -> None:
        self.peak = dict.fromkeys(KINDS, 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.is_set():
            text = Path("/proc/self/status").read_text()
            lines = dict(line.split(":", 1) for line in text.splitlines())
            for kind, key in KINDS.items():
                self.peak[kind] = max(self.peak[kind], 1024 * int(lines[key].split()[0]))
            time.sleep(0.005)

    def stop(self) -> dict[str, int]:
        """The highest figures, by kind."""
        self._done.set()
        self._thread.join()
        return self.peak


def work(rank: int, world: int, port: int, folder: Path, kind: str, adapted: bool) -> None:
    """One process: load, two steps, write."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
    idle = Watch()
    time.sleep(0.05)
    before, watch = idle.stop(), Watch()
    train(folder, sharded=kind == "fsdp", adapted=adapted)
    peak = watch.stop()
    above = {name: peak[name] - before[name] for name in peak}
    (folder / f"{kind}-{rank}.json").write_text(json.dumps(above))
    dist.barrier()
    dist.destroy_process_group()


def train(folder: Path, *, sharded: bool, adapted: bool) -> None:
    """Two steps of the whole network, taught by the checkpoint, and the file at the end."""
    found, precision = open_checkpoint(folder / "source"), "bf16-mixed"
    options = LoraOptions(r=8) if adapted else None
    supernet = load_trainable(found, options, precision=precision, sharded=sharded)
    teacher = make_teacher(LossOptions(), supernet, found, precision=precision, sharded=sharded)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        load = part_loader(found, precision=precision, adapted=adapted)
        supernet.sharding = Sharding(supernet.model, mesh, prepare=load)
        assert teacher is not None
        shard_teacher(teacher.model, supernet, mesh, precision)
    trained = [p for p in supernet.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    (batch,) = from_blocks(torch.randint(1000, (1, 33)))
    batch = type(batch)(batch.input_ids[None], batch.labels[None])
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            full = Network(supernet.full, Role.full)
            accumulate(supernet, batch, [full], LossOptions(), teacher=teacher)
        finish_gradients(trained, 64.0)
        optimizer.step()
        optimizer.zero_grad()
    like = found.state_dict()
    if dist.get_rank():
        if sharded:
            follow(supernet, like)
        return
    out_dir = Path(tempfile.mkdtemp(dir=folder))
    tensors = TrainedTensors(supernet, like)
    write_checkpoint(out_dir, tensors, config=found.config, source=found.path)
    list(adapters(supernet))
    supernet.rest()


def main() -> None:
    """Both ways, with adapters or all weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--trained", choices=("adapters", "all"), nargs="+", default=["adapters"])
    parser.add_argument("--out", type=Path, default=Path("sharding.json"))
    options = parser.parse_args()
    # glibc keeps what is freed in small pieces, which on a GPU no one would see
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "100000"
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder / "source", options.gigabytes, **SIZES)
        size = (folder / "source" / "lit_model.pth").stat().st_size
        results["checkpoint_bytes"] = size
        for trained in options.trained:
            for kind in ("ddp", "fsdp"):
                with socket.socket() as free:
                    free.bind(("localhost", 0))
                    port = free.getsockname()[1]
                run = partial(work, adapted=trained == "adapters")
                mp.spawn(_call, (run, options.processes, port, folder, kind), options.processes)
                found = [
                    json.loads((folder / f"{kind}-{rank}.json").read_text())
                    for rank in range(options.processes)
                ]
                over = {key: [round(one[key] / size, 3) for one in found] for key in KINDS}
                results[f"{trained}, {kind}"] = over
                print(f"{trained}, {kind}: peak over {size:,} bytes per process {over}", flush=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")


def _call(rank: int, run: partial[None], *arguments: object) -> None:
    run(rank, *arguments)


if __name__ == "__main__":
    main()
