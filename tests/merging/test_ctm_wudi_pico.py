"""Compress-then-Merge, WUDI and Pico against dense float64 versions of the papers' formulas."""

import math

import pytest
import torch

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import compress, merge
from moa.merging.compress import common_bases

WEIGHTS = [0.7, -0.5, 0.9]
MODULE = "model.layers.0.self_attn.q_proj"


def merged(adapters, method, weights=WEIGHTS, **options):
    result = merge(adapters, method, weights=weights, dtype=torch.float64, **options)
    return {module: update.delta() for module, update in result.modules.items()}


def present(adapters, weights, module):
    pairs = zip(adapters, weights, strict=True)
    return [(w, a.modules[module].delta()) for a, w in pairs if module in a.modules]


def hooi(matrices, rank, sweeps=300):
    """Partial Tucker of dense matrices, eigenvectors anew each time, until nothing moves."""
    lead = lambda X: torch.linalg.eigh((X @ X.mT).sum(0)).eigenvectors[:, -rank:]
    V = lead(matrices.mT)
    for _ in range(sweeps):
        U = lead(matrices @ V)
        V = lead(matrices.mT @ U)
    return U, V


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ctm_compresses_as_a_dense_tucker_decomposition_does(beta, adapters):
    result = merge(adapters, "ctm", weights=WEIGHTS, dtype=torch.float64, rule="sum", rank=3, beta=beta)
    for module, update in result.modules.items():
        deltas = torch.stack([w * delta for w, delta in present(adapters, WEIGHTS, module)])
        norms = deltas.flatten(1).norm(dim=1)
        balanced = ((beta * norms + (1 - beta) * norms.mean()) / norms)[:, None, None] * deltas
        U, V = hooi(balanced, 3)
        expected = U @ U.T @ deltas.sum(0) @ V @ V.T
        assert (update.delta() - expected).norm() < 1e-2 * expected.norm()
        captured = float((U.T @ balanced @ V).square().sum() / balanced.square().sum())
        layer = result.report.layers[module]
        assert layer.facts["captured_energy"] == pytest.approx(captured, abs=1e-5)
        left_out = deltas.sum(0).norm() ** 2 - update.norm() ** 2
        assert layer.dropped == pytest.approx(float(left_out / deltas.sum(0).norm() ** 2), rel=1e-6)


def test_common_bases_reach_what_converged_hooi_reaches():
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(5, 20, 17, generator=generator, dtype=torch.float64)
    U, V, captured = common_bases(matrices, 4)
    best = hooi(matrices, 4)
    reached = (best[0].T @ matrices @ best[1]).square().sum() / matrices.square().sum()
    assert captured == pytest.approx(float(reached), rel=1e-5)
    assert captured == pytest.approx(float((U.T @ matrices @ V).square().sum() / matrices.square().sum()), rel=1e-12)


def test_momentum_saves_half_of_the_sweeps_and_loses_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(7, 56, 8, generator=generator, dtype=torch.float64)
    matrices = draw() @ draw().mT
    steps = []
    step = compress.orthogonal_step
    monkeypatch.setattr(compress, "orthogonal_step", lambda *given: steps.append(1) or step(*given))
    captured = common_bases(matrices, 8).captured
    taken = len(steps)
    monkeypatch.setattr(compress, "carried_on", lambda basis, last, share: basis)
    assert captured > common_bases(matrices, 8).captured
    assert taken < (len(steps) - taken) / 2


def test_ctm_of_full_rank_with_the_rule_sum_is_the_weighted_sum(adapters, dense_sum):
    for module, delta in merged(adapters, "ctm", rule="sum", rank="full").items():
        torch.testing.assert_close(delta, dense_sum(adapters, WEIGHTS, module))


def test_ctm_has_the_largest_input_rank_unless_told_otherwise(adapters):
    assert {layer.rank for layer in merge(adapters, "ctm", rule="sum").report.layers.values()} == {3, 4}


def test_ctm_merges_entries_in_the_principal_directions_of_the_compressed_updates(adapters):
    weighted = [w * delta for w, delta in present(adapters, WEIGHTS, MODULE)]
    U, V = hooi(torch.stack(weighted), 9)  # all directions: what is left to choose is the turn inside
    small = torch.stack([U.T @ delta @ V for delta in weighted])
    P, Q = (torch.linalg.eigh((C @ C.mT).sum(0)).eigenvectors for C in (small, small.mT))
    turned = P.T @ small @ Q
    sizes = turned.abs().flatten(1).sort(dim=1, descending=True).values
    expected = None
    for K in (8, 9):  # eigenvectors without strength, of the shared direction, hold no entries
        kept = turned[:, -9:, -K:]
        sizes = kept.abs().flatten(1).sort(dim=1, descending=True).values
        votes = torch.where(kept.abs() >= sizes[:, int(0.5 * kept[0].numel()) - 1, None, None], kept, 0.0)
        agreed = torch.where(votes.sign() == votes.sum(0).sign(), votes, 0.0).sum(0)
        expected = U @ P[:, -9:] @ agreed @ (V @ Q[:, -K:]).T if K == 8 else expected
    got = merged(adapters, "ctm", rank="full", density=0.5, beta=1.0)[MODULE]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def dense_wudi(pairs, ridge=0.0):
    """M S = Y of the normal equations, on the adapters' row space."""
    G = [delta.T @ delta / delta.norm() ** 2 for _, delta in pairs]
    sizes = [abs(w) for w, _ in pairs]
    S = sum(size * g for size, g in zip(sizes, G, strict=True))
    values, vectors = torch.linalg.eigh(S)
    row_space = vectors[:, values > 1e-10 * values[-1]]
    rho = ridge * values[values > 1e-10 * values[-1]].mean() / sum(sizes)
    G = [g + rho * row_space @ row_space.T for g in G]
    S = sum(size * g for size, g in zip(sizes, G, strict=True))
    Y = sum(w * delta @ g for (w, delta), g in zip(pairs, G, strict=True))
    return Y @ torch.linalg.pinv(S, rtol=1e-10, hermitian=True)


@pytest.mark.parametrize("ridge", [0.0, 0.1, 100.0])
def test_wudi_solves_the_normal_equations(ridge, adapters):
    result = merge(adapters, "wudi", weights=WEIGHTS, dtype=torch.float64, ridge=ridge)
    for module, update in result.modules.items():
        pairs = present(adapters, WEIGHTS, module)
        torch.testing.assert_close(update.delta(), dense_wudi(pairs, ridge), rtol=1e-7, atol=1e-7)
        summed = sum(math.copysign(1, w) * delta for w, delta in pairs)
        ratio = float(update.delta().norm() / summed.norm())
        assert result.report.layers[module].facts["norm_ratio"] == pytest.approx(ratio)


def test_wudi_is_a_minimum_that_gradient_descent_finds(equal_rank_adapters):
    first = equal_rank_adapters[0].modules[MODULE]
    modules = [LowRank(a.modules[MODULE].B, first.A) for a in equal_rank_adapters]  # they contradict each other
    pairs = [(w, u.delta()) for w, u in zip([0.5, 1.0, 2.0], modules, strict=True)]
    M = torch.zeros(24, 24, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([M], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = sum(w * ((M - d) @ d.T).square().sum() / d.norm() ** 2 for w, d in pairs)
        value.backward()
        return value

    optimiser.step(loss)
    members = [Adapter(f"m{i}", None, {MODULE: u}, torch.float64) for i, u in enumerate(modules)]
    got = merged(members, "wudi", [0.5, 1.0, 2.0])[MODULE]
    torch.testing.assert_close(got, M.detach(), rtol=1e-4, atol=1e-4)


def test_wudi_counts_equal_adapters_once_and_acts_on_independent_inputs_as_each_adapter(adapters):
    a, _, c = adapters
    for module, delta in merged([a, a, a], "wudi", [1, 2, 3]).items():
        torch.testing.assert_close(delta, a.modules[module].delta())
    both = merged([a, c], "wudi", [0.3, 0.9])[MODULE]
    for adapter in (a, c):
        inputs = adapter.modules[MODULE].A.T
        torch.testing.assert_close(both @ inputs, adapter.modules[MODULE].delta() @ inputs)


def test_a_cap_scales_a_large_result_down_and_leaves_a_small_one(adapters):
    nearly = Adapter(
        "nearly",
        None,
        {m: LowRank(u.B.flip(0), u.A + 1e-3 * torch.sin(u.A)) for m, u in adapters[0].modules.items()},
        torch.float64,
    )
    free, capped = (merge([adapters[0], nearly], "wudi", dtype=torch.float64, cap=cap) for cap in (None, 2.0))
    layer = capped.report.layers[MODULE]
    assert layer.facts["norm_ratio"] > 100  # the report says what it would have been
    summed = adapters[0].modules[MODULE].delta() + nearly.modules[MODULE].delta()
    assert capped.modules[MODULE].norm() == pytest.approx(2 * float(summed.norm()))
    expected = free.modules[MODULE].delta() * 2 / layer.facts["norm_ratio"]
    torch.testing.assert_close(capped.modules[MODULE].delta(), expected)
    loose = merge([adapters[0], nearly], "wudi", dtype=torch.float64, cap=1e9)
    torch.testing.assert_close(loose.modules[MODULE].delta(), free.modules[MODULE].delta())


def test_pico_equals_the_dense_version(adapters):
    result = merge(adapters, "pico", weights=WEIGHTS, dtype=torch.float64)
    for module, update in result.modules.items():
        pairs = present(adapters, WEIGHTS, module)
        parts = [torch.linalg.svd(delta, full_matrices=False) for _, delta in pairs]
        B = [U * S for U, S, _ in parts]
        U, S, _ = torch.linalg.svd(torch.cat(B, dim=1), full_matrices=False)
        a = 1 / (1 + (len(pairs) - 1) * S**2 / (S**2).sum())
        calibrated = [b + U * (a - 1) @ U.T @ b for b in B]
        M = sum(w * b @ part[2] for (w, _), b, part in zip(pairs, calibrated, parts, strict=True))
        gamma = sum(delta.norm() for _, delta in pairs) / len(pairs) / M.norm()
        torch.testing.assert_close(update.delta(), gamma * M)
        assert result.report.layers[module].facts["norm_restored_by"] == pytest.approx(float(gamma))


def test_pico_of_adapters_that_cancel_is_zero(adapters):
    minus = Adapter("minus", None, {m: u.scaled(-1.0) for m, u in adapters[0].modules.items()}, torch.float64)
    assert merged([adapters[0], minus], "pico", [1, 1])[MODULE].norm() < 1e-6


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ctm", {"beta": 1.5}),
        ("ctm", {"density": 0.0}),
        ("wudi", {"ridge": -1.0}),
        ("wudi", {"cap": 0.0}),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(method, options, adapters):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} .*must be"):
        merge(adapters, method, **options)
