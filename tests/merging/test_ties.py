"""TIES against a dense float64 reference written straight from the rule, and its parts one by one."""

import pytest
import torch

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import elementwise, entrywise, merge

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


def full_rank_ties(adapters, **options):
    """TIES without the loss of a rank: what the streamed rows come to before they are recompressed."""
    held = {}

    def keep(matrix, rank, seed):
        held["matrix"] = matrix.clone()
        return elementwise.Merged(LowRank(matrix.double(), torch.eye(matrix.shape[1]).double()))

    original, elementwise.recompressed = elementwise.recompressed, keep
    try:
        result = merge(adapters, "ties", weights=WEIGHTS, dtype=torch.float64, **options)
    finally:
        elementwise.recompressed = original
    return {module: update.delta() for module, update in result.modules.items()}


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize("normalise", ["mean", "sum"])
@pytest.mark.parametrize("block", [4_000_000, 150])
def test_streamed_ties_equals_the_dense_rule(density, election, normalise, block, adapters, monkeypatch):
    monkeypatch.setattr(elementwise, "BLOCK_ENTRIES", block)
    got = full_rank_ties(adapters, density=density, election=election, normalise=normalise)
    for module, matrix in got.items():
        present = [
            (a.modules[module].delta(), w) for a, w in zip(adapters, WEIGHTS, strict=True) if module in a.modules
        ]
        expected = dense_ties(*zip(*present, strict=True), density, election, normalise)
        torch.testing.assert_close(matrix, expected, rtol=1e-5, atol=1e-5)


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


def test_entries_of_equal_size_are_kept_in_the_order_of_rows_and_columns():
    ones = LowRank(torch.ones(4, 1, dtype=torch.float64), torch.ones(1, 6, dtype=torch.float64))
    (rows,) = [deltas[0] for _, deltas in elementwise.trimmed_rows([ones], 0.4)]  # floor(0.4 * 24) = 9 entries
    assert rows.flatten().nonzero().flatten().tolist() == list(range(9))


def test_entries_of_equal_size_are_counted_across_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(elementwise, "BLOCK_ENTRIES", 6)
    ones = LowRank(torch.ones(4, 1, dtype=torch.float64), torch.ones(1, 6, dtype=torch.float64))
    blocks = [deltas[0] for _, deltas in elementwise.trimmed_rows([ones], 0.4)]
    assert len(blocks) == 4
    assert torch.cat(blocks).flatten().nonzero().flatten().tolist() == list(range(9))


def test_a_drawn_election_gives_zero():
    update = LowRank(torch.ones(3, 1), torch.ones(1, 5))
    opposite = Adapter("minus", None, {"layer": update.scaled(-1.0)})
    result = merge([Adapter("plus", None, {"layer": update}), opposite], "ties", density=1.0)
    assert result.modules["layer"].norm() == 0


def test_the_sign_of_a_sum_that_is_rounding_only_is_no_sign():
    votes = torch.tensor([[[0.1, 1.0]], [[0.2, 1.0]], [[-0.3, -1.0]]])
    assert entrywise.elected_sign(votes).tolist() == [[0.0, 1.0]]


def test_a_large_layer_is_recompressed_near_the_best_rank_repeatably_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    matrix = torch.randn(200, 12) @ torch.diag(torch.logspace(0, -3, 12)) @ torch.randn(12, 260)
    matrix += 1e-3 * torch.randn(200, 260)
    state = torch.get_rng_state()
    once, twice = (elementwise.recompressed(matrix, 6, seed=5) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(once.update.B, twice.update.B)
    best = torch.linalg.svdvals(matrix.double())[6:].square().sum()
    assert once.dropped == pytest.approx(float(best), rel=1e-3)
    error = (matrix.double() - once.update.delta()).square().sum()
    assert once.dropped == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan")])
def test_a_density_that_is_no_share_is_refused(density, adapters):
    with pytest.raises(ValueError, match=r"density is the share of entries to keep and must be in \(0, 1\]"):
        merge(adapters, "ties", density=density)
