"""The algebra on factors against dense float64 matrices."""

import pytest
import torch

from moa.low_rank import LowRank, core, gram, inner, stack, svd


def update(o, r, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return LowRank(draw(o, r), draw(r, n))


@pytest.fixture
def updates():
    return [update(9, r, 14, seed=r) for r in (2, 3, 4)]


def test_a_stack_is_the_sum(updates):
    whole = stack(updates)
    assert whole.rank == 9
    assert whole.shape == (9, 14)
    torch.testing.assert_close(whole.delta(), sum(u.delta() for u in updates))


def test_the_norm_and_inner_products_are_those_of_the_matrices(updates):
    dense = torch.stack([u.delta().flatten() for u in updates])
    torch.testing.assert_close(gram(updates), dense @ dense.T)
    assert updates[0].norm() == pytest.approx(float(dense[0].norm()))
    assert inner(updates[0], updates[1]) == pytest.approx(float(dense[0] @ dense[1]))


@pytest.mark.parametrize("factor", [2.0, -0.5, 0.0])
def test_scaling_is_split_evenly_with_the_sign_on_b(factor):
    u = update(5, 2, 6)
    scaled = u.scaled(factor)
    torch.testing.assert_close(scaled.delta(), factor * u.delta())
    torch.testing.assert_close(scaled.A, abs(factor) ** 0.5 * u.A)
    torch.testing.assert_close((factor * u).delta(), (u * factor).delta())


@pytest.mark.parametrize("size", [(9, 14), (5, 14), (14, 5)])
def test_cores_hold_the_updates_in_orthonormal_bases(size):
    parts = [update(size[0], r, size[1], seed=r) for r in (2, 3, 4)]
    left, cores, right = core(parts)
    torch.testing.assert_close(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64))
    torch.testing.assert_close(right.T @ right, torch.eye(right.shape[1], dtype=torch.float64))
    for part, small in zip(parts, cores, strict=True):
        torch.testing.assert_close(left @ small @ right.T, part.delta())


def test_singular_values_are_those_of_the_matrix():
    u = update(9, 4, 14)
    U, S, V = svd(u)
    torch.testing.assert_close(S, torch.linalg.svdvals(u.delta())[:4])
    torch.testing.assert_close(U @ S.diag() @ V.T, u.delta())


def test_truncation_is_the_best_approximation_and_says_what_it_drops():
    u = update(9, 4, 14)
    short, dropped = u.truncated(2)
    S = torch.linalg.svdvals(u.delta())
    assert short.rank == 2
    assert dropped == pytest.approx(float(S[2:].square().sum()))
    assert float((u.delta() - short.delta()).norm()) == pytest.approx(dropped**0.5)


def test_truncation_without_a_rank_keeps_the_numerical_rank():
    u = update(9, 3, 14)
    again, dropped = stack([u, u, u.scaled(-0.5)]).truncated()
    assert again.rank == 3
    assert dropped < 1e-12
    torch.testing.assert_close(again.delta(), 1.5 * u.delta())


def test_an_update_has_one_truncated_form_whatever_its_factors_were():
    u = update(9, 3, 14)
    G = torch.eye(3, dtype=torch.float64) + torch.ones(3, 3, dtype=torch.float64).triu()
    one, _ = u.truncated()
    other, _ = LowRank(u.B @ torch.linalg.inv(G), G @ u.A).truncated()
    torch.testing.assert_close(one.B, other.B)
    torch.testing.assert_close(one.A, other.A)
    assert all(row[row.abs().argmax()] > 0 for row in one.A)


@pytest.mark.parametrize("nothing", [LowRank.zero((4, 6)), LowRank(torch.zeros(4, 2), torch.ones(2, 6))])
def test_an_update_that_changes_nothing_truncates_to_rank_one_of_zeros(nothing):
    short, dropped = nothing.truncated(3)
    assert (short.rank, dropped, short.norm()) == (1, 0.0, 0.0)


def test_decompositions_of_half_precision_factors_run_in_float64():
    half = update(9, 4, 14).to(torch.bfloat16)
    assert svd(half).S.dtype == torch.float64
    exact = half.to(torch.float64).delta()
    torch.testing.assert_close(half.truncated(4)[0].delta(), exact)


def test_factors_that_do_not_fit_are_refused():
    # Under shape checks the annotations refuse first, with their own message.
    with pytest.raises((ValueError, TypeError), match=r"\[2, ?5\]"):
        LowRank(torch.zeros(4, 3), torch.zeros(2, 5))
