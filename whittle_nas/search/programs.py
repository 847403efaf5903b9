"""The integer programs of `--method ilp`: a library of candidates under the limits of a search.

A program adds up what each candidate costs, alone or around a network, and its solutions are
checked against the costs of the real network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from whittle_nas.candidates.costs import changes
from whittle_nas.candidates.library import Candidate, Solution
from whittle_nas.candidates.parts import form_of, is_nothing
from whittle_nas.errors import ConfigError
from whittle_nas.export.checkpoint import plan_export
from whittle_nas.export.deci import parse_engines
from whittle_nas.search.costs import Costs
from whittle_nas.search.ilp import Program, nearest, solve
from whittle_nas.search.objectives import is_cost
from whittle_nas.search.request import Request
from whittle_nas.space.front import Constraint
from whittle_nas.space.subnetwork import SubNetwork

QUALITY = "val_loss"
_TIGHTENED = 5  # times that a budget is lowered because real costs are not quite sums

Losses = Mapping[tuple[int, int], float]  # (number of a part, candidate) -> loss of the network


class Programs:
    """The programs of a search: one library, one set of limits for each budget.

    Attributes:
        request: the search.
        library: its candidates.
        limits: of each program, by the name of its budget.
        costs: of networks.
    """

    def __init__(self, request: Request, costs: Costs) -> None:
        """Check that there is something to choose.

        Args:
            request: the search.
            costs: of networks.

        Raises:
            ConfigError: without a library or a limit, and for limits that nothing keeps.
        """
        assert request.library is not None
        self.request, self.library, self.costs = request, request.library, costs
        request.programs.check()
        if QUALITY not in request.quality_metrics:
            raise ConfigError(
                "--method ilp adds up losses: put val_loss or perplexity first in --objectives"
            )
        self.limits = self._limits()
        self._engines = parse_engines(request.programs.targets)
        self._allowed = self._held()
        score = request.programs.score.value
        self._scores = [
            [getattr(one, score) if j in allowed else math.inf for j, one in enumerate(choices)]
            for choices, allowed in zip(self.library.candidates, self._allowed, strict=True)
        ]
        self._costs: dict[str, list[list[float]]] = {}
        self._whole: dict[str, float] = {}
        for limits in self.limits.values():  # by estimates: nothing is timed before the search
            program = self.program(limits, cost=costs.estimate)
            if solve(program) is None:
                raise ConfigError(f"--constraints: {nearest(program)}")
        self._costs.clear()

    def renew(self, request: Request) -> None:
        """Take the limits of a request again, because times are corrected by now.

        Args:
            request: the same search.
        """
        self.request = request
        self.limits = self._limits()
        self._costs.clear()

    def _held(self) -> list[set[int]]:
        """The candidates of every part that all engines run, each beside the whole model.

        Raises:
            ConfigError: if there is none but the originals.
        """
        counts = [range(len(choices)) for choices in self.library.candidates]
        if not self._engines:
            return [set(count) for count in counts]
        original, refusal = self.library.original, None
        found = [{0} for _ in counts]
        for at, count in enumerate(counts):
            for j in count[1:]:
                why = self._refusal((*original[:at], j, *original[at + 1 :]))
                if why is None:
                    found[at].add(j)
                refusal = refusal or why
        if refusal is not None and all(len(allowed) == 1 for allowed in found):
            raise ConfigError(
                f"--targets {self.request.programs.targets}: no candidate of {self.library.path} "
                f"but the originals is left: {refusal}"
            )
        return found

    def _refusal(self, solution: Solution) -> ConfigError | None:
        """Why an engine can't run a network, None if all can."""
        if not self._engines:
            return None
        sub = self.library.subnetwork(solution)
        try:
            plan_export(self.request.checkpoint, sub, to_hf=True, targets=self._engines)
        except ConfigError as error:
            return error
        return None

    def _limits(self) -> dict[str, tuple[Constraint, ...]]:
        request, full = self.request, SubNetwork.from_config(self.request.checkpoint.config)
        found = {}
        for name, asked in request.programs.limits() or [("", ())]:
            whole = {
                limit.metric: self.costs.value(full, limit.metric)
                for limit in asked
                if limit.of_whole and is_cost(limit.metric)
            }
            limits = (limit.resolved(whole, "--budgets") for limit in asked)
            found[name] = (*request.constraints, *limits)
        for limit in {limit for limits in found.values() for limit in limits}:
            if is_cost(limit.metric) and limit.relation[0] == ">":
                raise ConfigError(f"--constraints {limit}: --method ilp takes upper limits only")
        if not all(any(is_cost(limit.metric) for limit in limits) for limits in found.values()):
            raise ConfigError(
                '--method ilp needs a budget: give --constraints "num_params <= 80%", or --budgets'
            )
        return found

    def program(
        self,
        limits: Sequence[Constraint],
        *,
        scores: Sequence[Sequence[float]] | None = None,
        cost: Callable[[SubNetwork, str], float] | None = None,
    ) -> Program:
        """The program under some limits.

        Args:
            limits: those on quality are left to the front, which knows it.
            scores: in place of the library's.
            cost: in place of the exact one, which may measure times.
        """
        cost = cost or self.costs.value
        budgets: dict[str, float] = {}
        for limit in limits:
            name = limit.metric
            if not is_cost(name):
                continue
            budgets[name] = min(limit.limit, budgets.get(name, math.inf))
            if name not in self._costs:
                one = partial(_swapped, cost, name)
                self._costs[name] = changes(self.library, one)
                self._whole[name] = one(self.library.subnetwork(self.library.original))
        costs = {name: self._costs[name] for name in budgets}
        never = self._no_layers()
        return Program(scores or self._scores, costs, budgets, dict(self._whole), never)

    def _no_layers(self) -> tuple[Solution, ...]:
        """The solution that leaves every part out, which is no network, if there is one."""
        listed = [[one.sizes for one in choices] for choices in self.library.candidates]
        empty = [[is_nothing(sizes) for sizes in choices] for choices in listed]
        if not all(any(choices) for choices in empty):
            return ()
        return (tuple(choices.index(True) for choices in empty),)

    def solve(
        self,
        program: Program,
        limits: Sequence[Constraint],
        find: Callable[[Program], list[Solution]],
    ) -> list[Solution]:
        """Solutions whose real costs keep the limits, best first.

        A time is not quite the sum of what each part changes: a budget that is not kept is asked
        for again, lower by what it was missed by. What keeps the limits counts wherever it came up.

        Args:
            program: of `program`.
            limits: the same ones.
            find: gives solutions of a program.

        Raises:
            ConfigError: what `find` says of the program itself.
        """
        kept: dict[Solution, None] = {}
        asked = program
        for turn in range(_TIGHTENED):
            try:
                found = find(asked)
            except ConfigError:
                if turn == 0:
                    raise
                break  # nobody gave the lower budget
            kept |= dict.fromkeys(one for one in found if not self._missed([one], limits))
            missed = self._missed(found, limits)
            if not missed:
                break
            lower = {n: limit - missed.get(n, 0.0) for n, limit in asked.budgets.items()}
            asked = replace(asked, budgets=lower)
        return sorted((one for one in kept if self._refusal(one) is None), key=program.score)

    def _missed(self, found: Sequence[Solution], limits: Sequence[Constraint]) -> dict[str, float]:
        """By how much the worst solution breaks each limit, at least the last bit."""
        missed: dict[str, float] = {}
        for limit in limits:
            if not is_cost(limit.metric):
                continue
            values = [self.costs.value(self.library.subnetwork(one), limit.metric) for one in found]
            over = max((limit.excess(value) for value in values), default=0.0)
            if over:
                least = 1e-9 * abs(limit.limit)
                missed[limit.metric] = max(over, least, missed.get(limit.metric, 0.0))
        return missed

    def neighbours(self, solution: Solution) -> dict[int, tuple[int, ...]]:
        """The next larger and the next smaller candidate of every part, and forms up to there."""
        pairs = zip(solution, self.library.candidates, self._allowed, strict=True)
        found = {}
        for at, (chosen, choices, allowed) in enumerate(pairs):
            larger = [j for j in range(chosen - 1, -1, -1) if j in allowed]
            smaller = [j for j in range(chosen + 1, len(choices)) if j in allowed]
            found[at] = (*_until_plain(choices, larger), *_until_plain(choices, smaller))
        return found

    def scores_around(self, solution: Solution, base: float, losses: Losses) -> list[list[float]]:
        """What each neighbouring candidate changes; the others may not be chosen."""
        scores = [[math.inf] * len(choices) for choices in self.library.candidates]
        for at, chosen in enumerate(solution):
            scores[at][chosen] = 0.0
        for (at, j), loss in losses.items():
            scores[at][j] = loss - base
        return scores


def _until_plain(choices: Sequence[Candidate], numbers: Iterable[int]) -> list[int]:
    """The first candidate without a form, and those that are passed on the way to it."""
    found = []
    for j in numbers:
        found.append(j)
        if not form_of(choices[j].sizes):
            break
    return found


def _swapped(cost: Callable[[SubNetwork, str], float], name: str, sub: SubNetwork) -> float:
    return cost(sub, name)
