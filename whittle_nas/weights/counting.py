"""Parameter counts of many sub-networks of one model, without a config or a name per count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.axes import Axis


def parameter_counter(config: Any) -> Callable[[SubNetwork], int]:
    """A function that counts the parameters of a sub-network.

    Equal to `axes.num_params` of the sub-network's config, in microseconds: rejection sampling
    asks for tens of thousands of counts.

    Args:
        config: `litgpt.Config` of the super-network.
    """
    return _counter(config, lambda _name, _dims: True)


def matmul_counter(config: Any) -> Callable[[SubNetwork], int]:
    """A function that counts the weights that every token is multiplied with.

    Those are all matrices but the token table, which is looked up.

    Args:
        config: `litgpt.Config` of the super-network.
    """
    return _counter(config, lambda name, dims: len(dims) == 2 and name != "transformer.wte.weight")


def _counter(config: Any, counts: Callable[[str, axes.Dims], bool]) -> Callable[[SubNetwork], int]:
    """A function that adds the sizes of the parameters for which `counts` is true."""
    single = replace(config, n_layer=1, sliding_window_indices=None, rope_indices=None)
    names = axes.stored_names(single)
    in_block: Counter[axes.Dims] = Counter()
    outside: Counter[axes.Dims] = Counter()
    for name in names:
        terms = outside if axes.split_layer(name)[0] is None else in_block
        dims = axes.dims(name, config)
        terms[dims] += counts(name, dims)
    vocabulary = config.padded_vocab_size

    def count(sub: SubNetwork) -> int:
        heads, groups = sub.n_head * sub.head_size, sub.n_query_groups * sub.head_size
        sizes = {
            Axis.EMBD: sub.n_embd,
            Axis.MLP: sub.intermediate_size,
            Axis.QUERY: heads,
            Axis.HEADS: heads,
            Axis.KEY: groups,
            Axis.VALUE: groups,
            Axis.CHANNEL: sub.head_size,
            Axis.VOCAB: vocabulary,
        }
        return sub.n_layer * _total(in_block, sizes) + _total(outside, sizes)

    return count


def _total(terms: Counter[axes.Dims], sizes: dict[Axis, int]) -> int:
    total = 0
    for dims, times in terms.items():
        product = times
        for dim in dims:
            product *= sum(sizes[axis] for axis in dim)
        total += product
    return total
