"""Programs over small libraries whose networks are never run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from whittle_nas.candidates.library import Candidate, Library
from whittle_nas.candidates.parts import KINDS, MLP, Part, sizes_of
from whittle_nas.errors import ConfigError
from whittle_nas.metrics.latency_table import LatencyTable
from whittle_nas.search.constraints import read_constraints
from whittle_nas.search.evaluation import Evaluation
from whittle_nas.search.finish import Finish, Listener
from whittle_nas.search.ilp import solve, solve_many
from whittle_nas.search.options import CostOptions, Method, ProgramOptions, Score
from whittle_nas.search.programs import Programs
from whittle_nas.search.request import Request
from whittle_nas.search.rounds import ProgramSearch, read_report
from whittle_nas.search.session import Session
from whittle_nas.search.trials import Status, Trial
from whittle_nas.space import SubNetwork, load_space
from whittle_nas.weights.checkpoint import open_checkpoint

LOSSES = (0.1, 0.2, 0.3)


def library_of(checkpoint, *, kinds=KINDS, losses=LOSSES) -> Library:
    """Every part as it is, or left out if it is of these kinds."""
    full = SubNetwork.from_config(checkpoint.config)
    parts = tuple(Part(layer, kind) for layer in range(len(full.blocks)) for kind in KINDS)
    choices = []
    for part in parts:
        own = sizes_of(full.blocks[part.layer], part.kind)
        nothing = Candidate((0,) * len(own), loss=losses[part.layer], error=losses[part.layer])
        choices.append((Candidate(own), *([nothing] if part.kind in kinds else [])))
    return Library(Path("library"), "", "", full.n_embd, parts, tuple(choices))


@pytest.fixture
def request_(checkpoint_dir, tmp_path) -> Request:
    checkpoint = open_checkpoint(checkpoint_dir)
    return Request(
        checkpoint=checkpoint,
        out_dir=tmp_path,
        space=load_space({"n_embd": [24, 48], "n_layer": [1, 3]}, checkpoint.config),
        objectives=("val_loss", "num_params"),
        constraints=read_constraints("num_params <= 80%"),
        tokens=torch.zeros(2, 9, dtype=torch.long),
        method=Method.ilp,
        num_trials=4,
        seed=1,
        search_blocks=2,
        library=library_of(checkpoint),
    )


class Times:
    """Milliseconds that are not sums: 10, one less for each MLP that is gone, with exceptions."""

    def __init__(self, exceptions):
        self._exceptions = exceptions

    def value(self, sub, name):
        assert name == "latency_ms"
        gone = tuple(int(block.intermediate_size == 0) for block in sub.blocks)
        return self._exceptions.get(gone, 10.0 - sum(gone))

    estimate = value


@pytest.mark.parametrize("kept", [[(1, 0, 1), (0, 1, 1)], []])
def test_solutions_that_keep_a_limit_survive_a_tightening_that_leaves_nothing(request_, kept):
    pairs = [(1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    times = Times({gone: 8.9 for gone in pairs if gone not in kept})
    limits = read_constraints("latency_ms <= 8")
    library = library_of(request_.checkpoint, kinds=(MLP,))
    programs = Programs(replace(request_, library=library, constraints=limits), times)
    program = programs.program(limits)
    found = programs.solve(program, limits, lambda one: solve_many(one, 3, max_overlap=0.9))
    assert found == [tuple(j for gone in one for j in (0, gone)) for one in kept]
    with pytest.raises(ConfigError, match=r"latency_ms <= 6; the smallest has 7"):
        Programs(
            replace(request_, library=library, constraints=read_constraints("latency_ms <= 6")),
            times,
        )


def test_a_network_without_layers_is_no_solution(request_):
    costs = request_.make_costs()
    library = library_of(request_.checkpoint, losses=(-1.0, -1.0, -1.0))
    request = replace(request_, library=library).resolved()
    solution = solve(Programs(request, costs).program(request.constraints))
    assert solution is not None
    assert sum(solution) == 5
    embedding = library.subnetwork((1, 1, 1, 1, 1, 0))
    least = costs.value(embedding, "num_params")
    tight = replace(request, constraints=read_constraints("num_params <= 7000"))
    assert least > 7000
    with pytest.raises(ConfigError, match="num_params <= 7000; the smallest has"):
        Programs(tight, costs)


class Losses:
    """Evaluates by counting."""

    def __init__(self):
        self._jobs = []

    def submit(self, job):
        self._jobs.append(job)

    def next(self):
        metrics = {"val_loss": 3.0, "perplexity": 20.0}
        return self._jobs.pop().number, Evaluation(Status.complete, metrics, 2, 0.1)


def test_a_sum_of_errors_is_not_told_as_a_loss(request_, tmp_path):
    options = ProgramOptions(num_solutions=2, rounds=0, score=Score.error)
    request = replace(request_, programs=options).resolved()
    programs = Programs(request, request.make_costs())
    trials = ProgramSearch(programs, Losses(), lambda _: None, lambda _: None).run()
    assert len(trials) == 2
    solutions = read_report(tmp_path / "ilp.json")[0]["solutions"]
    assert [one["predicted"] for one in solutions] == [None, None]
    assert [one["measured"] for one in solutions] == [3.0, 3.0]


def test_a_front_has_what_is_best_in_the_cost_that_a_budget_names(request_):
    budgets = (("small", "num_params <= 80%"), ("light", "flops <= 50%"))
    request = replace(request_, constraints=(), programs=ProgramOptions(budgets=budgets))
    library = request.library
    assert library is not None
    rows = [
        ((0, 0, 0, 0, 0, 0), 2.0, 100, 100),
        ((0, 1, 0, 0, 0, 0), 3.0, 80, 90),
        ((1, 0, 1, 0, 0, 0), 4.0, 85, 50),  # loses in both objectives
        ((1, 0, 0, 0, 0, 0), 4.0, 85, 95),
    ]
    trials = [
        Trial(
            number,
            library.subnetwork(solution),
            Status.complete,
            {"val_loss": loss, "num_params": size, "flops": flops},
            2,
            0.1,
        )
        for number, (solution, loss, size, flops) in enumerate(rows)
    ]
    session = Session(request)
    finish = Finish(session.request, session.costs, Listener())
    front = finish.write_front(finish.evaluate(Losses(), trials))
    assert front.objectives == ("val_loss", "num_params")
    found = [(entry.metrics["num_params"], entry.metrics["flops"]) for entry in front.entries]
    assert found == [(80, 90), (85, 50), (100, 100)]


def _thirty_times(self, sub, phase, **_):
    return 30 * sum(self.parts(sub, phase))


@pytest.mark.slow
def test_a_share_of_a_time_is_one_of_the_corrected_time(request_, tmp_path, monkeypatch):
    monkeypatch.setattr(LatencyTable, "whole", _thirty_times)
    limits = read_constraints("latency_ms <= 100%")
    costs = CostOptions(batch=1, tokens=16, latency_table=tmp_path / "table.json", calibrate=4)
    request = replace(request_, constraints=limits, costs=costs)
    for one in (replace(request, method=Method.random, library=None), request):
        session = Session(one)
        uncorrected = session.request.constraints[0].limit
        session._calibrate()
        full = SubNetwork.from_config(one.checkpoint.config)
        limit = session.request.constraints[0].limit
        assert limit == pytest.approx(session.costs.value(full, "latency_ms"))
        if session._programs is None:  # the second search finds a table with its correction
            assert limit > 15 * uncorrected  # a busy machine moves times by some
        else:
            assert session._programs.limits[""][0].limit == limit
