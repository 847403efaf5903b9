"""Which devices a worker of Ray asks for, and whether there are enough; without Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from whittle_nas.cluster import as_seen_by_a_worker, check_room
from whittle_nas.errors import ConfigError
from whittle_nas.search import ray_pool
from whittle_nas.search.options import HalvingOptions, TaskOptions
from whittle_nas.search.workers import make_pool
from whittle_nas.weights.placement import devices_of


def node(alive=True, **resources):
    return {"Alive": alive, "Resources": {"CPU": 8.0, **resources}}


@pytest.mark.parametrize(
    ("given", "seen", "gpus"),
    [
        ("cuda", "cuda:0", 1),
        ("cuda:3", "cuda:0", 1),
        ("cuda:2,cuda:5", "cuda:0,cuda:1", 2),
        ("cuda:1,cuda:1,cuda:0,cpu", "cuda:0,cuda:0,cuda:1,cpu", 2),
        ("cpu", "cpu", 0),
    ],
)
def test_a_worker_numbers_its_gpus_from_0(given, seen, gpus):
    assert as_seen_by_a_worker(devices_of(given)) == (devices_of(seen), gpus)


def test_no_worker_spans_two_machines():
    three = [node(GPU=3.0), node(GPU=3.0), node(alive=False, GPU=8.0), node()]
    check_room(three, workers=6, gpus=1)
    check_room(three, workers=2, gpus=2)
    check_room(three, workers=24, gpus=0)
    with pytest.raises(ConfigError, match="--devices 3 with 2 GPUs each: .* have room for 2$"):
        check_room(three, workers=3, gpus=2)
    with pytest.raises(ConfigError, match="--devices 7 exceeds the 6 GPUs that Ray has"):
        check_room(three, workers=7, gpus=1)
    with pytest.raises(ConfigError, match="--devices 25 exceeds the 24 CPUs that Ray has"):
        check_room(three, workers=25, gpus=0)


@pytest.mark.parametrize(
    ("given", "shared"),
    [("cpu", True), ("cuda:0,cpu", True), ("cpu,cpu", True), ("cuda:0", False)],
)
def test_workers_that_use_the_cpu_share_its_threads(given, shared, monkeypatch):
    made = []
    monkeypatch.setattr(ray_pool, "RayPool", lambda spec, _tokens, **_: made.append(spec))
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    request: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(path=Path("there")), quality_metrics=("val_loss",),
        search_blocks=1, halving=HalvingOptions(), batch_size=None, placed_on=devices_of(given),
        dtype=None, tasks=TaskOptions(), calibration=None, library=None, workers=3, cluster=None,
        tokens=None,
    )  # fmt: skip
    make_pool(request, print)
    assert made[0].threads == (2 if shared else None)
