"""The algebra on factors against dense float64 matrices."""

import pytest
import torch

from moa.low_rank import LowRank, core, gram, inner, span, stack, svd


def update(o, r, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
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
    found = core(parts)
    left, right = found.left.matrix(), found.right.matrix()
    torch.testing.assert_close(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64))
    torch.testing.assert_close(right.T @ right, torch.eye(right.shape[1], dtype=torch.float64))
    for part, small in zip(parts, found.cores, strict=True):
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


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STACKS = {
    "independent": drawn(40, 12),
    "more columns than rows": drawn(10, 30),
    "shared by all": drawn(40, 4).repeat(1, 3),
    "lengths from 1e-8 to 1e8": drawn(40, 12) * torch.logspace(-8, 8, 12, dtype=torch.float64),
    "nearly shared": torch.cat([drawn(40, 6), drawn(40, 6) + 1e-5 * drawn(40, 6, seed=1)], dim=1),
    "zeros among them": drawn(40, 12) * (torch.arange(12) % 3 > 0),
}


@pytest.mark.parametrize("stacked", STACKS)
def test_a_basis_is_orthonormal_and_holds_its_vectors(stacked):
    vectors = STACKS[stacked]
    basis = span(vectors)
    Q = basis.matrix()
    lengths = vectors.norm(dim=0)
    lengths = torch.where(lengths == 0, 1.0, lengths)
    assert Q.shape[1] == torch.linalg.matrix_rank(vectors / lengths, rtol=1e-7)
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(Q @ basis.coordinates / lengths, vectors / lengths, rtol=0, atol=1e-12)
    X = drawn(Q.shape[1], 2, seed=2)
    torch.testing.assert_close(basis @ X, Q @ X)


def test_a_basis_leaves_out_what_is_below_the_rounding_of_float32():
    shared = drawn(40, 6)
    basis = span(torch.cat([shared, shared + 1e-9 * drawn(40, 6, seed=1)], dim=1))
    assert basis.matrix().shape[1] == 6
    error = (basis.matrix() @ basis.coordinates - basis.vectors).norm() / basis.vectors.norm()
    assert error < 1e-8


@pytest.mark.parametrize("size", [(5, 0), (5, 3)])
def test_what_spans_nothing_has_an_empty_basis(size):
    assert span(torch.zeros(size)).matrix().shape == (5, 0)


@pytest.mark.parametrize("near", [1e-2, 1e-5, 1e-7])
def test_singular_values_of_nearly_equal_adapters_are_those_of_the_matrix(near):
    a = update(30, 4, 50)
    b = LowRank(a.B + near * drawn(30, 4, seed=3), a.A + near * drawn(4, 50, seed=4))
    whole = stack([a, b.scaled(-0.9)])
    S = torch.linalg.svdvals(whole.delta())[:8]
    assert (svd(whole).S - S[: len(svd(whole).S)]).abs().max() < 1e-8 * a.norm()
    exact, _ = whole.truncated()
    assert (exact.delta() - whole.delta()).norm() < 1e-6 * a.norm()  # what truncation calls rounding
