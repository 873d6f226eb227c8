"""TIES against a dense float64 reference written straight from the rule, and its parts one by one."""

import pytest
import torch

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import entrywise, merge, streaming

WEIGHTS = [0.7, -0.5, 0.9]


def dense_ties(deltas, weights, density, election, normalise):
    """Trim, elect, merge on whole matrices; entries sorted by size, first come first kept."""
    kept = []
    for delta in deltas:
        flat = delta.flatten()
        order = flat.abs().argsort(descending=True, stable=True)[: int(density * flat.numel())]
        trimmed = torch.zeros_like(flat)
        trimmed[order] = flat[order]
        kept.append(trimmed.view_as(delta))
    weighted = torch.stack([w * d for w, d in zip(weights, kept, strict=True)])
    shares = torch.stack([abs(w) * torch.ones_like(d) for w, d in zip(weights, kept, strict=True)])
    votes = weighted if election == "total" else shares * weighted.sign()
    sign = votes.sum(0).sign()
    agrees = (weighted.sign() == sign) & (weighted != 0)
    total = (weighted * agrees).sum(0)
    return total if normalise == "sum" else total / (shares * agrees).sum(0).clamp(min=1e-30)


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize("normalise", ["mean", "sum"])
@pytest.mark.parametrize("block", [streaming.BLOCK_ENTRIES, 50])
def test_streamed_ties_equals_the_dense_rule(density, election, normalise, block, adapters, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_ENTRIES", block)
    options = {"density": density, "election": election, "normalise": normalise}
    merged = merge(adapters, "ties", weights=WEIGHTS, rank="full", dtype=torch.float64, **options)
    assert merged.report.energy_dropped == 0
    for module, update in merged.modules.items():
        present = [
            (a.modules[module].delta(), w) for a, w in zip(adapters, WEIGHTS, strict=True) if module in a.modules
        ]
        expected = dense_ties(*zip(*present, strict=True), density, election, normalise)
        torch.testing.assert_close(update.delta(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalise", ["mean", "sum"])
def test_ties_over_the_model_equals_the_rule_on_each_adapter_as_one_long_vector(normalise, adapters):
    options = {"density": 0.3, "scope": "model", "normalise": normalise}
    merged = merge(adapters, "ties", weights=WEIGHTS, rank="full", dtype=torch.float64, **options).modules
    kept = {}
    for adapter in adapters:
        modules = sorted(adapter.modules)
        flat = torch.cat([adapter.modules[m].delta().flatten() for m in modules])
        flat[flat.abs().argsort(descending=True, stable=True)[int(0.3 * len(flat)) :]] = 0
        sizes = [adapter.modules[m].delta().numel() for m in modules]
        kept[adapter.name] = dict(zip(modules, flat.split(sizes), strict=True))
    for module, update in merged.items():
        present = [(kept[a.name][module], w) for a, w in zip(adapters, WEIGHTS, strict=True) if module in a.modules]
        expected = dense_ties(*zip(*present, strict=True), 1.0, "total", normalise).view(update.shape)
        torch.testing.assert_close(update.delta(), expected, rtol=1e-5, atol=1e-5)


def test_ties_agrees_with_mergekit_where_no_election_is_drawn():
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import magnitude

    generator = torch.Generator().manual_seed(4)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    members = [Adapter(f"m{i}", None, {"layer": LowRank(draw(30, 3), draw(3, 20))}, torch.float64) for i in range(3)]
    weights = torch.tensor([0.7, 0.4, 0.9], dtype=torch.float64)[:, None, None]
    got = merge(members, "ties", weights=weights.flatten().tolist(), density=0.5, rank="full", dtype=torch.float64)
    deltas = weights * torch.stack([magnitude(a.modules["layer"].delta(), 0.5) for a in members])
    mask = get_mask(deltas, "sum")
    divisor = (weights * mask).sum(0)
    expected = (deltas * mask).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    torch.testing.assert_close(got.modules["layer"].delta(), expected, rtol=1e-5, atol=1e-5)


def test_ties_of_agreeing_adapters_at_full_density_is_their_weighted_mean(dense_sum):
    generator = torch.Generator().manual_seed(0)
    positive = [
        Adapter(
            f"p{i}",
            None,
            {"layer": LowRank(torch.rand(16, 2, generator=generator), torch.rand(2, 20, generator=generator))},
        )
        for i in range(3)
    ]
    got = merge(positive, "ties", weights=[1, 2, 5], density=1.0, dtype=torch.float64).modules["layer"].delta()
    torch.testing.assert_close(got, dense_sum(positive, [1, 2, 5], "layer") / 8, rtol=1e-5, atol=1e-5)


def test_a_drawn_election_gives_zero():
    update = LowRank(torch.ones(3, 1), torch.ones(1, 5))
    opposite = Adapter("minus", None, {"layer": update.scaled(-1.0)})
    result = merge([Adapter("plus", None, {"layer": update}), opposite], "ties", density=1.0)
    assert result.modules["layer"].norm() == 0


def test_the_sign_of_a_sum_that_is_rounding_only_is_no_sign():
    ballot = entrywise.Ballot(torch.zeros(1, 2).double())
    for votes in ([[0.1, 1.0]], [[0.2, 1.0]], [[-0.3, -1.0]]):
        ballot.add(torch.tensor(votes, dtype=torch.float64))
    assert ballot.total[0, 0] != 0
    assert ballot.sign().tolist() == [[0.0, 1.0]]


def test_the_report_says_how_much_of_the_entries_was_outvoted():
    one = lambda value: LowRank(torch.full((3, 1), value), torch.ones(1, 5))
    members = [Adapter("plus", None, {"layer": one(3.0)}), Adapter("minus", None, {"layer": one(-1.0)})]
    assert merge(members, "ties", density=1.0).report.facts["outvoted"] == pytest.approx(0.25)


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan")])
def test_a_density_that_is_no_share_is_refused(density, adapters):
    with pytest.raises(ValueError, match=r"density is the share of entries to keep and must be in \(0, 1\]"):
        merge(adapters, "ties", density=density)


def test_a_scope_that_does_not_exist_is_refused(adapters):
    with pytest.raises(ValueError, match="scope of ties must be one of module, model, got 'layer'"):
        merge(adapters, "ties", scope="layer")
