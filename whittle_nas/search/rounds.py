"""`--method ilp`: networks from a library of candidates by integer programs, measured one by one.

A program adds up what each candidate costs alone, beside the whole model. Far from it, at 80 % of
the parameters and below, that is the wrong place to look from: a round measures the neighbouring
candidates around the best network so far, and solves again with a bound on the changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from whittle_nas.candidates.library import Solution
from whittle_nas.candidates.scoring import losses_around
from whittle_nas.errors import ConfigError
from whittle_nas.reading import read_json
from whittle_nas.search.evaluation import Job
from whittle_nas.search.ilp import Program, apart, solve, solve_many
from whittle_nas.search.options import Score
from whittle_nas.search.programs import QUALITY, Losses, Programs
from whittle_nas.search.trials import Status, Trial
from whittle_nas.search.workers import InlinePool, Pool
from whittle_nas.space.front import Constraint
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.checkpoint import load_supernet
from whittle_nas.weights.files import atomic_write_text

FILE_NAME = "ilp.json"


class ProgramSearch:
    """A search by integer programs, with the interface of `loop.Search`.

    Attributes:
        recorded: trials of an interrupted run by number.
    """

    def __init__(
        self,
        programs: Programs,
        pool: Pool,
        on_trial: Callable[[Trial], None],
        on_step: Callable[[int], None],
    ) -> None:
        """Prepare.

        Args:
            programs: what is solved.
            pool: evaluates.
            on_trial: called with each new trial as it ends.
            on_step: called while candidates are measured, with how many layers are left.
        """
        self.recorded: Mapping[int, Trial] = {}
        self.programs, self.options = programs, programs.request.programs
        self._pool, self._on_trial, self._on_step = pool, on_trial, on_step
        self._path = programs.request.out_dir / FILE_NAME
        self._supernet: Any = None

    def run(self) -> list[Trial]:
        """Solve, measure, and go round.

        Returns:
            All trials, by number.

        Raises:
            ConfigError: if the budgets leave nothing.
        """
        self._known = {trial.sub: trial for trial in self.recorded.values()}
        self._trials: dict[SubNetwork, Trial] = {}
        self._kept: dict[str, Any] = read_json(self._path) if self._path.is_file() else {}
        report = [self._under(name, limits) for name, limits in self.programs.limits.items()]
        self._write(report)
        return sorted(self._trials.values(), key=lambda trial: trial.number)

    def _under(self, name: str, limits: Sequence[Constraint]) -> dict[str, Any]:
        """All that is found under one budget; what `ilp.json` says about it."""
        programs, options = self.programs, self.options
        program = programs.program(limits)

        def many(asked: Program) -> list[Solution]:
            return solve_many(asked, options.num_solutions, max_overlap=options.overlap)

        found = programs.solve(program, limits, many)
        found = apart(found, options.num_solutions, max_overlap=options.overlap)
        if not found:
            raise ConfigError(f"--constraints {', '.join(map(str, limits))}: nothing keeps them")
        trials = self._measure(found)
        # A sum of errors of outputs is no loss.
        whole = self._loss_of_whole() if options.score is Score.loss else None
        solutions = [
            {
                "subnetwork": trial.sub.to_dict(),
                "predicted": None if whole is None else whole + program.score(one),
                **_loss(trial),
            }
            for one, trial in zip(found, trials, strict=True)
        ]
        rounds: list[dict[str, Any]] = []
        best = _best(trials)
        while best is not None and len(rounds) < options.rounds:
            best, record = self._round(best, limits)
            rounds.append(record)
            if record["gain"] <= 0:
                break
        named = {"budget": name, "limits": list(map(str, limits)), "solutions": solutions}
        return {**named, "rounds": rounds}

    def _round(self, centre: Trial, limits: Sequence[Constraint]) -> tuple[Trial, dict[str, Any]]:
        """Measure around the best network, solve with few changes, measure; the best of all."""
        programs = self.programs
        solution = programs.library.solution(centre.sub)
        base, losses = self._around(centre.sub, programs.neighbours(solution))
        program = programs.program(limits, scores=programs.scores_around(solution, base, losses))
        steps: dict[Solution, dict[str, Any]] = {}
        for most in self.options.changes:

            def near(asked: Program, most: int = most) -> list[Solution]:
                one = solve(asked, near=solution, max_changes=most)
                return [] if one is None else [one]

            for one in programs.solve(program, limits, near):
                steps.setdefault(one, {"changes": most, "predicted": base + program.score(one)})
        trials = self._measure(list(steps))
        for trial, step in zip(trials, steps.values(), strict=True):
            step |= _loss(trial)
        best = _best([centre, *trials])
        assert best is not None
        before, after = centre.metrics[QUALITY], best.metrics[QUALITY]
        record = {"before": before, "after": after, "gain": before - after}
        return best, {**record, "evaluated": len(losses), "steps": list(steps.values())}

    def _measure(self, solutions: Sequence[Solution]) -> list[Trial]:
        """Evaluate networks, those that are not known yet, and wait for all."""
        subs = [self.programs.library.subnetwork(one) for one in solutions]
        waiting: dict[int, tuple[SubNetwork, Mapping[str, float]]] = {}
        for sub in dict.fromkeys(subs):
            if sub in self._trials:
                continue
            if sub in self._known:
                self._trials[sub] = self._known[sub]
                continue
            number = max((t.number for t in self._everything()), default=-1) + 1 + len(waiting)
            waiting[number] = sub, self.programs.costs.of(sub)
        for number, (sub, _) in waiting.items():
            self._pool.submit(Job(number, sub))
        for _ in range(len(waiting)):
            number, found = self._pool.next()
            sub, costs = waiting[number]
            metrics = {**found.metrics, **costs}
            trial = Trial(
                number, sub, found.status, metrics, found.blocks, found.seconds, found.note
            )
            self._trials[sub] = trial
            self._on_trial(trial)
        return [self._trials[sub] for sub in subs]

    def _everything(self) -> list[Trial]:
        return [*self._known.values(), *self._trials.values()]

    def _loss_of_whole(self) -> float:
        whole = self.programs.library.original
        return self._around(self.programs.library.subnetwork(whole), {})[0]

    def _measured(
        self, sub: SubNetwork, alternatives: Mapping[int, Sequence[int]]
    ) -> tuple[float, Losses]:
        """The loss of a network on the blocks of a trial, and with each alternative in it."""
        request, library = self.programs.request, self.programs.library
        sizes = {
            library.parts[at]: [library.candidates[at][j].sizes for j in chosen]
            for at, chosen in alternatives.items()
        }
        base, losses = losses_around(
            self._whole(),
            sub,
            sizes,
            request.tokens[: request.search_blocks],
            patch_of=library.block_patch,
            batch_size=request.batch_size or 4,
            on_layer=self._on_step,
        )
        return base, {
            (at, j): losses[library.parts[at], library.candidates[at][j].sizes]
            for at, chosen in alternatives.items()
            for j in chosen
        }

    def _whole(self) -> Any:
        """The super-network: that of a pool in this process, else one of its own."""
        if isinstance(self._pool, InlinePool):
            return self._pool.supernet
        if self._supernet is None:
            request = self.programs.request
            self._supernet = load_supernet(
                request.checkpoint.path, device=request.placed_on, dtype=request.dtype
            )
        return self._supernet

    def _around(
        self, sub: SubNetwork, alternatives: Mapping[int, Sequence[int]]
    ) -> tuple[float, Losses]:
        """As `_measured`; what was measured once is kept for an interrupted search to go on."""
        key = json.dumps([sub.to_dict(), {str(at): list(js) for at, js in alternatives.items()}])
        measured = self._kept.setdefault("measured", {})
        if key not in measured:
            base, losses = self._measured(sub, alternatives)
            rows = [[at, j, loss] for (at, j), loss in losses.items()]
            measured[key] = {"loss": base, "losses": rows}
            self._write(self._kept.get("programs", []))
        known = measured[key]
        return known["loss"], {(at, j): loss for at, j, loss in known["losses"]}

    def _write(self, report: Sequence[Mapping[str, Any]]) -> None:
        self._kept["programs"] = list(report)
        atomic_write_text(self._path, json.dumps(self._kept, indent=1) + "\n")


def read_report(path: Path) -> list[dict[str, Any]]:
    """What `ilp.json` says about every budget.

    Raises:
        ConfigError: if it can't be read.
    """
    return read_json(path)["programs"]


def _loss(trial: Trial) -> dict[str, float | None]:
    return {"measured": trial.metrics.get(QUALITY)}


def _best(trials: Sequence[Trial]) -> Trial | None:
    fine = [trial for trial in trials if trial.status is Status.complete]
    return min(fine, key=lambda trial: (trial.metrics[QUALITY], trial.number), default=None)
