"""Workers of Ray; each test starts a cluster of its own, which takes seconds."""

import os
import random
import signal

import psutil
import pytest

from whittle_nas.data import TextData, load_blocks
from whittle_nas.errors import ConfigError
from whittle_nas.search.evaluation import EvaluationSpec, Evaluator, Job
from whittle_nas.search.trials import Status
from whittle_nas.space import load_space
from whittle_nas.weights.checkpoint import open_checkpoint

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture
def spec(checkpoint_dir) -> EvaluationSpec:
    return EvaluationSpec(checkpoint_dir, ("val_loss", "perplexity"), threads=1)


@pytest.fixture
def tokens(spec, bundled):
    data = TextData(files=bundled / "valid.jsonl", block_size=64, num_blocks=64)
    config = open_checkpoint(spec.checkpoint_dir).config
    return load_blocks(data, spec.checkpoint_dir, config=config).tokens


def jobs(spec, count) -> list[Job]:
    space = load_space("aligned", open_checkpoint(spec.checkpoint_dir).config)
    rng = random.Random(0)
    return [Job(number, space.sample(rng)) for number in range(count)]


def workers_of_this_process() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [c.pid for c in children if any("BoundEvaluator" in part for part in c.cmdline())]


def test_a_killed_worker_loses_no_trial(spec, tokens):
    from whittle_nas.search.ray_pool import RayPool

    work = jobs(spec, 30)
    pool = RayPool(spec, tokens, workers=2)
    try:
        for job in work:
            pool.submit(job)
        found = dict([pool.next()])
        os.kill(workers_of_this_process()[0], signal.SIGKILL)
        found.update(pool.next() for _ in work[1:])
    finally:
        pool.close()
    assert set(found) == set(range(30))
    here = Evaluator(spec, tokens)
    for job in work:
        assert found[job.number].status is Status.complete
        assert found[job.number].metrics == pytest.approx(here.evaluate(job).metrics, rel=1e-5)


def test_workers_that_can_not_start_say_why(spec, tokens, checkpoint_dir):
    from whittle_nas.search.ray_pool import RayPool

    (checkpoint_dir / "lit_model.pth").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="lit_model.pth"):
        RayPool(spec, tokens, workers=1)


def test_a_cluster_that_is_not_there(spec, tokens):
    from whittle_nas.search.ray_pool import RayPool

    with pytest.raises(ConfigError, match="--ray_address 127.0.0.1:1"):
        RayPool(spec, tokens, workers=1, address="127.0.0.1:1")
