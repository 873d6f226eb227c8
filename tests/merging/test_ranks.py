"""Ranks chosen by rule, against exhaustive search, dense singular values and ranks that were planted."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from moa.adapters import Adapter, read_adapter
from moa.low_rank import LowRank
from moa.merging import merge
from moa.merging.layers import Layers
from moa.merging.ranks import RankRule, chosen_ranks, padded
from moa.merging.statistics import LayerStatistics

SIZES = {"small": (9, 7), "wide": (6, 20), "tall": (16, 8)}


def draw(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(size, rank, seed):
    return torch.linalg.qr(draw(size, rank, seed=seed)).Q


def with_spectrum(size, values, seed=0):
    """An update of these singular values."""
    U, V = (orthonormal(d, len(values), seed + i) for i, d in enumerate(size))
    return LowRank(U * torch.tensor(values, dtype=torch.float64), V.T)


def adapter(modules, name="a"):
    return Adapter(name=name, base_model="tiny/base", modules=modules, dtype=torch.float64)


def ranks(spectra, rule, statistics=None, sizes=SIZES):
    """What the rule chooses for layers of these singular values."""
    modules = {name: with_spectrum(sizes[name], S, seed) for seed, (name, S) in enumerate(spectra.items())}
    layers = Layers([adapter(modules)], torch.ones(1, dtype=torch.float64), {name: sizes[name] for name in spectra})
    most = {name: min(len(S), *sizes[name]) for name, S in spectra.items()}
    return chosen_ranks(layers, rule, most, statistics)


SPECTRA = {"small": [5.0, 4.0, 0.5, 0.4], "wide": [3.0, 2.9, 2.8, 0.1], "tall": [9.0, 1.0, 0.9, 0.8, 0.7]}


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.95, 0.99, 1.0])
def test_energy_keeps_the_fewest_values_that_hold_the_share(energy):
    expected = {}
    for name, S in SPECTRA.items():
        shares = [sum(s**2 for s in S[:k]) / sum(s**2 for s in S) for k in range(1, len(S) + 1)]
        expected[name] = next(k for k, share in enumerate(shares, start=1) if share >= energy - 1e-12)
    assert ranks(SPECTRA, RankRule(energy=energy)) == expected


def test_a_gap_is_found_where_there_is_one_and_energy_decides_elsewhere():
    spectra = {"small": [5.0, 4.0, 0.5, 0.4], "wide": [3.0, 2.5, 2.2, 2.0], "tall": [9.0, 8.0, 7.0, 0.7, 0.6]}
    assert ranks(spectra, RankRule("gap")) == {"small": 2, "wide": 4, "tall": 3}
    assert ranks(spectra, RankRule("gap", max_rank=2)) == {"small": 2, "wide": 2, "tall": 2}


def test_a_gap_is_looked_for_up_to_the_largest_rank_and_above_the_noise():
    assert ranks({"small": [9.0, 5.0, 4.9, 0.1]}, RankRule("gap", max_rank=2)) == {"small": 1}
    below = {"small": [3.0, 2.9, 2.8, 0.01, 1e-5]}  # 0.004 (sqrt(9) + sqrt(7)) = 0.023
    assert ranks(below, RankRule("gap", noise=0.004)) == {"small": 3}


def test_a_gap_may_be_the_end_of_what_adapters_share():
    update = with_spectrum((9, 7), [3.0, 2.8, 2.6])
    copies = [adapter({"small": update}, name) for name in "abc"]
    result = merge(copies, "svd", rank=RankRule("gap"))
    assert result.modules["small"].rank == 3


def test_the_effective_rank_is_the_exponent_of_the_entropy():
    spectra = {"small": [2.0] * 4, "wide": [4.0, 2.0, 1.0, 1.0], "tall": [1.0, 1e-3, 1e-3]}
    # p = 1/2, 1/4, 1/8, 1/8 has 7/4 bits
    assert ranks(spectra, RankRule("erank")) == {"small": 4, "wide": round(2**1.75), "tall": 1}


@pytest.mark.parametrize("by", ["energy", "gap"])
def test_planted_ranks_are_found_under_known_noise(by):
    modules, sigma = {}, 0.01
    for seed, (planted, size) in enumerate({2: (60, 40), 5: (30, 80)}.items()):
        signal = with_spectrum(size, [1.0 + j / planted for j in range(planted)][::-1], seed).delta()
        noisy = signal + sigma * draw(*size, seed=50 + seed)
        modules[str(planted)] = LowRank(noisy, torch.eye(size[1], dtype=torch.float64))
    layers = Layers([adapter(modules)], torch.ones(1), {name: update.shape for name, update in modules.items()})
    most = {name: min(update.shape) for name, update in modules.items()}
    rule = RankRule(by, energy=1.0, noise=sigma)
    assert chosen_ranks(layers, rule, most) == {"2": 2, "5": 5}


def excess(spectra, chosen):
    return sum(s**2 for name, S in spectra.items() for s in S[chosen[name] :])


def cost(chosen, sizes=SIZES):
    return sum(rank * sum(sizes[name]) for name, rank in chosen.items())


def best_within(spectra, budget, sizes=SIZES, steps=None):
    """The least energy that any ranks within the budget drop, by trying them all."""
    choices = itertools.product(*(steps or range(1, len(S) + 1) for S in spectra.values()))
    every = [dict(zip(spectra, choice, strict=True)) for choice in choices]
    return min(excess(spectra, chosen) for chosen in every if cost(chosen, sizes) <= budget)


@pytest.mark.parametrize("extra", range(0, 11))
def test_a_budget_is_spent_in_the_best_way_when_all_layers_cost_the_same(extra):
    sizes = dict.fromkeys(SPECTRA, (10, 9))
    budget = 19 * (3 + extra) + 7
    chosen = ranks(SPECTRA, RankRule(budget=budget), sizes=sizes)
    assert cost(chosen, sizes) == 19 * min(3 + extra, 13)
    assert excess(SPECTRA, chosen) == pytest.approx(best_within(SPECTRA, budget, sizes))


def test_ranks_of_different_cost_are_the_best_up_to_one_that_does_not_fit():
    gain = max(S[1] ** 2 for S in SPECTRA.values())
    optimal = []
    for budget in range(66, 290, 7):
        chosen = ranks(SPECTRA, RankRule(budget=budget))
        best = best_within(SPECTRA, budget)
        assert cost(chosen) <= budget and best - 1e-9 <= excess(SPECTRA, chosen) < best + gain
        optimal.append(excess(SPECTRA, chosen) == pytest.approx(best))
    assert sum(optimal) > len(optimal) / 2


@pytest.mark.parametrize("lagrangian", [8.0, 0.6, 0.1, 0.01, 0.001])
def test_a_budget_that_is_used_up_is_used_in_the_best_way(lagrangian):
    """All ranks that gain more per parameter than some price, and what these cost, to the parameter."""
    paid = {n: sum(s**2 / sum(SIZES[n]) > lagrangian for s in S[1:]) + 1 for n, S in SPECTRA.items()}
    assert ranks(SPECTRA, RankRule(budget=cost(paid))) == paid
    assert excess(SPECTRA, paid) == pytest.approx(best_within(SPECTRA, cost(paid)))


def test_a_budget_goes_to_the_layers_that_need_it_and_energy_still_limits():
    spectra = {"small": [1.0, 1e-3, 1e-3], "wide": [5.0, 4.0, 3.0]}
    assert ranks(spectra, RankRule(budget=16 + 3 * 26)) == {"small": 1, "wide": 3}
    assert ranks(spectra, RankRule(budget=10_000)) == {"small": 3, "wide": 3}
    assert ranks(spectra, RankRule(budget=10_000, energy=0.9)) == {"small": 1, "wide": 3}


def test_a_budget_below_rank_one_everywhere_is_refused_with_the_least_there_is():
    assert ranks(SPECTRA, RankRule(budget=66)) == {"small": 1, "wide": 1, "tall": 1}
    message = "a budget of 65 parameters is too small: rank 1 in each of the 3 layers, the least there is, takes 66"
    for uniform in (False, True):
        with pytest.raises(ValueError, match=message):
            ranks(SPECTRA, RankRule(budget=65, uniform=uniform))


@pytest.mark.parametrize(("max_rank", "expected"), [(None, 3), (2, 2)])
def test_uniform_gives_every_layer_what_the_most_needy_needs(max_rank, expected):
    single = ranks(SPECTRA, RankRule(energy=0.95, max_rank=max_rank))
    assert max(single.values()) == expected and min(single.values()) < expected
    assert set(ranks(SPECTRA, RankRule(energy=0.95, uniform=True, max_rank=max_rank)).values()) == {expected}


@pytest.mark.parametrize("budget", [66, 131, 132, 197, 198, 10_000])
def test_uniform_within_a_budget_is_the_largest_that_it_allows(budget):
    chosen = ranks(SPECTRA, RankRule(budget=budget, uniform=True))
    assert set(chosen.values()) == {min(5, budget // 66)}


@pytest.mark.parametrize(
    ("needed", "max_rank", "expected"),
    [(1, None, 1), (2, None, 2), (3, None, 4), (5, None, 8), (5, 8, 8), (5, 7, 4), (5, 4, 4), (3, 3, 2), (1, 1, 1)],
)
def test_powers_of_two_are_rounded_up_within_the_largest_allowed(needed, max_rank, expected):
    spectra = {"small": [1.0] * needed}
    assert ranks(spectra, RankRule(energy=1.0, max_rank=max_rank, power_of_two=True)) == {"small": expected}
    uniform = RankRule(energy=1.0, max_rank=max_rank, power_of_two=True, uniform=True)
    assert ranks(spectra, uniform) == {"small": expected}


def test_powers_of_two_keep_to_a_budget():
    for budget in range(66, 600, 67):
        chosen = ranks(SPECTRA, RankRule(budget=budget, power_of_two=True))
        assert set(chosen.values()) <= {1, 2, 4, 8} and cost(chosen) <= budget
        common = set(ranks(SPECTRA, RankRule(budget=budget, power_of_two=True, uniform=True)).values())
        assert common == {2 ** int(math.log2(min(8, budget // 66)))}
    equal = dict.fromkeys(SPECTRA, (10, 9))
    chosen = ranks(SPECTRA, RankRule(budget=19 * 8, power_of_two=True), sizes=equal)
    assert excess(SPECTRA, chosen) == pytest.approx(best_within(SPECTRA, 19 * 8, equal, steps=[1, 2, 4]))


def statistics_of(adapters, seed=0):
    """Input Grams, with some directions of the inputs far stronger than others."""
    made = []
    for i, one in enumerate(adapters):
        of = {}
        for module, update in one.modules.items():
            x = draw(50, update.shape[1], seed=seed + i) * torch.logspace(1, -2, update.shape[1], dtype=torch.float64)
            of[module] = SimpleNamespace(gram=x.T @ x / 50)
        made.append(of)
    return made


def whitened(adapters, weights, statistics, module):
    """Singular values of (sum w delta) S^(1/2) by a dense square root of S = sum |w| G."""
    total = sum(w * a.modules[module].delta() for a, w in zip(adapters, weights, strict=True))
    S = sum(abs(w) * of[module].gram for of, w in zip(statistics, weights, strict=True))
    values, vectors = torch.linalg.eigh(S)
    return torch.linalg.svdvals(total @ vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T)


@pytest.mark.parametrize("energy", [0.8, 0.95, 0.999])
def test_loss_keeps_the_share_of_the_output_that_the_layers_inputs_produce(energy, equal_rank_adapters):
    weights, statistics = [0.7, -0.5, 0.9], statistics_of(equal_rank_adapters)
    sizes = {m: u.shape for m, u in equal_rank_adapters[0].modules.items()}
    layers = Layers(equal_rank_adapters, torch.tensor(weights, dtype=torch.float64), sizes)
    chosen = chosen_ranks(layers, RankRule("loss", energy=energy), dict.fromkeys(sizes, 9), statistics)
    plain = chosen_ranks(layers, RankRule(energy=energy), dict.fromkeys(sizes, 9))
    for module, rank in chosen.items():
        kept = whitened(equal_rank_adapters, weights, statistics, module).square().cumsum(0)
        assert kept[rank - 1] >= energy * kept[-1] and (rank == 1 or kept[rank - 2] < energy * kept[-1])
    assert chosen != plain


def test_a_merge_by_loss_reads_the_statistics_of_those_that_have_a_weight(equal_rank_adapters):
    grams = [
        {module: LayerStatistics(known.gram, 50) for module, known in of.items()}
        for of in statistics_of(equal_rank_adapters)
    ]
    rule, weights = RankRule("loss", energy=0.9), [0.7, 0.0, 0.9]
    result = merge(equal_rank_adapters, "svd", rank=rule, weights=weights, statistics=grams, dtype=torch.float64)
    for module, update in result.modules.items():
        kept = whitened(equal_rank_adapters, weights, grams, module).square().cumsum(0)
        assert update.rank == int((kept < 0.9 * kept[-1]).sum()) + 1
    assert result.report.rank["by"] == "loss"
    with pytest.raises(ValueError, match="no file of statistics beside it"):
        merge(equal_rank_adapters, "svd", rank=rule)


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 2), (-1.0, 2), (0.1, 1)])
def test_inputs_count_by_the_weight_of_their_adapter(weight, expected):
    """S = I + |w| v v^T with v the second direction, so that the squares are 4 and 1 + |w|."""
    update = with_spectrum((9, 7), [2.0, 1.0])
    eye, v = torch.eye(7, dtype=torch.float64), update.A[1]
    statistics = [{"small": SimpleNamespace(gram=gram)} for gram in (eye, torch.outer(v, v))]
    members = [adapter({"small": update}), adapter({}, "b")]
    layers = Layers(members, torch.tensor([1.0, weight], dtype=torch.float64), {"small": (9, 7)})
    assert chosen_ranks(layers, RankRule("loss", energy=0.7), {"small": 2}, statistics) == {"small": expected}


def test_a_budget_by_loss_goes_where_the_inputs_are_strong():
    spectra = {"small": [2.0, 1.9, 1.8], "again": [1.0, 0.9, 0.8]}
    sizes = dict.fromkeys(spectra, (9, 7))
    eye = torch.eye(7, dtype=torch.float64)
    statistics = [{"small": SimpleNamespace(gram=eye), "again": SimpleNamespace(gram=100 * eye)}]
    assert ranks(spectra, RankRule(budget=16 * 4), sizes=sizes) == {"small": 3, "again": 1}
    assert ranks(spectra, RankRule("loss", budget=16 * 4), statistics, sizes) == {"small": 1, "again": 3}


def test_loss_leaves_out_an_adapter_without_statistics_and_refuses_when_no_adapter_has_any():
    gram = SimpleNamespace(gram=torch.eye(7, dtype=torch.float64))
    spectra = {"small": [2.0, 1.0]}
    assert ranks(spectra, RankRule("loss", energy=0.7), [{"small": gram}]) == {"small": 1}
    with pytest.raises(ValueError, match="need statistics of every layer, and no adapter has any of 'small'"):
        ranks(spectra, RankRule("loss"), [{}])
    with pytest.raises(ValueError, match="need statistics of each adapter's inputs, got none"):
        ranks(spectra, RankRule("loss"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"by": "size"}, "one of energy, gap, loss, erank, got 'size'"),
        ({"energy": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"budget": 0}, "budget must be a whole number of at least 1, got 0"),
        ({"budget": 1e6}, "budget must be a whole number of at least 1, got 1000000.0"),
        ({"max_rank": True}, "max_rank must be a whole number of at least 1, got True"),
        ({"noise": -1.0}, "a finite number of at least 0, got -1.0"),
        ({"noise": math.nan}, "a finite number of at least 0, got nan"),
        ({"by": "loss", "noise": 0.1}, "choose by energy, gap or erank"),
    ],
)
def test_rules_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RankRule(**given)


def test_the_default_is_99_percent_of_the_energy_and_all_of_it_under_a_budget():
    assert RankRule().energy == 0.99
    assert RankRule(budget=1000).energy == 1.0
    assert RankRule(budget=1000, energy=0.9).energy == 0.9


def test_a_vanishing_layer_gets_rank_one():
    for by in ("energy", "gap", "erank"):
        assert ranks({"small": [0.0, 0.0], "tall": [1.0, 1.0]}, RankRule(by)) == {"small": 1, "tall": 2}


def test_no_layer_is_given_more_than_it_can_fill():
    layers = Layers([adapter({"small": with_spectrum((9, 7), [1.0] * 4)})], torch.ones(1), {"small": (9, 7)})
    assert chosen_ranks(layers, RankRule(energy=1.0), {"small": 3}) == {"small": 3}


def test_padding_changes_the_rank_and_nothing_else():
    update = with_spectrum((9, 7), [2.0, 1.0])
    more = padded(update, 8)
    assert more.rank == 8 and torch.equal(more.delta(), update.delta())
    assert padded(update, 1).rank == 2


@pytest.mark.parametrize("method", ["svd", "weighted_sum", "ties", "lego"])
@pytest.mark.parametrize("rule", [{"uniform": True}, {"power_of_two": True}, {"uniform": True, "power_of_two": True}])
def test_a_server_gets_its_ranks_even_where_a_layer_has_fewer(method, rule, adapters, tmp_path):
    """Two layers of the fixture hold 8 directions of 9 ranks, the first 4 of 5."""
    result = merge(adapters, method, rank=RankRule(energy=1.0, max_rank=8, **rule), output=tmp_path / "out")
    last = 8 if "uniform" in rule else 4
    stored = {module: update.rank for module, update in read_adapter(tmp_path / "out").modules.items()}
    assert list(stored.values()) == [last, 8, 8]
    assert result.report.rank == {"by": "energy", "energy": 1.0, "budget": None, "noise": None, "max_rank": 8} | {
        "uniform": False,
        "power_of_two": False,
        **rule,
    }


def test_what_a_rule_drops_is_in_the_report(adapters, dense_sum):
    result = merge(adapters, "svd", weights=[0.7, 0.5, 0.9], rank=RankRule(budget=500), dtype=torch.float64)
    dropped = total = stored = 0.0
    for module, update in result.modules.items():
        exact = dense_sum(adapters, [0.7, 0.5, 0.9], module)
        dropped, total = dropped + (exact - update.delta()).norm() ** 2, total + exact.norm() ** 2
        stored += update.B.numel() + update.A.numel()
    assert stored <= 500
    assert result.report.energy_dropped == pytest.approx(float(dropped / total))
