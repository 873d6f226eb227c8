"""What streams dense updates: rows, exact thresholds over a layer or all of them, and the way back to a rank."""

import math

import numpy as np
import pytest
import torch

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import streaming, thresholds
from moa.merging.layers import Layers
from moa.merging.parallel import in_turn, using_threads
from moa.merging.streaming import DenseRows, approximated, beginning, recompressed, spanned_rank
from moa.merging.thresholds import Cut, thinnings, trims


def update(o, n, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    return LowRank(draw(o, rank), draw(rank, n))


def ones(o=4, n=6):
    return LowRank(torch.ones(o, 1, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64))


def weights(*values):
    return torch.tensor(values, dtype=torch.float64)


def layers_of(*adapters):
    """The adapters, each a dictionary of updates, as the layers of one merge."""
    shapes = {name: u.shape for modules in adapters for name, u in modules.items()}
    members = [Adapter(str(i), None, modules, torch.float64) for i, modules in enumerate(adapters)]
    return Layers(members, torch.ones(len(members), dtype=torch.float64), dict(sorted(shapes.items())))


def thinned(dense, thin):
    """All rows of all updates after thinning, by adapter."""
    return {i: torch.cat([thin[i](dense.rows(i, block)) for block in dense.blocks()]) for i in dense}


def largest(flat, count):
    """A flat vector cut to its largest entries; of equal ones, the first."""
    kept = torch.zeros_like(flat)
    order = flat.abs().argsort(descending=True, stable=True)[:count]
    kept[order] = flat[order]
    return kept


@pytest.mark.parametrize("block", [streaming.BLOCK_ENTRIES, 100, 1])
def test_rows_are_those_of_the_weighted_updates_whatever_the_block(block, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_ENTRIES", block)
    updates = [update(17, 12, 3, 0), LowRank.zero((17, 12), torch.float64), update(17, 12, 2, 1).scaled(0.0)]
    dense = DenseRows([*updates, update(17, 12, 2, 2)], weights(0.5, 1, 1, -2))
    assert list(dense) == [0, 3]
    for i, w in ((0, 0.5), (3, -2)):
        got = torch.cat([dense.rows(i, rows) for rows in dense.blocks()])
        torch.testing.assert_close(got.double(), w * [*updates, update(17, 12, 2, 2)][i].delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("sample", [400, 10**9])
def test_a_thinned_layer_keeps_exactly_its_largest_entries(density, sample, monkeypatch):
    monkeypatch.setattr(thresholds, "LAYER_SAMPLE", sample)
    monkeypatch.setattr(streaming, "BLOCK_ENTRIES", 1000)
    dense = DenseRows([update(150, 90, 4, 0), update(150, 90, 2, 1)], weights(1, 0.3))
    whole = {i: torch.cat([dense.rows(i, rows) for rows in dense.blocks()]) for i in dense}
    for i, kept in thinned(dense, thinnings(dense, Cut(density))).items():
        expected = largest(whole[i].flatten(), int(density * 150 * 90)).view(150, 90)
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("sample", [500, 10**9])
def test_a_threshold_over_the_model_is_that_of_one_long_vector(sample, monkeypatch):
    monkeypatch.setattr(thresholds, "MODEL_SAMPLE", sample)
    first = {"a": update(60, 40, 3, 0).scaled(3.0), "b": update(20, 80, 3, 1)}
    second = {"b": update(20, 80, 3, 2)}
    layers = layers_of(first, second)
    dense = {module: DenseRows(updates, layers.weights) for module, updates in layers.items()}
    got = {m: thinned(d, thinnings(d, Cut(0.15), layers, m)) for m, d in dense.items()}
    whole = torch.cat([first["a"].delta().flatten(), first["b"].delta().flatten()]).float()
    expected = largest(whole, int(0.15 * len(whole)))
    torch.testing.assert_close(torch.cat([got["a"][0].flatten(), got["b"][0].flatten()]), expected)
    alone = largest(second["b"].delta().flatten().float(), int(0.15 * 1600))
    torch.testing.assert_close(got["b"][1].flatten(), alone)


def test_a_bracket_that_misses_is_widened_until_it_holds_the_threshold(monkeypatch):
    monkeypatch.setattr(thresholds, "DEVIATIONS", 0.05)
    dense = DenseRows([update(200, 100, 4, 0)], weights(1))
    passes = []
    ((trim,),) = trims(
        lambda work: passes.append(1) or [("layer", work("layer", dense))], Cut(0.2), 200 * 100, 300
    ).values()
    sizes = torch.cat([dense.rows(0, rows) for rows in dense.blocks()]).abs().flatten()
    assert trim.size == float(sizes.sort(descending=True).values[int(0.2 * len(sizes)) - 1])
    assert len(passes) > 2  # one to draw the sample, one with the first bracket, and more


@pytest.mark.parametrize("count", [1, 49, 50])
def test_a_sample_that_was_rounded_to_below_all_entries_finds_the_threshold_all_the_same(count):
    below, size = np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1))
    search = thresholds.Search(0, count, 50, np.full(50, below), floor=0.0)
    thresholds.settle([search], lambda see: see("layer", 0, np.full(50, size)))
    assert search.size == size and search.trim("layer").ties == count


def test_entries_of_equal_size_are_kept_in_the_order_of_rows_and_columns(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_ENTRIES", 6)
    dense = DenseRows([ones()], weights(1))
    (kept,) = thinned(dense, thinnings(dense, Cut(0.4))).values()  # floor(0.4 * 24) = 9 entries
    assert kept.flatten().nonzero().flatten().tolist() == list(range(9))


def test_entries_of_equal_size_are_kept_in_the_order_of_layers():
    layers = layers_of({"a": ones(), "b": ones(), "c": ones()})
    dense = DenseRows([ones()], weights(1))
    counts = [
        int((thinned(dense, thinnings(dense, Cut(0.5), layers, m))[0] != 0).sum()) for m in layers
    ]  # half of 72 entries
    assert counts == [24, 12, 0]


def test_an_update_of_mostly_zeros_keeps_what_it_has_and_its_zeros_are_never_held(monkeypatch):
    sparse = update(300, 40, 2, 0)
    sparse.B[3:] = 0
    dense = DenseRows([sparse], weights(1))
    held = []
    see = thresholds.Search.see
    monkeypatch.setattr(
        thresholds.Search, "see", lambda self, m, v: (see(self, m, v), held.append(len(self.inside[m][-1])))
    )
    (kept,) = thinned(dense, thinnings(dense, Cut(0.5))).values()
    torch.testing.assert_close(kept.double(), sparse.delta(), rtol=1e-5, atol=1e-5)
    assert sum(held) <= 3 * 40


def test_the_directions_that_updates_span_are_counted_once():
    a, b = update(30, 20, 3, 0), update(30, 20, 4, 1)
    assert spanned_rank([a, b]) == 7
    assert spanned_rank([a, b, a.scaled(2.0)]) == 7
    assert spanned_rank([LowRank.zero((30, 20))]) == 1


def merged_by_entries(updates):
    """The entries of the sum that are as large as the largest fifth, float32: a matrix that leaves their span."""
    total = sum(u.delta() for u in updates)
    return torch.where(total.abs() >= total.abs().quantile(0.8), total, 0.0).float()


def missed(matrix, approximation, rank):
    """Share of the best energy at a rank, by a dense SVD, that an approximation does not keep."""
    best = float(torch.linalg.svdvals(matrix.double())[:rank].square().sum())
    error = float((matrix.double() - approximation.delta()).square().sum())
    return (error - float(matrix.double().square().sum())) / best + 1


@pytest.mark.parametrize(("shape", "ranks"), [((420, 500), (6, 6, 6, 6)), ((500, 420), (2, 4, 8, 3, 5))])
def test_at_the_rank_that_the_updates_span_next_to_nothing_of_the_best_energy_is_missed(shape, ranks):
    updates = [update(*shape, rank, seed) for seed, rank in enumerate(ranks)]
    matrix, rank = merged_by_entries(updates), sum(ranks)
    assert missed(matrix, recompressed(matrix, updates, None, seed=0).update, rank) < 1e-5
    random = torch.randn(shape[1], rank + 16, generator=torch.Generator().manual_seed(0))
    assert missed(matrix, approximated(matrix, random, rank), rank) > 1e-4


@pytest.mark.parametrize(("rank", "bound"), [(2, 2e-3), (4, 2e-3), (12, 1e-5), (30, 5e-3), (48, 1e-2)])
def test_below_and_above_the_rank_that_the_updates_span_little_of_the_best_energy_is_missed(rank, bound):
    updates = [update(420, 500, 6, seed) for seed in range(4)]
    matrix = merged_by_entries(updates)
    assert missed(matrix, recompressed(matrix, updates, rank, seed=0).update, rank) < bound


@pytest.mark.parametrize("rank", [3, 12])
def test_order_factors_and_updates_of_zero_do_not_matter_to_a_large_layer(rank):
    updates = [update(300, 260, 4, seed) for seed in range(3)]
    matrix = merged_by_entries(updates)
    expected = recompressed(matrix, updates, rank, seed=0).update.delta()
    G = torch.eye(4, dtype=torch.float64) + 0.5 * torch.ones(4, 4, dtype=torch.float64).triu()
    a, b, c = updates
    refactored = LowRank(a.B @ torch.linalg.inv(G), G @ a.A)
    idle = LowRank(0 * b.B, update(300, 260, 4, 9).A)
    for same in ([c, a, b], [refactored, b, c], [a, idle, b, c]):
        got = recompressed(matrix, same, rank, seed=0).update.delta()
        assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("shape", [(200, 260), (260, 200)])
def test_a_large_layer_is_recompressed_near_the_best_rank_repeatably_and_leaves_the_global_generator_alone(shape):
    o, n = shape
    torch.manual_seed(3)
    matrix = torch.randn(o, 12) @ torch.diag(torch.logspace(0, -3, 12)) @ torch.randn(12, n)
    matrix += 1e-3 * torch.randn(o, n)
    state = torch.get_rng_state()
    once, twice = (recompressed(matrix, [update(o, n, 4, 0)], 6, seed=5) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(once.update.B, twice.update.B)
    best = torch.linalg.svdvals(matrix.double())[6:].square().sum()
    assert once.dropped == pytest.approx(float(best), rel=1e-3)
    error = (matrix.double() - once.update.delta()).square().sum()
    assert once.dropped == pytest.approx(float(error), rel=1e-3)


def test_layers_recompressed_at_the_same_time_are_what_each_is_alone():
    matrix = torch.randn(90, 80, generator=torch.Generator().manual_seed(0))
    seeds = {str(seed): seed for seed in range(120)}
    once = lambda seed: recompressed(matrix, [update(90, 80, 2, 0)], 4, seed).update.B
    alone = [once(seed) for seed in seeds.values()]
    with using_threads(4):
        together = list(in_turn(lambda name: once(seeds[name]), list(seeds)))
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_at_the_full_rank_a_matrix_is_kept_to_the_last_bit(shape):
    matrix = 1e-4 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    merged = recompressed(matrix, [update(*shape, 2, 0)], 30, seed=0)
    assert merged.dropped == 0 and merged.update.rank == 30
    assert torch.equal(merged.update.delta(), matrix.double())
    sizes = [float(factor.abs().max()) for factor in (merged.update.B, merged.update.A)]
    assert math.isclose(*sizes, rel_tol=2.1)  # no factor takes the whole range of a half-precision dtype


@pytest.mark.parametrize("size", [10, 400])
@pytest.mark.parametrize("rank", [None, 3, "full"])
@pytest.mark.parametrize("updates", [0, 1])
def test_a_matrix_of_zeros_is_recompressed_to_zeros(size, rank, updates):
    given = [LowRank.zero((size, size)), *(update(size, size, 2, seed) for seed in range(updates))]
    merged = recompressed(torch.zeros(size, size), given, size if rank == "full" else rank, seed=0)
    assert merged.update.norm() == 0 and merged.dropped == 0


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_very_small_and_very_large_updates_have_a_beginning(size):
    start = beginning([update(90, 80, 9, 0).scaled(size), update(90, 80, 9, 1).scaled(size)], 16, seed=0)
    assert torch.isfinite(start).all()
    assert torch.linalg.matrix_rank(start) == 16


def test_factors_that_cancel_are_no_update():
    one = update(6, 5, 2, seed=1)
    cancelling = LowRank(torch.cat([one.B, -one.B], dim=1), torch.cat([one.A, one.A]))
    zero = LowRank(0 * one.B, one.A)
    assert list(DenseRows([cancelling, one, zero], weights(1, 1, 1))) == [1]
