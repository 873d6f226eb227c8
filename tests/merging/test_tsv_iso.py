"""TSV-Merge, Iso-C and Iso-CTS against dense float64 versions of the papers' formulas."""

import pytest
import torch

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import merge
from moa.merging.spectral import svd_of_factors
from moa.merging.subspace import partial_isometry

WEIGHTS = [0.7, -0.5, 0.9]


def merged(adapters, method, weights=WEIGHTS, **options):
    result = merge(adapters, method, weights=weights, dtype=torch.float64, **options)
    return {module: update.delta() for module, update in result.modules.items()}


def weighted_deltas(adapters, weights, module):
    pairs = zip(adapters, weights, strict=True)
    return [w * a.modules[module].delta() for a, w in pairs if module in a.modules]


def dense_svd(matrix, rank=None):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((1e-6 * S[0] < S).sum()) if rank is None else rank
    return U[:, :rank], S[:rank], Vh[:rank].T


def polar(X):
    """X (X^T X)^(-1/2), zero on the null space."""
    values, vectors = torch.linalg.eigh(X.T @ X)
    roots = torch.where(values > 1e-10 * values[-1], values, torch.inf).rsqrt()
    return X @ (vectors * roots) @ vectors.T


def orthogonal_adapters(ranks=(2, 3), o=12, n=15):
    """Adapters that share no direction of input or output."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    writes, reads = (torch.linalg.qr(draw(size, sum(ranks))).Q.split(ranks, dim=1) for size in (o, n))
    pairs = zip(ranks, writes, reads, strict=True)
    return [Adapter(f"r{r}", None, {"layer": LowRank(W @ draw(r, r), draw(r, r) @ R.T)}) for r, W, R in pairs]


def test_tsv_equals_the_dense_version(adapters):
    for module, delta in merged(adapters, "tsv").items():
        parts = [dense_svd(D) for D in weighted_deltas(adapters, WEIGHTS, module)]
        U, S, V = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
        torch.testing.assert_close(delta, polar(U) * S @ polar(V).T, rtol=1e-8, atol=1e-8)


def test_tsv_without_shared_directions_uses_the_polar_factor_of_scipy(adapters):
    from scipy.linalg import polar as scipy_polar

    two = [adapters[0], adapters[2]]
    module = "model.layers.0.self_attn.q_proj"
    parts = [dense_svd(D) for D in weighted_deltas(two, [1, 1], module)]
    U, S, V = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    left, right = (torch.from_numpy(scipy_polar(side.numpy())[0]) for side in (U, V))
    torch.testing.assert_close(merged(two, "tsv", [1, 1])[module], left * S @ right.T)


def test_tsv_of_adapters_with_one_frozen_a_does_not_depend_on_their_order(equal_rank_adapters):
    first = equal_rank_adapters[0].modules
    frozen = [
        Adapter(a.name, None, {m: LowRank(u.B, first[m].A) for m, u in a.modules.items()}, torch.float64)
        for a in equal_rank_adapters
    ]
    forward, backward = merged(frozen, "tsv"), merged(frozen[::-1], "tsv", WEIGHTS[::-1])
    for module, delta in forward.items():
        torch.testing.assert_close(backward[module], delta)


@pytest.mark.parametrize("method", ["tsv", "wudi"])
def test_orthogonal_adapters_are_added_up(method, dense_sum):
    pair = orthogonal_adapters()
    torch.testing.assert_close(merged(pair, method, [1, -1])["layer"], dense_sum(pair, [1, -1], "layer"))


def test_a_partial_isometry_leaves_out_directions_that_are_not_there():
    unit = torch.eye(4, dtype=torch.float64)[:, :2]
    twice = torch.cat([unit[:, :1], unit[:, :1], unit[:, 1:]], dim=1)
    P = partial_isometry(twice)
    torch.testing.assert_close(P @ P.T, unit @ unit.T)
    torch.testing.assert_close(P[:, 0], P[:, 1])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_iso_c_evens_out_the_singular_values_of_the_sum(beta, adapters, dense_sum):
    for module, delta in merged(adapters, "iso_c", beta=beta).items():
        U, S, V = dense_svd(dense_sum(adapters, WEIGHTS, module))
        torch.testing.assert_close(delta, U * ((1 - beta) * S + beta * S.mean()) @ V.T)


def test_iso_c_chooses_the_rank_before_it_evens_out(adapters, dense_sum):
    result = merge(adapters, "iso_c", weights=WEIGHTS, rank=3, dtype=torch.float64)
    for module, update in result.modules.items():
        whole = dense_sum(adapters, WEIGHTS, module)
        U, S, V = dense_svd(whole, 3)
        torch.testing.assert_close(update.delta(), S.mean() * U @ V.T)
        layer = result.report.layers[module]
        dropped = whole.norm() ** 2 - S.norm() ** 2
        assert layer.dropped == pytest.approx(float(dropped / (dropped + 3 * S.mean() ** 2)))
        assert layer.facts["norm_ratio"] == pytest.approx(float(3**0.5 * S.mean() / whole.norm()))


def dense_iso_cts(deltas, common):
    """The published code, with K directions for min(o, n), in the order common, then each task."""
    U_sum, S_sum, V_sum = dense_svd(sum(deltas))
    K, N = len(S_sum), len(deltas)
    t = max(1, round((K - int(common * K)) / N))
    U, S, V = [U_sum[:, : K - N * t]], [S_sum[: K - N * t]], [V_sum[:, : K - N * t]]
    for delta in deltas:
        alone = dense_svd(delta - U[0] @ U[0].T @ delta, t)
        for chosen, part in zip((U, S, V), alone, strict=True):
            chosen.append(part)
    U, S, V = (torch.cat(part, dim=-1) for part in (U, S, V))
    return S.mean() * polar(U) @ polar(V).T


@pytest.mark.parametrize("common", [0.3, 0.8])
def test_iso_cts_equals_the_dense_version(common, adapters):
    for module, delta in merged(adapters, "iso_cts", common=common).items():
        expected = dense_iso_cts(weighted_deltas(adapters, WEIGHTS, module), common)
        torch.testing.assert_close(delta, expected, rtol=1e-8, atol=1e-8)


def test_iso_cts_without_room_for_the_tasks_is_iso_c(adapters):
    result = merge(adapters, "iso_cts", weights=WEIGHTS, rank=3, dtype=torch.float64)
    common = merged(adapters, "iso_c", rank=3)
    crowded = [module for module, layer in result.report.layers.items() if layer.facts["directions_per_task"] == 0]
    assert len(crowded) == 2  # in the third layer one adapter is missing
    for module in crowded:
        torch.testing.assert_close(result.modules[module].delta(), common[module])


@pytest.mark.parametrize("option", [("iso_c", "beta", -0.1), ("iso_c", "beta", 1.1), ("iso_cts", "common", 0.0)])
def test_an_option_that_makes_no_sense_is_refused(option, adapters):
    method, name, value = option
    with pytest.raises(ValueError, match=f"{name} is .* must be in .* got {value}"):
        merge(adapters, method, **{name: value})


def test_what_is_rounding_beside_the_terms_that_cancelled_is_no_direction():
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(9, 3, generator=generator).double(), torch.randn(3, 7, generator=generator).double()
    left = LowRank(B * torch.tensor([1.0, 1e-3, 1e-9]), A)
    size = torch.linalg.svdvals(left.delta())
    assert len(svd_of_factors(left).S) == 2
    torch.testing.assert_close(svd_of_factors(left).S, size[:2], rtol=1e-9, atol=0)
    assert len(svd_of_factors(left, size=float(size[0]) * 1e4).S) == 1
    assert len(svd_of_factors(left, size=float(size[0]) * 1e7).S) == 0
