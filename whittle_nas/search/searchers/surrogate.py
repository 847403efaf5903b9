"""The default: model the loss, know the costs, propose where the front would grow most."""

from __future__ import annotations

from typing import Any

import numpy as np
from syne_tune.optimizer.schedulers.searchers.utils.hp_ranges_factory import (
    make_hyperparameter_ranges,
)

from whittle_nas.search.pareto import is_on_front
from whittle_nas.search.searchers.base import Problem, SpaceSearcher
from whittle_nas.search.searchers.gaussian_process import Posterior, fit_kernel
from whittle_nas.search.searchers.growth import expected_growth
from whittle_nas.space.subnetwork import SubNetwork

_START = 10  # results before the first model; random members until then
_REFIT = 20  # the hyperparameters are fitted anew when there are a 20th more results
_DATA = 300  # results that the model sees: the front and the newest
_LISTED = 4000  # a space up to this size is looked at as a whole
_RANDOM = 1000  # random candidates otherwise
_NEAR = 1000  # candidates near the front


class SurrogateSearcher(SpaceSearcher):
    """Gaussian processes for what must be measured, exact functions for what follows from sizes.

    The next proposal is the candidate with the highest expected growth of the front's hypervolume.
    Proposals that still run count as if they had come out as predicted.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._ranges: Any = make_hyperparameter_ranges(self.config_space)
        self._modelled = [i for i, n in enumerate(problem.objectives) if n not in problem.costs]
        self._subs: list[SubNetwork] = []
        self._values: list[np.ndarray] = []
        self._pending: dict[SubNetwork, None] = {}
        self._kernels: tuple[int, list[Any]] = (0, [])
        self._codes: dict[SubNetwork, np.ndarray] = {}

    def accept(self, sub: SubNetwork) -> None:
        """Take a proposal: it runs now."""
        super().accept(sub)
        self._pending[sub] = None

    def observe(self, sub: SubNetwork, values: np.ndarray) -> None:
        """Keep the result for the model."""
        self._pending.pop(sub, None)
        self._subs.append(sub)
        self._values.append(values)

    def fail(self, sub: SubNetwork) -> None:
        """Forget it."""
        self._pending.pop(sub, None)

    def propose(self) -> SubNetwork:
        """The candidate that promises most."""
        if len(self._subs) < _START or not self._modelled:
            return self.space.sample(self.rng)
        kept = self._kept(len(self._subs))
        subs, values = [self._subs[i] for i in kept], np.array(self._values)[kept]
        candidates = self._candidates(subs, values)
        if not candidates:
            return self.space.sample(self.rng)
        models = self._models(subs, values)
        mean, deviation = self._predict(candidates, models)
        running = self._predict(list(self._pending), models)[0]
        seen = np.vstack([values, running])
        growth = expected_growth(mean, deviation, seen, seed=self.rng.getrandbits(32))
        return candidates[int(np.argmax(growth))]

    def _kept(self, count: int) -> list[int]:
        """Which of the first `count` results the model sees."""
        if count <= _DATA:
            return list(range(count))
        front = np.flatnonzero(is_on_front(np.array(self._values[:count])))[-_DATA // 2 :]
        newest = [i for i in range(count) if i not in set(front)][len(front) - _DATA :]
        return sorted([*front.tolist(), *newest])

    def _models(self, subs: list[SubNetwork], values: np.ndarray) -> list[Posterior]:
        """One process per modelled objective, with running proposals at their predictions."""
        x = self._encode(subs)
        kernels = self._fitted_kernels()
        columns = values[:, self._modelled].T
        models = [Posterior(k, x, y) for k, y in zip(kernels, columns, strict=True)]
        if not self._pending:
            return models
        running = self._encode(list(self._pending))
        return [
            Posterior(kernel, np.vstack([x, running]), np.append(y, model.predict(running)[0]))
            for kernel, y, model in zip(kernels, columns, models, strict=True)
        ]

    def _fitted_kernels(self) -> list[Any]:
        """Hyperparameters, from the first results up to a count that depends on the present one."""
        step = max(1, len(self._subs) // _REFIT)
        count = len(self._subs) // step * step
        if self._kernels[0] != count:
            kept = self._kept(count)
            x = self._encode([self._subs[i] for i in kept])
            values = np.array(self._values)[kept]
            self._kernels = count, [fit_kernel(x, values[:, i]) for i in self._modelled]
        return self._kernels[1]

    def _predict(
        self, subs: list[SubNetwork], models: list[Posterior]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Means and deviations of all objectives, each (N, M); costs have no deviation."""
        mean = np.zeros((len(subs), len(self.problem.objectives)))
        deviation = np.zeros_like(mean)
        if not subs:
            return mean, deviation
        x = self._encode(subs)
        for at, model in zip(self._modelled, models, strict=True):
            mean[:, at], deviation[:, at] = model.predict(x)
        for at, name in enumerate(self.problem.objectives):
            if at not in self._modelled:
                mean[:, at] = [self.problem.costs[name](sub) for sub in subs]
        return mean, deviation

    def _candidates(self, subs: list[SubNetwork], values: np.ndarray) -> list[SubNetwork]:
        """What is compared: all of a small space, else random members and those near the front."""
        if self.space.num_members() <= _LISTED:
            return [sub for sub in self.space.members() if self.is_new(sub)]
        front = [sub for sub, best in zip(subs, is_on_front(values), strict=True) if best]
        found = [self.space.sample(self.rng) for _ in range(_RANDOM)]
        for _ in range(_NEAR):
            near = self.mutated(self.rng.choice(front))
            found.append(self.mutated(near) if self.rng.random() < 0.5 else near)
        return [sub for sub in dict.fromkeys(found) if self.is_new(sub)]

    def _encode(self, subs: list[SubNetwork]) -> np.ndarray:
        """Points in the unit cube, (N, d)."""
        for sub in subs:
            if sub not in self._codes:
                self._codes[sub] = self._ranges.to_ndarray(self.space.genes(sub))
        return np.array([self._codes[sub] for sub in subs])
