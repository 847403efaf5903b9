"""Masks and rounding against slow references that are written another way."""

from types import SimpleNamespace

import pytest
import torch
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.calibration import Gram, SquareSums, UnitGram
from whittle_nas.errors import ConfigError
from whittle_nas.prune.blockwise import check_blocks
from whittle_nas.prune.gptq import gptq
from whittle_nas.prune.linears import output_error
from whittle_nas.prune.magnitude import magnitude
from whittle_nas.prune.options import Grid, Method, Sparsity, parse_sparsity
from whittle_nas.prune.rtn import rtn
from whittle_nas.prune.solver import factorise
from whittle_nas.prune.sparsegpt import sparsegpt
from whittle_nas.prune.wanda import wanda

HALF, TWO_FOUR = Sparsity(0.5), Sparsity(0.5, (2, 4))
FOUR_EIGHT = Sparsity(0.5, (4, 8))


@pytest.fixture
def layer():
    """A weight whose inputs are correlated and of different size; one input is always zero."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(400, 160, generator=generator) @ torch.randn(160, 160, generator=generator)
    rows = rows * torch.rand(160, generator=generator)
    rows[:, 5] = 0
    gram, squares = Gram(), SquareSums()
    for part in rows.split(150):
        gram.add(part)
        squares.add(part)
    weight = torch.randn(24, 160, generator=generator)
    return SimpleNamespace(weight=weight, rows=rows.double(), gram=gram, squares=squares)


def hessian_inverse(rows):
    """Inverse of the damped Hessian, without a factorisation."""
    hessian = 2 * rows.T @ rows / len(rows)
    hessian[hessian.diagonal() == 0, hessian.diagonal() == 0] = 1
    return torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)))


def brain_surgeon(weight, rows, decide):
    """Optimal brain surgeon, column after column, with the inverse downdated and not factorised.

    `decide(weight, diagonal, column)` gives the new column; `diagonal[j]` is what the inverse has
    at j once all columns before j are fixed.
    """
    weight, inverse = weight.double().clone(), hessian_inverse(rows)
    weight[:, (rows == 0).all(0)] = 0
    downdated, copy = [], inverse.clone()
    for j in range(len(copy)):
        downdated.append(copy[j, j].item())
        copy = copy - torch.outer(copy[:, j], copy[j]) / copy[j, j]
    diagonal = torch.tensor(downdated, dtype=torch.float64)
    for j in range(weight.shape[1]):
        new = decide(weight, diagonal, j)
        change = (weight[:, j] - new) / inverse[j, j]
        weight[:, j + 1 :] -= torch.outer(change, inverse[j, j + 1 :])
        weight[:, j] = new
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return weight


@pytest.mark.parametrize("sparsity", [HALF, TWO_FOUR, FOUR_EIGHT], ids=str)
def test_sparsegpt_is_brain_surgery_with_a_mask_chosen_on_the_way(layer, sparsity):
    mask = torch.zeros(layer.weight.shape, dtype=torch.bool)

    def decide(weight, diagonal, j):
        width = 128 if sparsity.pattern is None else sparsity.pattern[1]
        if j % width == 0:
            block = slice(j, min(j + width, 160))
            saliency = weight[:, block] ** 2 / diagonal[block]
            if sparsity.pattern is None:
                smallest = saliency.flatten().sort().values[saliency.numel() // 2 - 1]
                mask[:, block] = saliency > smallest
            else:
                for row in range(len(weight)):
                    best = saliency[row].topk(sparsity.pattern[0]).indices
                    mask[row, block] = False
                    mask[row, j + best] = True
        return weight[:, j] * mask[:, j]

    expected = brain_surgeon(layer.weight, layer.rows, decide)
    found = sparsegpt(layer.weight, factorise(layer.gram, "x"), sparsity)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found != 0, mask & (layer.rows != 0).any(0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_is_brain_surgery_with_rounding(layer, bits, symmetric):
    grid = Grid(bits, 32, symmetric)
    state = {}

    def decide(weight, _diagonal, j):
        if j % 32 == 0:
            group = weight[:, j : j + 32]
            top = group.abs().amax(1) if symmetric else group.amax(1).clamp(min=0)
            low = -top if symmetric else group.amin(1).clamp(max=0)
            state["step"] = (top - low) / (2**bits - 1) * (1 + 1e-6)
            state["zero"] = 0 if symmetric else torch.round(-low / state["step"]) - 2 ** (bits - 1)
        level = torch.round(weight[:, j] / state["step"] + state["zero"])
        level = level.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (level - state["zero"]) * state["step"]

    expected = brain_surgeon(layer.weight, layer.rows, decide)
    found = gptq(layer.weight, factorise(layer.gram, "x"), grid)
    torch.testing.assert_close(found.weight.double(), expected, atol=1e-5, rtol=1e-5)
    levels = found.weight.double().unflatten(1, (-1, 32)) / found.scales.unsqueeze(-1)
    assert ((levels - levels.round()).abs() < 1e-3).all()


def test_wanda_and_magnitude_keep_what_a_loop_keeps(layer):
    norms = layer.rows.norm(dim=0)
    for row, found in zip(layer.weight, wanda(layer.weight, layer.squares, HALF), strict=True):
        scores = [abs(float(w)) * float(n) for w, n in zip(row, norms, strict=True)]
        gone = sorted(range(160), key=scores.__getitem__)[:80]
        expected = row.clone()
        expected[gone] = 0
        assert torch.equal(found, expected)
    size = layer.weight.abs().flatten().sort().values[24 * 80 - 1]
    assert torch.equal(magnitude(layer.weight, HALF), layer.weight * (layer.weight.abs() > size))


@pytest.mark.parametrize("sparsity", [TWO_FOUR, FOUR_EIGHT, Sparsity(0.75, (1, 4))], ids=str)
def test_patterns_have_exactly_their_number_of_weights(layer, sparsity):
    factor = factorise(layer.gram, "x")
    dense = layer.weight.clone()
    dense[0, :8] = 1.0  # equal scores
    for found in (
        magnitude(dense, sparsity),
        wanda(dense, layer.squares, sparsity),
        sparsegpt(dense, factor, sparsity)[:, 8:],  # the dead input costs one more
    ):
        left = (found.reshape(24, -1, sparsity.pattern[1]) != 0).sum(-1)
        assert (left == sparsity.pattern[0]).all()


def test_rounding_is_at_most_half_a_step_away(layer):
    for symmetric in (True, False):
        found = rtn(layer.weight, Grid(4, 32, symmetric))
        away = (found.weight - layer.weight).unflatten(1, (-1, 32)).abs()
        # the upper end of a symmetric grid is half a step inside
        assert (away <= found.scales.unsqueeze(-1) * 0.5001).all()
        levels = found.weight.double().unflatten(1, (-1, 32)) / found.scales.unsqueeze(-1)
        levels = levels + found.zeros.unsqueeze(-1)
        assert levels.min() > -8.01
        assert levels.max() < 7.01


def test_what_makes_up_for_its_errors_has_smaller_ones(layer):
    factor = factorise(layer.gram, "x")
    for sparsity in (HALF, TWO_FOUR):
        plain = output_error(layer.weight, magnitude(layer.weight, sparsity), layer.gram)
        chosen = output_error(
            layer.weight, wanda(layer.weight, layer.squares, sparsity), layer.gram
        )
        solved = output_error(layer.weight, sparsegpt(layer.weight, factor, sparsity), layer.gram)
        assert solved < chosen < plain
    grid = Grid(3, 32)
    plain = output_error(layer.weight, rtn(layer.weight, grid).weight, layer.gram)
    assert output_error(layer.weight, gptq(layer.weight, factor, grid).weight, layer.gram) < plain
    outputs = layer.rows @ layer.weight.T.double()
    change = layer.rows @ (layer.weight - rtn(layer.weight, grid).weight).T.double()
    assert plain == pytest.approx(float(change.square().sum() / outputs.square().sum()), rel=1e-4)


def test_one_huge_token_does_not_decide_for_all(layer):
    grid, ordinary = Grid(3, 32), layer.rows.float()
    errors = {}
    for kind in (Gram, UnitGram):
        gram = kind()
        gram.add(torch.cat([ordinary, 1000 * ordinary[:1]]))
        new = gptq(layer.weight, factorise(gram, "mlp.proj"), grid).weight
        errors[kind] = output_error(layer.weight, new, layer.gram)
    rounded = output_error(layer.weight, rtn(layer.weight, grid).weight, layer.gram)
    assert errors[UnitGram] < 0.8 * rounded < errors[Gram]


def test_a_singular_hessian_is_damped_more_and_then_refused():
    gram = Gram()
    gram.add(torch.eye(3))
    gram.total = torch.tensor([[1.0, 0, 0], [0, 1, 1.05], [0, 1.05, 1]]).double()  # one below zero
    factor = factorise(gram, "transformer.h.2.mlp.proj")
    inverse = factor.upper.T @ factor.upper
    damped = 2 * gram.mean() + 0.1 * 2 / 3 * torch.eye(3)
    torch.testing.assert_close(inverse @ damped, torch.eye(3).double())
    gram.total[1, 2] = gram.total[2, 1] = 5
    with pytest.raises(ConfigError, match=r"Hessian of transformer\.h\.2\.mlp\.proj is singular"):
        factorise(gram, "transformer.h.2.mlp.proj")


def test_a_layer_of_zeros_is_not_taken_for_a_sparse_one():
    config = tiny_config("SmolLM2-135M")
    tensors = fill_random(GPT(config)).state_dict()
    for name in tensors:
        if name.startswith("transformer.h.1.attn."):
            tensors[name].zero_()
    check_blocks(tensors, config, sparsity=HALF, grid=None)
    tensors["transformer.h.1.mlp.proj.weight"][::2, ::2] = 0
    with pytest.raises(ConfigError, match=r"25 % of transformer\.h\.1\.mlp\.proj\.weight is zero"):
        check_blocks(tensors, config, sparsity=HALF, grid=None)


def test_what_gives_zeros_has_no_error(layer):
    zeros = torch.zeros_like(layer.weight)
    assert output_error(zeros, zeros, layer.gram) == 0


def test_sparsities_are_read_as_shares_and_patterns():
    assert parse_sparsity("2:4", Method.wanda) == TWO_FOUR
    assert parse_sparsity(0.5, Method.flap) == HALF
    for given in ("0", "1", "1.5", "-0.1", "4:4", "3:2", "0:4", "2:6", "half", "nan"):
        with pytest.raises(ConfigError, match=f"--sparsity {given} must"):
            parse_sparsity(given, Method.sparsegpt)
    with pytest.raises(ConfigError, match="shortgpt must be a share"):
        parse_sparsity("2:4", Method.shortgpt)
