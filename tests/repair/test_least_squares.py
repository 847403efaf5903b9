"""Ridge steps against a dense least squares of all tokens, and the choice on held-back ones."""

import pytest
import torch

from whittle_nas.repair.least_squares import NormalEquations, best_step, error_after, ridge_step


def tokens(count, inputs, outputs, *, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(count, inputs, generator=generator)
    truth = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(7))
    return a, a @ truth.T + noise * torch.randn(count, outputs, generator=generator)


def equations(a, e, parts=3):
    found = NormalEquations.zeros(a.shape[1], e.shape[1], tokens=len(a), device=a.device)
    for rows, errors in zip(a.chunk(parts), e.chunk(parts), strict=True):
        found.add(rows, errors)
    return found


def dense(a, e, ridge, free=0):
    """The same minimum with the damping as more rows, by QR instead of normal equations."""
    a, e = a.double(), e.double()
    last = a.shape[1] - free
    damping = torch.zeros(a.shape[1], dtype=torch.float64)
    damping[:last] = (ridge * a[:, :last].square().sum(0).mean()).sqrt()
    stacked = torch.cat([a, damping.diag()])
    wanted = torch.cat([e, torch.zeros(a.shape[1], e.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(stacked, wanted, driver="gelsd").solution.T


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("count", [300, 20], ids=["many tokens", "fewer tokens than inputs"])
def test_a_step_is_the_dense_least_squares(ridge, free, count):
    a, e = tokens(count, 32, 9)
    a[:, 5] = 0  # a dead neuron
    if free:
        a[:, -1] = 1
    found = ridge_step(equations(a, e), ridge, free=free)
    torch.testing.assert_close(found, dense(a, e, ridge, free), atol=1e-4, rtol=1e-4)
    assert found[:, 5].abs().max() < 1e-9


def test_errors_after_a_step_are_those_of_the_tokens():
    a, e = tokens(100, 12, 4)
    step = torch.randn(4, 12, dtype=torch.float64)
    direct = (e.double() - a.double() @ step.T).square().sum()
    assert error_after(step, equations(a, e)) == pytest.approx(float(direct), rel=1e-5)


def test_nothing_to_solve_is_no_step():
    a, e = torch.zeros(50, 8), torch.randn(50, 3)
    assert ridge_step(equations(a, e), 0.1) is None
    assert best_step({"fit": equations(a, e)}, equations(*tokens(20, 8, 3))).step is None


def test_held_back_tokens_choose_the_ridge_and_refuse_noise():
    a, e = tokens(40, 32, 4, noise=3.0)
    held = equations(*tokens(400, 32, 4, seed=1, noise=3.0))
    ridges = (1e-6, 1e-1, 1e3)
    chosen = best_step({"fit": equations(a, e)}, held, ridges=ridges)
    errors = {r: error_after(dense(a, e, r), held) for r in ridges}
    assert chosen.ridge == min(errors, key=errors.__getitem__) == 1e-1
    assert chosen.error == pytest.approx(min(errors.values()) / float(held.power), rel=1e-4)

    only_noise = equations(a, torch.randn(40, 4))
    still = equations(torch.randn(400, 32), torch.randn(400, 4))
    assert best_step({"fit": only_noise}, still, ridges=(1e-6,)).step is None
