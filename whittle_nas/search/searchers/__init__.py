"""Search methods as Syne Tune searchers, one per file."""

from __future__ import annotations

import importlib

from whittle_nas.search.options import Method
from whittle_nas.search.searchers.base import Problem, SpaceSearcher

# method: (module, class); only the chosen one is imported, pymoo and scikit-learn take seconds
SEARCHERS = {
    Method.surrogate: ("surrogate", "SurrogateSearcher"),
    Method.random: ("random_search", "RandomSearcher"),
    Method.stratified: ("stratified", "StratifiedSearcher"),
    Method.nsga2: ("nsga2", "NSGA2Searcher"),
    Method.local_search: ("local_search", "LocalSearcher"),
    Method.evolution: ("evolution", "EvolutionSearcher"),
    Method.scalarization: ("scalarization", "ScalarizationSearcher"),
}


def make_searcher(method: Method, problem: Problem, seed: int) -> SpaceSearcher:
    """The searcher of a method."""
    module, name = SEARCHERS[method]
    found = importlib.import_module(f"whittle_nas.search.searchers.{module}")
    return getattr(found, name)(problem, seed)


__all__ = ["SEARCHERS", "Problem", "SpaceSearcher", "make_searcher"]
