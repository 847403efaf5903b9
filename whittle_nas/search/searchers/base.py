"""What every search method shares: a Syne Tune searcher over the members of a search space."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from syne_tune.config_space import lograndint, ordinal, randint
from syne_tune.optimizer.schedulers.searchers.searcher import BaseSearcher

from whittle_nas.space.searchspace import SearchSpace
from whittle_nas.space.subnetwork import SubNetwork

Cost = Callable[[SubNetwork], float]
_DRAWS = 200  # ideas that may be repetitions or break a constraint before we help
_LISTED = 200_000  # members of a space that may be listed to find the last ones


def _by_layers(sub: SubNetwork) -> float:
    return sub.n_layer


def _no_excess(_sub: SubNetwork) -> float:
    return 0.0


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        space: the sub-networks.
        objectives: names, all minimised.
        costs: cheap functions of those objectives that follow from the sizes; the others are learnt
            from trials.
        first: proposed before anything else, in this order.
        size: a cost of any kind, by which sub-networks can be told apart.
        likely_excess: how far a sub-network seems to break the constraints, 0 if it keeps them;
            cheap.
        excess: how far it does break them; may take a measurement.
    """

    space: SearchSpace
    objectives: tuple[str, ...]
    costs: Mapping[str, Cost] = field(default_factory=dict)
    first: Sequence[SubNetwork] = ()
    size: Cost = _by_layers
    likely_excess: Cost = _no_excess
    excess: Cost = _no_excess


class SpaceSearcher(BaseSearcher):
    """Base of all methods.

    Contract: `suggest` gives members of the space that keep the constraints, none twice, the first
    ones first, and None when there are none left. Results may arrive late and in any order.

    A proposal depends on the seed, its number, earlier proposals and the results that were told,
    and on nothing else. So an interrupted search goes on by telling its results again, nothing has
    to be proposed a second time, and what other code draws from global generators (as Syne Tune's
    own searchers do, whatever their `random_seed`) makes no difference.

    Attributes:
        rng: random generator of the present proposal.
        proposals: all proposals by number, which is the trial id.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        """Start a search.

        Args:
            problem: what is searched.
            seed: of every random choice.
        """
        super().__init__(config_space(problem.space), random_seed=seed % 2**32)
        self.problem = problem
        self.space = problem.space
        self.rng = random.Random(seed)
        self.proposals: list[SubNetwork] = []
        self._proposed: set[SubNetwork] = set()
        self._rejected: set[SubNetwork] = set()
        self._first = list(dict.fromkeys(problem.first))

    @abstractmethod
    def propose(self) -> SubNetwork:
        """The next idea; it may repeat an earlier one or break a constraint."""

    def observe(self, sub: SubNetwork, values: np.ndarray) -> None:
        """Take a result, (M,) objectives, all finite."""

    def fail(self, sub: SubNetwork) -> None:
        """Take note that there will be no result."""

    def suggest(self, **_: Any) -> dict[str, Any] | None:
        """Syne Tune's entry: one value per dimension, or None when the space is exhausted."""
        self.rng = random.Random(f"{type(self).__name__}/{self.random_seed}/{len(self.proposals)}")
        sub = self._next()
        if sub is None:
            return None
        self.accept(sub)
        return self.space.genes(sub)

    def accept(self, sub: SubNetwork) -> None:
        """Take a sub-network as the next proposal: that of an interrupted run, for instance."""
        self.proposals.append(sub)
        self._proposed.add(sub)

    def on_trial_complete(
        self,
        trial_id: int,
        config: dict[str, Any],  # noqa: ARG002 - Syne Tune's signature
        metrics: list[float],
    ) -> None:
        """Syne Tune's entry for results."""
        self.observe(self.proposals[trial_id], np.asarray(metrics, dtype=float))

    def on_trial_error(self, trial_id: int) -> None:
        """Syne Tune's entry for failures."""
        self.fail(self.proposals[trial_id])

    def is_new(self, sub: SubNetwork) -> bool:
        """Whether a sub-network may be proposed, as far as that is known without measuring."""
        known = sub in self._proposed or sub in self._rejected
        return not known and self.problem.likely_excess(sub) == 0

    def mutated(self, sub: SubNetwork) -> SubNetwork:
        """A member with another value in one dimension, near ones more often than far ones."""
        genes = self.space.genes(sub)
        dimensions = {n: v for n, v in self.space.dimensions().items() if len(v) > 1}
        for _ in range(_DRAWS if dimensions else 0):
            name = self.rng.choice(list(dimensions))
            values = dimensions[name]
            step = int(len(values) ** self.rng.random())  # log-uniform in 1..len
            to = values.index(genes[name]) + self.rng.choice((-step, step))
            if 0 <= to < len(values):
                near = self.space.build(**{**genes, name: values[to]})
                if near is not None and near != sub:
                    return near
        return self.space.sample(self.rng)

    def _next(self) -> SubNetwork | None:
        while self._first:
            sub = self._first.pop(0)
            if self.is_new(sub) and self._keeps(sub):
                return sub
        idea = None
        for _ in range(_DRAWS):
            idea = self.propose()
            if self.is_new(idea) and self._keeps(idea):
                return idea
        assert idea is not None
        near = self._repaired(idea)
        return near if self.is_new(near) and self._keeps(near) else self._any_new()

    def _keeps(self, sub: SubNetwork) -> bool:
        """Whether an idea keeps the constraints; one that does not is not looked at again."""
        if self.problem.excess(sub) > 0:
            self._rejected.add(sub)
            return False
        return True

    def _repaired(self, sub: SubNetwork) -> SubNetwork:
        """Walk from neighbour to neighbour until the constraints hold, or nothing improves."""
        excess = self.problem.likely_excess
        while excess(sub) > 0:
            near = min(self.space.neighbours(sub), key=excess, default=sub)
            if excess(near) >= excess(sub):
                break
            sub = near
        return sub

    def _any_new(self) -> SubNetwork | None:
        """A random member that is left: drawn, and in the end looked for one by one."""
        for _ in range(_DRAWS):
            sub = self._repaired(self.space.sample(self.rng))
            if self.is_new(sub) and self._keeps(sub):
                return sub
        if self.space.num_members() > _LISTED:
            return None
        left = [sub for sub in self.space.members() if self.is_new(sub)]
        self.rng.shuffle(left)
        return next((sub for sub in left if self._keeps(sub)), None)


def config_space(space: SearchSpace) -> dict[str, Any]:
    """The space in Syne Tune's words.

    Dimensions are ordered, never `choice`: a model sees `choice` one-hot and can't learn that more
    layers cost less loss (97 against 90 % of the hypervolume after 50 trials on a synthetic space).
    A dimension with one choice is a constant.
    """
    found: dict[str, Any] = {}
    for name, values in space.dimensions().items():
        if len(values) == 1:
            found[name] = values[0]
        elif isinstance(values, range) and values.step == 1:
            make = lograndint if space.domain(name).log_uniform else randint
            found[name] = make(values[0], values[-1])
        else:
            # All of one type: Syne Tune casts to that of the first value.
            whole = all(isinstance(value, int) for value in values)
            found[name] = ordinal([v if whole else float(v) for v in values], kind="equal")
    return found
