"""Parameter counts of many sub-networks of one model, without a config or a name per count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from whittle_nas.space.subnetwork import Block, SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.axes import Axis


def parameter_counter(config: Any) -> Callable[[SubNetwork], int]:
    """A function that counts the parameters of a sub-network.

    Equal to `axes.num_params` of the sub-network's own config where that can describe it, in
    microseconds: rejection sampling asks for tens of thousands of counts.

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


def matrix_counter(config: Any, part: str) -> Callable[[SubNetwork], int]:
    """A function that counts the weights in the matrices of all attentions, or of all MLPs.

    Args:
        config: `litgpt.Config` of the super-network.
        part: `attn` or `mlp`.
    """
    return _counter(config, lambda name, dims: len(dims) == 2 and name.startswith(f"{part}."))


def _counter(config: Any, counts: Callable[[str, axes.Dims], bool]) -> Callable[[SubNetwork], int]:
    """A function that adds the sizes of the parameters for which `counts` is true."""
    single = replace(config, n_layer=0, sliding_window_indices=None, rope_indices=None)
    outside = _terms(axes.stored_names(single), config, counts, "")
    vocabulary = config.padded_vocab_size

    @lru_cache(None)
    def terms_of(parts: Block) -> Counter[axes.Dims]:
        held = axes.block_parameter_names(config, parts)
        return _terms(held, config, counts, "transformer.h.0.")

    @lru_cache(2**16)
    def of_block(n_embd: int, block: Block) -> int:
        heads, groups = block.n_head * block.head_size, block.n_query_groups * block.head_size
        sizes = {
            Axis.EMBD: n_embd,
            Axis.MLP: block.intermediate_size,
            Axis.QUERY: heads,
            Axis.HEADS: heads,
            Axis.KEY: groups,
            Axis.VALUE: groups,
            Axis.CHANNEL: block.head_size,
        }
        parts = Block._make([*(min(1, size) for size in block.sizes), *block.forms])
        return _total(terms_of(parts), sizes)

    def count(sub: SubNetwork) -> int:
        total = _total(outside, {Axis.EMBD: sub.n_embd, Axis.VOCAB: vocabulary})
        for block, times in sub.shapes.items():
            total += times * of_block(sub.n_embd, block)
        return total

    return count


def _terms(
    names: Sequence[str], config: Any, counts: Callable[[str, axes.Dims], bool], prefix: str
) -> Counter[axes.Dims]:
    """How many of the parameters that count have which dimensions."""
    terms: Counter[axes.Dims] = Counter()
    for name in names:
        dims = axes.dims(prefix + name, config)
        terms[dims] += counts(name, dims)
    return terms


def _total(terms: Counter[axes.Dims], sizes: Mapping[Axis, int]) -> int:
    total = 0
    for dims, times in terms.items():
        product = times
        for dim in dims:
            product *= sum(sizes[axis] for axis in dim)
        total += product
    return total
