"""Magnitude pruning and Breadcrumbs against dense float64 references and mergekit's functions."""

import pytest
import torch

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import merge

WEIGHTS = [0.7, -0.5, 0.9]


def dense(members, method, **options):
    """The merge at full rank: the matrices that the method comes to before they are brought to a rank."""
    result = merge(members, method, weights=WEIGHTS, rank="full", dtype=torch.float64, **options)
    return {module: update.delta() for module, update in result.modules.items()}


def expected(members, module, thin):
    present = [(a.modules[module].delta(), w) for a, w in zip(members, WEIGHTS, strict=True) if module in a.modules]
    return sum(w * thin(delta) for delta, w in present)


def crumbs(delta, density, gamma):
    """Keep the entries after the largest gamma; sizes sorted in full."""
    flat = delta.flatten()
    kept, top = int(density * flat.numel()), int(gamma * flat.numel())
    top = min(top, flat.numel() - kept)
    order = flat.abs().argsort(descending=True, stable=True)[top : top + kept]
    return torch.zeros_like(flat).scatter_(0, order, flat[order]).view_as(delta)


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_magnitude_equals_the_sum_of_what_mergekit_keeps(density, adapters):
    from mergekit.sparsify import magnitude

    for module, matrix in dense(adapters, "magnitude", density=density).items():
        wanted = expected(adapters, module, lambda delta: magnitude(delta, density))
        torch.testing.assert_close(matrix, wanted, rtol=1e-5, atol=1e-5)


def test_magnitude_at_full_density_is_the_weighted_sum(adapters, dense_sum):
    for module, matrix in dense(adapters, "magnitude", density=1.0).items():
        torch.testing.assert_close(matrix, dense_sum(adapters, WEIGHTS, module), rtol=1e-5, atol=1e-5)


def test_magnitude_of_less_than_one_entry_is_zero(adapters):
    result = merge(adapters, "magnitude", density=1e-4)
    assert all(update.norm() == 0 and update.rank == 1 for update in result.modules.values())


def test_magnitude_over_the_model_takes_entries_from_the_layer_that_has_the_large_ones(adapters):
    large = "model.layers.0.self_attn.v_proj"
    modules = {m: u.scaled(100.0) if m == large else u for m, u in adapters[0].modules.items()}
    member = Adapter("a", None, modules, torch.float64)
    sizes = {m: u.delta().numel() for m, u in modules.items()}
    share = 0.5 * sizes[large] / sum(sizes.values())
    result = merge([member], "magnitude", density=share, scope="model", rank="full", dtype=torch.float64).modules
    kept = {m: int((u.delta() != 0).sum()) for m, u in result.items()}
    assert kept == {m: int(share * sum(sizes.values())) if m == large else 0 for m in sizes}


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.01), (0.3, 0.0), (0.9, 0.5), (1.0, 0.2)])
def test_breadcrumbs_equals_the_dense_rule(density, gamma, adapters):
    for module, matrix in dense(adapters, "breadcrumbs", density=density, gamma=gamma).items():
        wanted = expected(adapters, module, lambda delta: crumbs(delta, density, gamma))
        torch.testing.assert_close(matrix, wanted, rtol=1e-5, atol=1e-5)


def test_breadcrumbs_keeps_what_mergekit_keeps_where_its_slice_is_right(adapters):
    from mergekit.sparsify import magnitude_outliers

    for module, matrix in dense(adapters, "breadcrumbs", density=0.5, gamma=0.1).items():
        wanted = expected(adapters, module, lambda delta: magnitude_outliers(delta, 0.5, gamma=0.1))
        torch.testing.assert_close(matrix, wanted, rtol=1e-5, atol=1e-5)


def test_breadcrumbs_over_the_model_removes_the_outliers_of_all_layers_together(adapters):
    options = {"density": 0.5, "gamma": 0.05}
    member = adapters[0]
    modules = sorted(member.modules)
    flat = torch.cat([member.modules[m].delta().flatten() for m in modules])
    wanted = dict(
        zip(
            modules,
            crumbs(flat, **options).split([member.modules[m].delta().numel() for m in modules]),
            strict=True,
        )
    )
    result = merge([member], "breadcrumbs", scope="model", rank="full", dtype=torch.float64, **options).modules
    for module, update in result.items():
        torch.testing.assert_close(update.delta().flatten(), wanted[module], rtol=1e-5, atol=1e-5)


def test_breadcrumbs_with_an_election_adds_up_what_agrees(adapters):
    module = "model.layers.0.self_attn.q_proj"
    got = dense(adapters, "breadcrumbs", density=0.6, gamma=0.05, election="total")[module]
    votes = torch.stack(
        [w * crumbs(a.modules[module].delta(), 0.6, 0.05) for a, w in zip(adapters, WEIGHTS, strict=True)]
    )
    wanted = torch.where(votes.sign() == votes.sum(0).sign(), votes, 0.0).sum(0)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [-0.1, 1.0, float("nan")])
def test_a_share_of_outliers_that_is_none_is_refused(gamma, adapters):
    with pytest.raises(ValueError, match=r"gamma is the share of entries to remove as outliers and must be in \[0, 1"):
        merge(adapters, "breadcrumbs", gamma=gamma)


@pytest.mark.parametrize("method", ["magnitude", "ties", "breadcrumbs", "dare_linear", "dare_ties", "della", "pcb"])
def test_adapters_that_change_nothing_merge_to_nothing(method):
    idle = LowRank(torch.zeros(12, 2), torch.ones(2, 9))
    result = merge([Adapter("a", None, {"layer": idle}), Adapter("b", None, {"layer": idle})], method)
    assert result.modules["layer"].norm() == 0 and torch.isfinite(result.modules["layer"].A).all()


@pytest.mark.parametrize("method", ["magnitude", "ties", "breadcrumbs", "dare_linear", "dare_ties", "della", "pcb"])
@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan")])
def test_a_density_that_is_no_share_is_refused(method, density, adapters):
    with pytest.raises(ValueError, match=r"density is the share of entries to keep and must be in \(0, 1\], got"):
        merge(adapters, method, density=density)
