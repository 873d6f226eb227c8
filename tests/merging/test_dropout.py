"""DARE, DELLA and rank-DARE: what they keep, that they are right on average, and how large their noise is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moa.adapters import Adapter, read_adapter
from moa.low_rank import LowRank
from moa.merging import dropout, find_method, merge, streaming
from moa.merging.dropout import Draws, DropBySize, RandomDrop, nearest_chance

WEIGHTS = [0.7, -0.5, 0.9]
LAYER = "model.layers.0.self_attn.q_proj"


def one(method, adapters, seeds, rank=24, **options):
    """One layer's merge by the method's function itself."""
    updates = [a.modules[LAYER] for a in adapters]
    options = find_method(method).given(rank=rank, seed=0, seeds=seeds, module=LAYER, layers=None) | options
    return find_method(method).function(updates, torch.tensor(WEIGHTS).double(), **options).update.delta()


@pytest.mark.parametrize("chance", [2**-16, 0.1, 0.5, 0.9, 1 - 2**-16, 1.0])
def test_draws_keep_with_their_chance_and_the_same_however_many_are_drawn_at_a_time(chance):
    whole = Draws(3).kept((2000, 51), chance)
    split = Draws(3)
    assert torch.equal(whole, torch.cat([split.kept((rows, 51), chance) for rows in (1, 700, 1299)]))
    assert set(whole.unique().tolist()) <= {0.0, 1.0}
    assert abs(whole.mean() - chance) <= 5 * (chance * (1 - chance) / whole.numel()) ** 0.5
    assert torch.equal(whole, Draws(3).kept((2000, 51), torch.full((2000, 51), chance)))


def test_whether_an_entry_is_kept_is_decided_by_its_own_16_bits():
    words = np.random.SFC64(5).random_raw((7, 2))
    bits = [[(int(word) >> shift) % 2**16 for word in row for shift in (0, 16, 32, 48)][:6] for row in words]
    for chance in (0.25, 2**-3 + 2**-16):
        wanted = [[float(value < chance * 2**16) for value in row] for row in bits]
        assert Draws(5).kept((7, 6), chance).tolist() == wanted


def test_a_chance_is_the_nearest_that_16_bits_have_and_never_none():
    assert [nearest_chance(p) for p in (0.5, 1.0, 1e-9)] == [0.5, 1.0, 2**-16]
    assert abs(nearest_chance(0.2) - 0.2) <= 2**-17 and nearest_chance(0.2) * 2**16 == 13107


def test_a_density_that_is_no_multiple_is_divided_by_the_chance_that_was_drawn(adapters):
    delta = WEIGHTS[0] * adapters[0].modules[LAYER].delta()
    nothing = [Adapter("z", None, {LAYER: LowRank.zero((24, 24))})] * 2
    got = one("dare_linear", [adapters[0], *nothing], [5, 6, 7], density=5.4e-5)
    kept = got.abs() > 0.1 * delta.abs()
    torch.testing.assert_close(got[kept], delta[kept] * 2**16 / 4, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_the_size_of_the_blocks_does_not_change_what_is_drawn(method, adapters, monkeypatch):
    merged = one(method, adapters, [1, 2, 3])
    monkeypatch.setattr(streaming, "BLOCK_ENTRIES", 50)
    torch.testing.assert_close(one(method, adapters, [1, 2, 3]), merged, rtol=1e-5, atol=1e-5)


def test_other_adapters_do_not_change_what_an_adapter_draws(adapters):
    alone = merge(adapters[:1], "dare_linear", weights=[1.0], rank="full", dtype=torch.float64).modules
    idle = Adapter("idle", adapters[0].base_model, {m: u.scaled(0.0) for m, u in adapters[1].modules.items()})
    beside = merge([idle, adapters[0]], "dare_linear", weights=[1.0, 1.0], rank="full", dtype=torch.float64).modules
    assert all(torch.equal(alone[m].delta(), beside[m].delta()) for m in alone)


def test_an_entry_is_dropped_or_divided_by_the_density(adapters):
    delta = WEIGHTS[0] * adapters[0].modules[LAYER].delta()
    got = one("dare_linear", [adapters[0], *[Adapter("z", None, {LAYER: LowRank.zero((24, 24))})] * 2], [5, 6, 7])
    kept = got != 0
    torch.testing.assert_close(got[kept], delta[kept] / 0.5, rtol=1e-5, atol=1e-6)
    assert 0.4 < kept.double().mean() < 0.6


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dare_linear", {"density": 0.3}),
        ("dare_rank", {"density": 0.3}),
        ("della", {"density": 0.4, "epsilon": 0.2, "election": "none"}),
    ],
)
def test_on_average_nothing_changes(method, options, adapters, dense_sum):
    wanted = dense_sum(adapters, WEIGHTS, LAYER)
    draws = [one(method, adapters, [3 * t, 3 * t + 1, 3 * t + 2], **options) for t in range(60)]
    noise = torch.stack(draws).var(dim=0).sum()
    error = (torch.stack(draws).mean(dim=0) - wanted).square().sum()
    assert error < 2 * noise / len(draws)  # the error of a mean of so many draws, and no bias on top


@pytest.mark.parametrize("method", ["dare_linear", "dare_rank"])
def test_the_noise_is_as_large_as_the_report_says(method, adapters, dense_sum):
    wanted = dense_sum(adapters, WEIGHTS, LAYER)
    draws = [one(method, adapters, [3 * t, 3 * t + 1, 3 * t + 2], density=0.4) for t in range(60)]
    measured = torch.stack([(draw - wanted).square().sum() for draw in draws]).mean().sqrt() / wanted.norm()
    facts = merge(adapters, method, weights=WEIGHTS, density=0.4).report.layers[LAYER].facts
    assert facts["noise_ratio"] == pytest.approx(float(measured), rel=0.15)


@pytest.mark.parametrize(
    ("method", "options"),
    [("dare_linear", {}), ("dare_rank", {}), ("della", {"epsilon": 0.0, "election": "none"})],
)
def test_at_full_density_they_are_the_weighted_sum(method, options, adapters, dense_sum):
    got = one(method, adapters, [1, 2, 3], density=1.0, **options)
    torch.testing.assert_close(got, dense_sum(adapters, WEIGHTS, LAYER), rtol=1e-5, atol=1e-5)


def test_dare_ties_elects_among_the_entries_that_are_left(adapters):
    votes = []
    for adapter, w, seed in zip(adapters, WEIGHTS, [1, 2, 3], strict=True):
        kept = Draws(seed).kept((24, 24), 0.5)
        votes.append(w * adapter.modules[LAYER].delta() * kept / 0.5)
    votes = torch.stack(votes)
    wanted = torch.where(votes.sign() == votes.sum(0).sign(), votes, 0.0).sum(0)
    torch.testing.assert_close(one("dare_ties", adapters, [1, 2, 3]), wanted, rtol=1e-5, atol=1e-5)


class EverythingKept:
    def kept(self, shape, chance):
        return torch.ones(shape)


def della_chances(rows, density, epsilon):
    """DELLA's chances as mergekit ranks them: argsort of argsort."""
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).double()
    return density - epsilon + 2 * epsilon * ranks / (rows.shape[1] - 1)


@pytest.mark.parametrize("columns", [2, 31, 700])
def test_della_gives_each_entry_the_chance_of_its_rank_in_its_row(columns):
    rows = torch.randn(9, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 3, 9)[:, None]
    drop = DropBySize(0.5, 0.3, seed=0)
    drop.draws = EverythingKept()
    got = (rows / drop(rows.clone())).double()
    sizes = rows.abs().double()
    one, other, largest = sizes[:, :, None], sizes[:, None], sizes.amax(dim=1)[:, None, None]
    near = (2**-5 + 2**-7) * torch.minimum(one, other)  # 5 digits, of what is rounded to 7
    alike = ((one - other).abs() <= near) | (torch.maximum(one, other) < 2**-11 * largest)
    bound = 0.3 * (alike.sum(dim=2) - 1) / (columns - 1)  # all that can share a class with an entry, and then some
    assert ((got - della_chances(rows, 0.5, 0.3)).abs() <= bound + 2**-17 + 1e-6).all()
    assert columns < 100 or bound.max() < 0.03
    torch.testing.assert_close(got.mean(dim=1), torch.full((9,), 0.5).double(), rtol=0, atol=2**-17 + 1e-6)


def test_a_row_of_zeros_and_an_entry_far_above_the_others_have_chances_too():
    rows = torch.tensor([[0.0, 0.0, 0.0], [1e-30, 1.0, -1e30]])
    torch.testing.assert_close(
        dropout.chances_by_size(rows, 0.5, 0.2),
        torch.tensor([[0.5, 0.5, 0.5], [26214 / 65536, 26214 / 65536, 45875 / 65536]]),  # of 0.4 and 0.7
        rtol=0,
        atol=0,
    )


def test_della_draws_the_same_on_any_number_of_threads():
    rows = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(DropBySize(0.5, 0.3, seed=1)(rows.clone()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_della_keeps_entries_as_often_as_it_says():
    rows = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    kept = (DropBySize(0.5, 0.4, seed=0)(rows.repeat(2000, 1)) != 0).double().mean(dim=0)
    assert (kept - della_chances(rows, 0.5, 0.4)).abs().max() < 5 * (0.25 / 2000) ** 0.5


def test_della_of_a_single_column_keeps_each_entry_with_the_density_where_mergekit_gives_nan():
    drop = DropBySize(0.25, 0.1, seed=0)
    kept = torch.cat([drop(torch.ones(1000, 1)) for _ in range(4)])
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert float((kept != 0).double().mean()) == pytest.approx(0.25, abs=0.04)


def test_a_random_drop_repeats_with_its_seed():
    rows = torch.ones(50, 30)
    assert torch.equal(RandomDrop(0.3, 7)(rows.clone()), RandomDrop(0.3, 7)(rows.clone()))
    assert not torch.equal(RandomDrop(0.3, 7)(rows.clone()), RandomDrop(0.3, 8)(rows.clone()))


@pytest.mark.parametrize("method", ["dare_linear", "dare_rank", "della"])
def test_another_seed_of_the_merge_draws_something_else(method, adapters):
    one, two = (merge(adapters, method, seed=seed).modules[LAYER].delta() for seed in (0, 1))
    assert (one - two).norm() > 0.01 * one.norm()


def test_rank_dare_keeps_whole_terms_of_the_singular_value_decomposition(adapters):
    update = adapters[2].modules[LAYER]
    result = merge([adapters[2]], "dare_rank", weights=[1.0], density=0.5, dtype=torch.float64)
    left = result.modules[LAYER].delta()
    U, S, Vh = torch.linalg.svd(update.delta())
    values = (U.T @ left @ Vh.T).diagonal()
    for value, size in zip(values[:4], S[:4], strict=True):
        assert min(abs(value), abs(value - 2 * size)) < 1e-9
    assert result.modules[LAYER].rank == max(1, int((values > 1e-9).sum()))


def test_a_draw_that_keeps_no_rank_is_a_merge_of_zeros(adapters):
    updates = [adapters[0].modules[LAYER]]
    seed = next(seed for seed in range(50) if not Draws(seed).kept((2,), 0.25).any())
    merged = dropout.dare_rank(updates, torch.ones(1).double(), seeds=[seed], density=0.25)
    assert merged.update.rank == 1 and merged.update.norm() == 0


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.5, 0.5), (0.05, 0.1), (0.95, 0.1), (0.5, -0.1), (0.5, float("nan"))]
)
def test_chances_outside_0_and_1_are_refused(density, epsilon, adapters):
    with pytest.raises(ValueError, match="density - epsilon and density \\+ epsilon are chances and must be in"):
        merge(adapters, "della", density=density, epsilon=epsilon)


@pytest.mark.parametrize("density", [0, 1.5])
def test_rank_dare_refuses_a_density_that_is_no_chance(density, adapters):
    with pytest.raises(ValueError, match="density is the share of entries to keep"):
        merge(adapters, "dare_rank", density=density)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_rank", "della"])
def test_adapters_draw_by_their_names_wherever_they_are_read_from(method, folders):
    from_disk = [read_adapter(folder, dtype=torch.float64) for folder in folders]
    in_memory = [Adapter(a.name, a.base_model, dict(a.modules), torch.float32) for a in from_disk]
    renamed = [replace(a, name=f"another-{a.name}") for a in in_memory]
    expected, same, other = (merge(given, method).modules for given in (folders, in_memory, renamed))
    for module, update in expected.items():
        assert torch.equal(update.delta(), same[module].delta())
    assert any(not torch.equal(update.delta(), other[module].delta()) for module, update in expected.items())
