"""Which bases: principal components of the residual stream, and of what heads write into it.

Letters as in litgpt: D `n_embd`, H, G, K `head_size`; Q = H / G heads per group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.importance.options import Basis, Criterion
from whittle_nas.importance.scores import Scores
from whittle_nas.weights import axes
from whittle_nas.weights.bases import Bases, rotates_exactly

# A basis of n directions is known from this many tokens for each.
TOKENS_PER_DIRECTION = 10
# Untying a head costs a second table: rotation gains no more than this share of the weights.
TIED_SHARE = 0.15
# Damping of a value covariance, of its mean diagonal: directions that are hardly used stay tame.
_DAMPING = 1e-3


class Covariances:
    """Sums of outer products over calibration tokens, in float64: of one model, batch by batch.

    Attributes:
        stream: (D, D) of the inputs of all norms, each token scaled to unit length, so that every
            norm counts alike; None if it is not measured.
        values: (G, K, K) for each layer, of what the heads of a group give the output projection.
    """

    def __init__(self, config: Any, *, stream: bool, device: torch.device) -> None:
        double = {"dtype": torch.float64, "device": device}
        self._config = config
        size = (config.n_query_groups, config.head_size, config.head_size)
        self.stream = torch.zeros(config.n_embd, config.n_embd, **double) if stream else None
        self.values = [torch.zeros(size, **double) for _ in range(config.n_layer)]
        self.tokens = 0

    def add_stream(self, x: Tensor) -> None:
        """The input of one norm, (B, T, D)."""
        if self.stream is not None:
            unit = torch.nn.functional.normalize(x.flatten(0, -2).float(), dim=-1)
            self.stream += (unit.mT @ unit).to(self.stream.device)

    def add_values(self, layer: int, attention: Tensor) -> None:
        """The input of an output projection, (B, T, H * K)."""
        config = self._config
        heads = attention.flatten(0, -2).float()
        heads = heads.unflatten(-1, (config.n_query_groups, -1, config.head_size))
        rows = heads.transpose(0, 1).flatten(1, 2)  # (G, tokens * Q, K)
        self.values[layer] += (rows.mT @ rows).to(self.values[layer].device)


def choose_rotation(
    basis: Basis,
    config: Any,
    *,
    tied: bool,
    num_tokens: int,
    criterion: Criterion = Criterion.activation,
) -> tuple[bool, str]:
    """Whether the residual stream is rotated, and a sentence that says why, or what it costs.

    Args:
        basis: what was asked for.
        config: `litgpt.Config` of the model.
        tied: whether the head is the token table.
        num_tokens: of calibration text.
        criterion: what entries are ranked by; magnitudes are a baseline of orders.

    Raises:
        ConfigError: if a rotation was asked for that would change the model, or that so little text
            can't find.
    """
    asked = basis is Basis.rotation
    if basis is Basis.permutation:
        return False, ""
    if not rotates_exactly(config):
        why = f"{config.name} has {_obstacle(config)}, which a rotation does not leave as it is"
        if asked:
            raise ConfigError(f"--basis rotation: {why}; use --basis auto or permutation")
        return False, f"the residual stream is permuted and not rotated: {why}"
    needed = TOKENS_PER_DIRECTION * config.n_embd
    if num_tokens < needed:
        why = (
            f"needs at least {TOKENS_PER_DIRECTION} * n_embd = {needed} calibration tokens and "
            f"these are {num_tokens}; raise --data.num_blocks"
        )
        if asked:
            raise ConfigError(f"--basis rotation {why}, or use --basis permutation")
        return False, f"the residual stream is permuted and not rotated: a rotation {why}"
    if criterion is Criterion.magnitude and not asked:
        return False, ""
    table = config.padded_vocab_size * config.n_embd
    share = table / axes.num_params(config) if tied else 0.0
    if share > TIED_SHARE and not asked:
        return False, (
            "the residual stream is permuted and not rotated: a rotation unties the head, and a "
            f"second table of {share:.0%} of the weights costs more than it gains "
            "(--basis rotation does it all the same)"
        )
    if tied:
        return True, (
            f"the head is untied: it has a table of its own now, {table:,} parameters more "
            f"({share:.0%})"
        )
    return True, ""


def _obstacle(config: Any) -> str:
    return "LayerNorms" if config.norm_class_name != "RMSNorm" else "norms after its layers' parts"


def with_matrices(
    scores: Scores, bases: Bases, found: Covariances, model: Any, *, values: bool
) -> tuple[Scores, Bases]:
    """Replace orders of channels by matrices, and their scores by those of the new channels.

    Channels of the residual stream score their share of its energy, value channels what they write.

    Args:
        scores: of everything.
        bases: orders of everything.
        found: what the calibration text did.
        model: `litgpt.GPT`, whose value and output projections are read.
        values: whether value channels get matrices, if there is text enough.
    """
    if found.stream is not None:
        energies, directions = principal_directions(found.stream)
        scores = replace(scores, embd=(energies / energies.sum()).float().cpu())
        bases = replace(bases, embd=directions.float())
    if not values or found.tokens < TOKENS_PER_DIRECTION * model.config.head_size:
        return scores, bases
    layers, gains = [], []
    for layer, block in enumerate(model.transformer.h):
        sums = found.values[layer]
        qkv, proj = (part.weight.to(sums.device) for part in (block.attn.qkv, block.attn.proj))
        matrices, gain = value_bases(sums, qkv, proj, model.config)
        layers.append(replace(bases.layers[layer], value_channels=matrices.float()))
        gains.append((gain / found.tokens**0.5).float().cpu())
    return replace(scores, value_channels=torch.stack(gains)), replace(bases, layers=layers)


def principal_directions(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Falling eigenvalues (D,) and eigenvectors as rows (D, D), in float64.

    The largest entry of every row is positive, so that equal text gives equal signs.
    """
    values, vectors = torch.linalg.eigh(covariance)
    rows = vectors.mT.flip(0)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values.flip(0).clamp_min(0), rows * largest.sign()


def value_bases(
    covariance: Tensor, qkv: Tensor, proj: Tensor, config: Any
) -> tuple[Tensor, Tensor]:
    """A new basis of the value channels of every query group (methods: value basis).

    With C the covariance of the heads' outputs, O their columns of the output projection stacked,
    S = C^(1/2) and O S = U s V^T, the channels are A = V^T S^-1: by the first k of them, heads
    write the best approximation that k channels allow. Rows of A are scaled so that the value rows
    and the projection's columns have equal norms.

    Args:
        covariance: (G, K, K) sums over tokens, and over the heads of a group.
        qkv: ((H + 2 G) K, D) weights.
        proj: (D, H K) weights.
        config: `litgpt.Config`.

    Returns:
        A, (G, K, K) in float64; and (G, K) the size s of what each channel writes, falling.
    """
    groups, size = config.n_query_groups, config.head_size
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(size, dtype=torch.float64, device=covariance.device)
    # a group that never says anything has no covariance: any basis is right
    damped = covariance + eye * torch.where(mean > 0, _DAMPING * mean, 1.0)
    squares, vectors = torch.linalg.eigh(damped)
    roots = squares.clamp_min(0).sqrt().unsqueeze(-2)
    root, inverse = (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
    columns = proj.double().unflatten(-1, (groups, -1, size)).permute(1, 0, 2, 3).flatten(1, 2)
    gram = columns.mT @ columns  # (G, K, K), O^T O
    energies, turns = torch.linalg.eigh(root @ gram @ root)
    energies, turns = energies.flip(-1).clamp_min(0), turns.flip(-1)
    channels = turns.mT @ inverse  # A, (G, K, K)
    values = qkv[-groups * size :].double().unflatten(0, (groups, size))
    rows = (channels @ values).norm(dim=-1)
    writes = (columns @ (root @ turns)).norm(dim=-2)  # columns of B = S V
    scale = torch.where((rows > 0) & (writes > 0), writes / rows, 1.0).sqrt()
    return channels * scale.unsqueeze(-1), energies.sqrt()
