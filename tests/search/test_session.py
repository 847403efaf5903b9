"""Whole searches on a small random checkpoint."""

import gc
import json
import random
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace

import pytest
import torch

from tests.cli.test_main import nas
from tests.conftest import first_of
from whittle_nas.data import TextData, load_blocks
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.metrics import latency_parts
from whittle_nas.metrics.latency_parts import Phase
from whittle_nas.metrics.measured import TURNS
from whittle_nas.search import costs, evaluation
from whittle_nas.search.constraints import read_constraints
from whittle_nas.search.evaluation import Evaluator
from whittle_nas.search.finish import Listener
from whittle_nas.search.loop import Schedule
from whittle_nas.search.options import CostOptions, HalvingOptions, Method, RecoveryOptions
from whittle_nas.search.pareto import is_on_front
from whittle_nas.search.recovery import Recovery
from whittle_nas.search.request import Request
from whittle_nas.search.results import points_of
from whittle_nas.search.searchers import SEARCHERS
from whittle_nas.search.session import Session
from whittle_nas.search.trials import Status, read_trials
from whittle_nas.space import SubNetwork, load_space
from whittle_nas.space.front import read_front
from whittle_nas.train.batches import from_blocks
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
from whittle_nas.weights.supernet import SuperNetwork


@pytest.fixture
def request_(checkpoint_dir, bundled, tmp_path) -> Request:
    checkpoint = open_checkpoint(checkpoint_dir)
    data = TextData(files=bundled / "valid.jsonl", block_size=32, num_blocks=6)
    out_dir = tmp_path / "search"
    out_dir.mkdir()
    return Request(
        checkpoint=checkpoint,
        out_dir=out_dir,
        space=load_space({"n_embd": {"min": 24, "step": 4}, "n_layer": [1, 2, 3],
                          "intermediate_size": [24, 48, 72]}, checkpoint.config),
        objectives=("val_loss", "num_params"),
        constraints=(),
        tokens=load_blocks(data, checkpoint_dir, config=checkpoint.config).tokens,
        method=Method.surrogate,
        num_trials=16,
        seed=5,
        search_blocks=2,
    )  # fmt: skip


def trials_of(request):
    metrics = Session(request).metrics
    found, _ = read_trials(request.out_dir / "trials.csv", metrics, request.space)
    return [replace(trial, seconds=0.0) for trial in sorted(found, key=lambda t: t.number)]


class Stop(Exception):
    """In place of a kill."""


def stop_after(count):
    def on_trial(trials):
        if len(trials) == count:
            raise Stop

    return Listener(on_trial=on_trial)


def test_front_is_what_the_trials_say_evaluated_on_all_blocks(request_):
    outcome = Session(request_).run(resume=False)
    assert len(outcome.trials) == 16
    assert [trial.blocks for trial in outcome.trials] == [2] * 16
    front = read_front(request_.out_dir / "front.json", range(3))
    supernet = load_supernet(request_.checkpoint.path)
    for entry in front.entries:
        model = supernet.standalone(entry.subnetwork)
        assert entry.metrics["val_loss"] == pytest.approx(nats_per_token(model, request_.tokens))
        parameters = sum(p.numel() for p in model.parameters())
        assert entry.metrics["num_params"] == parameters
        assert entry.metrics["weight_bytes"] == 4 * parameters
    points = points_of(outcome.trials, request_.objectives)
    best = {t.sub for t, kept in zip(outcome.trials, is_on_front(points), strict=True) if kept}
    assert {entry.subnetwork for entry in front.entries} <= best
    text = {"block_bos": False, "blocks": 6, "block_size": 32, "blocks_in_search": 2}
    assert front.how_measured["text"] == text


def test_a_front_is_timed_and_is_there_if_that_fails(request_, tmp_path, monkeypatch):
    def taken(plan, _load, phase, *, rounds):
        assert (phase, rounds) == (Phase.prefill, 1)
        return plan.own_config.n_layer + plan.own_config.n_embd / 100

    monkeypatch.setattr(costs, "time_whole", taken)
    front = Session(request_).run(resume=False).front
    full = SubNetwork.from_config(request_.checkpoint.config)
    timed = {entry.subnetwork: entry.metrics for entry in front.entries}
    for sub, metrics in {**timed, full: front.whole["metrics"]}.items():
        assert metrics["latency_ms"] == pytest.approx(sub.n_layer + sub.n_embd / 100)

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(costs, "time_whole", no_memory)
    other, warnings = replace(request_, out_dir=tmp_path / "other"), []
    other.out_dir.mkdir()
    untimed = Session(other, Listener(warn=warnings.append)).run(resume=False).front
    assert "could not be timed" in warnings[0]
    written = read_front(other.out_dir / "front.json", range(3))
    assert written.dump() == untimed.dump()
    for entry in untimed.entries:
        known = timed[entry.subnetwork]
        assert entry.metrics == {name: known[name] for name in known if name != "latency_ms"}


@pytest.mark.parametrize("method", first_of(SEARCHERS))
def test_interrupted_and_resumed_is_uninterrupted(request_, tmp_path, method):
    # times are never the same twice
    request = replace(request_, method=method, time_front=False)
    Session(request).run(resume=False)
    broken = replace(request, out_dir=tmp_path / "broken")
    broken.out_dir.mkdir()
    with pytest.raises(Stop):
        Session(broken, stop_after(7)).run(resume=False)
    trials = broken.out_dir / "trials.csv"
    trials.write_bytes(trials.read_bytes()[:-9])  # the kill came while the last line was written
    warnings = []
    Session(broken, Listener(warn=warnings.append)).run(resume=True)
    assert "cut off" in warnings[0]
    assert trials_of(broken) == trials_of(request)
    assert (broken.out_dir / "front.json").read_text() == (
        request.out_dir / "front.json"
    ).read_text()


@pytest.mark.slow
def test_a_finished_search_is_extended(request_, tmp_path):
    Session(replace(request_, num_trials=9)).run(resume=False)
    Session(request_).run(resume=True)
    whole = replace(request_, out_dir=tmp_path / "whole")
    whole.out_dir.mkdir()
    Session(whole).run(resume=False)
    assert trials_of(request_) == trials_of(whole)


def test_resume_with_other_settings_names_them(request_):
    Session(replace(request_, num_trials=3)).run(resume=False)
    other = replace(request_, seed=6, method=Method.random)
    with pytest.raises(ConfigError, match=r'method was "surrogate" and is "random"; seed was 5'):
        Session(other).run(resume=True)


class Shuffled:
    """Results in any order, as from workers of different speed."""

    def __init__(self, pool, seed):
        self._pool, self._rng, self._done = pool, random.Random(seed), []
        self._running = 0

    def submit(self, job):
        self._running += 1
        self._pool.submit(job)

    def next(self):
        self._done += [self._pool.next() for _ in range(self._running - len(self._done))]
        self._running -= 1
        return self._done.pop(self._rng.randrange(len(self._done)))

    def close(self):
        pass


def parallel_trials(request, seed, directory, monkeypatch):
    request = replace(request, out_dir=directory, workers=3)
    directory.mkdir()
    inline = replace(request, workers=1)
    pool = Shuffled(Session(inline)._pool(), seed)
    session = Session(request)
    monkeypatch.setattr(session, "_pool", lambda: pool)
    session.run(resume=False)
    return trials_of(request)


def test_parallel_runs_repeat_whoever_is_first(request_, tmp_path, monkeypatch):
    first = parallel_trials(request_, 1, tmp_path / "a", monkeypatch)
    assert parallel_trials(request_, 2, tmp_path / "b", monkeypatch) == first
    # Interrupted, then gone on with in a single process: proposals still know as much as before.
    rows = (tmp_path / "a" / "trials.csv").read_text().splitlines(keepends=True)
    (tmp_path / "a" / "trials.csv").write_text("".join(rows[:9]))
    single = replace(request_, out_dir=tmp_path / "a")
    Session(single).run(resume=True)
    assert trials_of(single) == first


def test_what_a_proposal_knows_depends_on_its_number_alone():
    assert [Schedule(9).known_before(n) for n in range(4)] == [0, 1, 2, 3]
    assert [Schedule(9, ahead=3).known_before(n) for n in range(5)] == [0, 0, 0, 1, 2]
    groups = Schedule(9, ahead=3, in_groups=True)
    assert [groups.known_before(n) for n in range(7)] == [0, 0, 0, 3, 3, 3, 6]


def spoil_last_layer(checkpoint_dir):
    """Sub-networks with all layers overflow and give NaN."""
    path = checkpoint_dir / "lit_model.pth"
    tensors = torch.load(path)
    for name, tensor in tensors.items():
        if name.startswith("transformer.h.2.mlp."):
            tensor.fill_(1e30)
    torch.save(tensors, path)


def test_failures_are_recorded_and_the_search_goes_on(request_, checkpoint_dir):
    spoil_last_layer(checkpoint_dir)
    outcome = Session(request_).run(resume=False)
    failed = [trial for trial in outcome.trials if trial.status is Status.failed]
    assert failed
    assert all(
        trial.sub.n_layer == 3 and trial.note.startswith("val_loss is nan") for trial in failed
    )
    assert all(entry.subnetwork.n_layer < 3 for entry in outcome.front.entries)
    assert trials_of(request_)[0].status is Status.failed


def failing(monkeypatch, error, *, when=lambda _: True):
    """A device that fails in some evaluations, and the numbers of all that were asked for."""
    whole, asked = Evaluator._evaluate, []

    def evaluate(self, job):
        if not job.whole:
            asked.append(job.number)
            if when(job):
                raise error
        return whole(self, job)

    monkeypatch.setattr(Evaluator, "_evaluate", evaluate)
    return asked


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), ConfigError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (ConfigError("data.block_size=64 exceeds"), ConfigError),
    ],
)
def test_a_failing_device_ends_the_search(request_, monkeypatch, error, raised):
    failing(monkeypatch, error, when=lambda job: job.number == 3)
    with pytest.raises(raised, match=str(error)[:20]):
        Session(request_).run(resume=False)
    assert [trial.number for trial in trials_of(request_)] == [0, 1, 2]


def test_memory_that_runs_out_is_recorded_and_tried_again_on_resume(request_, monkeypatch):
    warnings: list[str] = []
    with monkeypatch.context() as patch:
        asked = failing(patch, torch.OutOfMemoryError("no"), when=lambda job: job.number in (3, 7))
        failed = Session(request_).run(resume=False)
    assert asked == list(range(16))
    statuses = [trial.status is Status.failed for trial in failed.trials]
    assert [number for number, is_failed in enumerate(statuses) if is_failed] == [3, 7]
    asked = failing(monkeypatch, RuntimeError(), when=lambda _: False)
    repeated = Session(request_, Listener(warn=warnings.append)).run(resume=True)
    assert asked[:2] == [3, 7]
    assert "2 failed trials" in warnings[0]
    assert [trial.sub for trial in repeated.trials] == [trial.sub for trial in failed.trials]
    assert all(trial.status is Status.complete for trial in trials_of(request_))


def test_five_failures_in_a_row_end_the_search(request_, monkeypatch):
    failing(monkeypatch, torch.OutOfMemoryError("no"), when=lambda job: job.number >= 6)
    with pytest.raises(ConfigError, match="5 sub-networks in a row could not be evaluated"):
        Session(request_).run(resume=False)
    assert len(trials_of(request_)) == 11


def test_a_search_in_which_everything_fails_says_why(request_, checkpoint_dir):
    spoil_last_layer(checkpoint_dir)
    space = load_space({"n_embd": {"min": 24, "step": 4}}, request_.checkpoint.config)
    with pytest.raises(ConfigError, match="could not be evaluated .*: val_loss is nan"):
        Session(replace(request_, space=space)).run(resume=False)


def test_constraints_hold_for_every_trial(request_):
    limits = read_constraints("num_params <= 100000")
    outcome = Session(replace(request_, constraints=limits)).run(resume=False)
    assert len(outcome.trials) == 16
    assert max(trial.metrics["num_params"] for trial in outcome.trials) <= 100000


def test_the_grid_of_the_training_comes_first(request_):
    members = [
        {"n_embd": 32, "n_head": 8, "n_query_groups": 4, "head_size": 8, "n_layer": 2,
         "intermediate_size": 48},
        {"n_embd": 33, "n_head": 8, "n_query_groups": 4, "head_size": 8, "n_layer": 2,
         "intermediate_size": 48},
    ]  # fmt: skip
    (request_.checkpoint.path / "grid.yaml").write_text(json.dumps(members))
    first = request_.first()
    assert first[:2] == [request_.space.largest, request_.space.smallest]
    assert [sub.n_embd for sub in first[-1:]] == [32]  # the other one is not in the space
    without = replace(request_, start_from_grid=False).first()
    assert without == first[:-1]
    # Between them: what only lacks layers.
    whole = request_.space.largest
    assert [sub.n_layer for sub in without[2:]] == list(range(whole.n_layer - 1, 0, -1))
    assert all(set(sub.shapes) == set(whole.shapes) for sub in without[2:])


def test_halving_saves_blocks_and_keeps_the_front(request_):
    halved = replace(request_, search_blocks=6, halving=HalvingOptions(first_blocks=1, keep=0.2))
    outcome = Session(halved).run(resume=False)
    stopped = [trial for trial in outcome.trials if trial.status is Status.stopped]
    assert stopped
    assert all(trial.blocks == 1 and "val_loss" not in trial.metrics for trial in stopped)
    complete = [trial for trial in outcome.trials if trial.status is Status.complete]
    assert all(trial.blocks == 6 for trial in complete)
    assert {e.subnetwork for e in outcome.front.entries} <= {trial.sub for trial in complete}


@pytest.mark.slow
def test_latency_is_looked_up_and_the_front_timed_whole(request_, tmp_path):
    space = load_space({"n_embd": [24, 48], "n_layer": [1, 3]}, request_.checkpoint.config)
    request = replace(
        request_,
        space=space,
        objectives=("val_loss", "latency_ms"),
        costs=CostOptions(batch=1, tokens=16, latency_table=tmp_path / "table.json", calibrate=4),
        num_trials=4,
    )
    outcome = Session(request).run(resume=False)
    times = json.loads((tmp_path / "table.json").read_text())["times"]["prefill"]
    assert len([key for key in times if key.startswith("block 24 ")]) == 1
    by_sub = {trial.sub: trial.metrics["latency_ms"] for trial in outcome.trials}
    for entry in outcome.front.entries:
        assert entry.metrics["latency_ms"] != by_sub[entry.subnetwork]
    assert outcome.front.how_measured["latency_ms of the latency table"]["networks"] == 4


@pytest.mark.slow
def test_whole_networks_are_timed_while_no_other_model_is_in_memory(request_, monkeypatch):
    models, when = [], []

    def alone(make, what):
        def made(*args, **options):
            assert {one() for one in models} <= {None}
            found = make(*args, **options)
            models.append(weakref.ref(getattr(found, "model", found)))
            when.append(what)
            return found

        return made

    monkeypatch.setattr(latency_parts, "assemble", alone(latency_parts.assemble, "timed"))
    monkeypatch.setattr(evaluation, "load_supernet", alone(load_supernet, "loaded"))
    request = replace(
        request_,
        space=load_space({"n_embd": [24, 48], "n_layer": [1, 3]}, request_.checkpoint.config),
        objectives=("val_loss", "latency_ms"),
        costs=CostOptions(batch=1, tokens=16, calibrate=4),
        num_trials=3,
    )
    gc.collect()
    gc.disable()
    try:
        outcome = Session(request).run(resume=False)
    finally:
        gc.enable()
    before, after = when.index("loaded"), when[::-1].index("loaded")
    assert when.count("loaded") == 1
    assert 2 <= before <= 4
    timed, left = divmod(after, TURNS)
    assert left == 0
    # some may leave the front when they are timed
    assert timed >= len({*(e.subnetwork for e in outcome.front.entries), request.space.largest})
    assert outcome.front.whole["metrics"]["latency_ms"] > 0
    assert outcome.front.whole["metrics"]["val_loss"] > 0


@pytest.mark.slow
def test_a_latency_table_that_ranks_badly_is_told(request_, tmp_path):
    table, told = tmp_path / "table.json", []
    request = replace(
        request_,
        space=load_space({"n_embd": [24, 48], "n_layer": [1, 3]}, request_.checkpoint.config),
        objectives=("val_loss", "latency_ms"),
        costs=CostOptions(batch=1, tokens=16, latency_table=table, calibrate=4),
        num_trials=2,
    )
    Session(request).run(resume=False)
    for ranks in (0.95, 0.32):
        content = json.loads(table.read_text())
        content["corrections"]["prefill"]["rank_correlation"] = ranks
        table.write_text(json.dumps(content))
        again = replace(request, out_dir=tmp_path / str(ranks))
        again.out_dir.mkdir()
        Session(again, Listener(warn=told.append)).run(resume=False)
    assert len(told) == 1
    assert f"{table} rank whole networks at 0.32" in told[0]


@pytest.mark.slow
def test_the_best_of_a_budget_are_ranked_again_after_a_training(request_, bundled):
    data = TextData(files=bundled / "train.jsonl", block_size=32, num_blocks=24)
    recovery = RecoveryOptions(
        budget="num_params <= 110000", candidates=3, steps=12, lr=2e-2, data=data
    )
    config = request_.checkpoint.config
    training = load_blocks(data, request_.checkpoint.path, config=config).tokens
    request = replace(request_, recovery=recovery, training=training, num_trials=12)
    whole, before_it = SubNetwork.from_config(config), {id(one) for one in supernets()}
    in_memory = []

    def on_step(what, _left):
        if what.startswith("recovery") and not in_memory:
            gc.collect()
            in_memory.extend(one for one in supernets() if id(one) not in before_it)
            in_memory[:] = [one.full for one in in_memory]

    outcome = Session(request, Listener(on_step=on_step)).run(resume=False)
    assert in_memory.count(whole) == 1  # the teacher; the trials' own model is gone
    assert len(in_memory) == 2
    found = read_front(request.out_dir / "recovery.json", range(3)).entries
    assert len(found) == 3
    assert sorted(entry.metrics["rank_before"] for entry in found) == [1, 2, 3]
    after = [entry.metrics["recovered_val_loss"] for entry in found]
    assert after == sorted(after)
    supernet = load_supernet(request.checkpoint.path)
    for entry in found:
        before = nats_per_token(supernet.standalone(entry.subnetwork), request.tokens)
        assert entry.metrics["val_loss"] == pytest.approx(before, rel=1e-5)
        assert entry.metrics["recovered_val_loss"] < before
        assert entry.metrics["num_params"] <= 110000
    # Nobody inherits from who was trained before.
    alone = Recovery(
        recovery, request.checkpoint, supernet, from_blocks(training), from_blocks(request.tokens),
        request.device, request.seed,
    )  # fmt: skip
    last = found[-1]
    assert alone.losses_of(last.subnetwork)[1] == pytest.approx(after[-1], rel=1e-5)
    assert len(outcome.trials) == 12


def supernets() -> list[SuperNetwork]:
    """Those that are in memory."""
    return [found for found in gc.get_objects() if type(found) is SuperNetwork]


@pytest.mark.slow
def test_killed_for_real(request_, bundled, tmp_path):
    line = [
        "search", "--checkpoint_dir", str(request_.checkpoint.path),
        "--data.files", str(bundled / "valid.jsonl"), "--data.block_size", "64",
        "--data.num_blocks", "64", "--search_blocks", "64",
        "--num_trials", "20",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert nas(*line, "--out_dir", whole) == 0
    command = [sys.executable, "-m", "whittle_nas", *line, "--out_dir", str(killed)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (killed / "trials.csv").is_file() or len(rows(killed)) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(rows(killed)) < len(rows(whole))
    assert nas(*line, "--out_dir", killed, "--resume", "true") == 0
    assert rows(killed) == rows(whole)


def rows(out_dir):
    """Lines without the time that the evaluation took."""
    lines = (out_dir / "trials.csv").read_text().splitlines()
    return [",".join(line.split(",")[:-2]) for line in lines]
