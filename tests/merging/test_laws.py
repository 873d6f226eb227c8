"""The laws of merging, over every registered method: a method that breaks one says so in the registry."""

import zlib
from dataclasses import replace

import pytest
import torch

from moa.adapters import Adapter, read_adapter
from moa.low_rank import LowRank, stack
from moa.merging import find_method, merge, methods
from moa.merging.checks import read_all
from moa.merging.parallel import using_threads
from moa.merging.registry import LAWS
from moa.merging.statistics import LayerStatistics

WEIGHTS = [0.7, 0.5, 0.9]
# Methods that merge two adapters and no more: their third has no weight.
PAIRWISE = ("slerp",)
# Methods that keep what adapters agree on, and nothing of adapters that do not.
OF_AGREEMENT = ("model_stock",)
# Methods that add factors, and so need equal ranks.
OF_FACTORS = ("factor_sum", "lorahub")
# What methods need beside the adapters: a maker for each entry of NEEDS, given the adapters of the merge.
MAKE = {}
# Options under which a method has other properties than by default: (method, options, degree in the weights).
VARIANTS = [
    *((name, {}, method.degree) for name, method in methods().items()),
    # linear
    ("factor_sum", {"split": "both"}, 2),
    ("factor_sum", {"split": "b"}, 1),
    # spherical, hierarchical
    ("slerp", {"scope": "model"}, 0),
    ("multislerp", {"scope": "model"}, 0),
    ("karcher", {"scope": "model"}, 0),
    ("model_stock", {"scope": "model"}, 0),
    ("hierarchical", {"node": "weighted_sum", "linkage": "ward", "distance": "subspace"}, 1),
    ("hierarchical", {"node": "slerp", "linkage": "complete"}, 1),
    # element-wise
    ("ties", {"density": 1.0}, 0),
    ("ties", {"density": 0.4, "normalise": "sum"}, 1),
    ("ties", {"density": 0.4, "election": "frequency"}, 0),
    ("ties", {"density": 0.4, "scope": "model"}, 0),
    ("ties", {"density": 0.4, "rank": "full"}, 0),
    ("magnitude", {"density": 1.0}, 1),
    ("magnitude", {"scope": "model"}, 1),
    ("breadcrumbs", {"density": 1.0}, 1),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1, "scope": "model"}, 1),
    ("breadcrumbs", {"election": "total"}, 1),
    ("dare_linear", {"density": 1.0}, 1),
    ("dare_ties", {"density": 1.0}, 1),
    ("dare_rank", {"density": 1.0}, 1),
    ("dare_rank", {"rank": 2}, 1),
    ("della", {"density": 1.0, "epsilon": 0.0, "election": "none"}, 1),
    ("della", {"election": "frequency"}, 1),
    ("consensus", {"k": 1}, 1),
    # spectral
    ("svd", {"rank": 2}, 1),
    ("knots", {"density": 1.0}, 1),
    ("knots", {"rule": "sum"}, 1),
    ("knots", {"rule": "dare_ties"}, 1),
    ("core_space", {"density": 1.0}, 1),
    ("core_space", {"rule": "dare"}, 1),
    ("tsv", {"rank": 2}, 1),
    ("iso_c", {"beta": 0.0}, 1),
    ("iso_c", {"rank": 2}, 1),
    ("iso_cts", {"common": 0.5}, 1),
    ("ctm", {"density": 1.0}, 1),
    ("ctm", {"rule": "dare_ties", "rank": "full"}, 1),
    ("wudi", {"ridge": 0.1}, 0),
    ("wudi", {"rank": 2}, 0),
    ("pico", {"rank": 2}, 0),
    # clustering
    ("lego", {"preserve": "sum"}, 1),
    ("lego", {"preserve": "norm", "norm": "2"}, 1),
    ("lego", {"preserve": "none", "norm": "none"}, 1),
    ("lego", {"rank": 2}, 0),
    ("lego_gauge_safe", {"rank": 2}, 1),
    # statistics
    ("regmean", {"rank": 2}, 0),
    ("regmean", {"off_diagonal": 1.0}, 0),
    ("fisher", {"balanced": False}, 0),
    # gates
    ("lorahub_linear", {"parallel": 4, "budget": 12}, 0),
    ("lora_soups", {"convex": True, "granularity": "adapter"}, 0),
]
# Options under which a method that gives one adapter back does not, because it was asked to cut.
CUTS = [
    {"rank": 2},
]
# Options under which a method gives one adapter back that by default does not.
WHOLE = [
    ("ties", {"density": 1.0}),
    ("magnitude", {"density": 1.0}),
    ("breadcrumbs", {"density": 1.0}),
    ("dare_linear", {"density": 1.0}),
    ("dare_ties", {"density": 1.0}),
    ("dare_rank", {"density": 1.0}),
    ("della", {"density": 1.0, "epsilon": 0.0, "election": "none"}),
    ("consensus", {"k": 1}),
    ("knots", {"density": 1.0}),
    ("core_space", {"density": 1.0}),
    ("ctm", {"density": 1.0}),
    ("iso_c", {"beta": 0.0}),
]


def over(variants):
    """Run a test over (method, options, degree)."""
    names = ("method", "options", "degree")
    ids = ["-".join([name, *map(str, options.values())]) for name, options, _ in variants]
    return pytest.mark.parametrize(names, variants, ids=ids)


def obeying(law):
    """Run a law over every method that does not break it by design; those are shown to break it at the end."""
    return over([variant for variant in VARIANTS if law not in find_method(variant[0]).breaks])


every_method = over(VARIANTS)
whole = over(
    [
        (name, options, degree)
        for name, options, degree in VARIANTS
        if (name, options) in WHOLE or ("identity" not in find_method(name).breaks and options not in CUTS)
    ]
)


@pytest.fixture
def members(request, adapters, equal_rank_adapters):
    """Unequal ranks, a shared direction and a missing layer, except for what needs equal ranks or agreement."""
    method = request.node.callspec.params["method"]
    if method in OF_AGREEMENT:
        return [agreeing(adapter, adapters[0]) for adapter in adapters]
    return equal_rank_adapters if method in OF_FACTORS else adapters


def agreeing(adapter, common):
    return replace(adapter, modules={m: stack([u, common.modules[m]]) for m, u in adapter.modules.items()})


@pytest.fixture
def weights(request):
    """Three weights for the three members."""
    return [*WEIGHTS[:2], 0.0] if request.node.callspec.params["method"] in PAIRWISE else WEIGHTS


def deltas(members, method, options, weights):
    given = needs_of(method, members)
    result = merge(members, method, weights=weights, dtype=torch.float64, **given, **options)
    return {module: update.delta() for module, update in result.modules.items()}


def data_of(adapter):
    """Statistics of an adapter's data, the same for all that have its name, whatever their factors are."""
    made = {}
    for module, update in adapter.modules.items():
        o, n = update.shape
        generator = torch.Generator().manual_seed(zlib.crc32(f"{adapter.name} {module}".encode()))
        x = torch.randn(60, n, generator=generator, dtype=torch.float64) * (0.2 + torch.rand(n, generator=generator))
        made[module] = LayerStatistics(x.T @ x / len(x), len(x), torch.rand(o, generator=generator))
    return made


MAKE["statistics"] = lambda members: [data_of(adapter) for adapter in members]


class LikeEachAdapter:
    """An objective whose task i is lost by ||M - delta_i||^2: the least loss is at the tasks' shares."""

    def __init__(self, members):
        members = read_all(members)
        self.names = self.tasks = [adapter.name for adapter in members]
        self.layers = sorted({module for adapter in members for module in adapter.modules})
        self.held = {m: [(i, a.modules[m]) for i, a in enumerate(members) if m in a.modules] for m in self.layers}
        deltas = {m: torch.zeros(len(members), *held[0][1].shape).double() for m, held in self.held.items()}
        for module, held in self.held.items():
            for index, update in held:
                deltas[module][index] = update.delta()
        self.deltas = {module: stacked.flatten(start_dim=1) for module, stacked in deltas.items()}
        self.gram = torch.stack([stacked @ stacked.T for stacked in self.deltas.values()])

    def describe(self):
        return {}

    def losses(self, gates, shares, *, crossed):
        if not crossed:
            return torch.stack([self.step_loss(g, shares) for g in gates])
        return torch.stack([sum(self.loss_of_factors(g, shares, m) for m in self.layers) for g in gates])

    def loss_of_factors(self, gates, shares, module):
        B, A = (sum(gates[i] * getattr(update, factor) for i, update in self.held[module]) for factor in "BA")
        return shares @ (self.deltas[module] - (B @ A).flatten()).square().sum(dim=1) / 1000

    def step_loss(self, gates, shares, *, guard=0.0, **_):
        gates = gates.expand(len(self.layers), -1)
        toward = gates - shares
        spread = shares @ self.gram.diagonal(dim1=1, dim2=2).sum(dim=0) - (self.gram @ shares @ shares).sum()
        size = ((self.gram @ gates[..., None]).squeeze(-1) * gates).sum()
        return (((self.gram @ toward[..., None]).squeeze(-1) * toward).sum() + spread + guard * size) / 1000


MAKE["objective"] = LikeEachAdapter


def needs_of(method, members):
    """What a method needs beside the adapters, made for these members."""
    return {need: MAKE[need](members) for need in find_method(method).needs}


def assert_same(got, expected, tolerance=1e-6):
    """Equal up to a relative error, layer by layer."""
    assert got.keys() == expected.keys()
    for module in expected:
        error = (got[module] - expected[module]).norm() / expected[module].norm().clamp(min=1e-30)
        assert error < tolerance, f"{module}: relative difference {error:.2e}"


def mapped(adapter, change):
    return Adapter(adapter.name, adapter.base_model, {m: change(u) for m, u in adapter.modules.items()}, torch.float64)


@obeying("adapter_order")
def test_the_order_of_adapters_does_not_matter(method, options, degree, members, weights):
    forward = deltas(members, method, options, weights)
    assert_same(deltas(members[::-1], method, options, weights[::-1]), forward)


def reversed_ranks(update):
    return LowRank(update.B.flip(1), update.A.flip(0))


@obeying("rank_order")
def test_the_order_of_ranks_inside_an_adapter_does_not_matter(method, options, degree, members, weights):
    expected = deltas(members, method, options, weights)
    assert_same(deltas([mapped(members[0], reversed_ranks), *members[1:]], method, options, weights), expected)


def refactored(update):
    G = torch.eye(update.rank, dtype=torch.float64) + 0.5 * torch.ones(update.rank, update.rank).double().triu()
    return LowRank(update.B @ torch.linalg.inv(G), G @ update.A)


@obeying("gauge")
def test_a_refactored_adapter_merges_to_the_same(method, options, degree, members, weights):
    expected = deltas(members, method, options, weights)
    assert_same(deltas([mapped(members[0], refactored), *members[1:]], method, options, weights), expected)


def scale_moved(update):
    return LowRank(update.B / 2, update.A * 2)


@obeying("scale_split")
def test_moving_scale_from_one_factor_to_the_other_changes_nothing(method, options, degree, members, weights):
    expected = deltas(members, method, options, weights)
    assert_same(deltas([mapped(members[0], scale_moved), *members[1:]], method, options, weights), expected)


@whole
def test_a_merge_of_one_adapter_gives_it_back(method, options, degree, members):
    alone = {module: update.delta() for module, update in members[1].modules.items()}
    assert_same(deltas([members[1]], method, options, [1.0]), alone)


@obeying("zero_weight")
def test_an_adapter_of_weight_zero_might_as_well_be_absent(method, options, degree, members, weights):
    expected = deltas(members[:2], method, options, weights[:2])
    assert_same(deltas(members, method, options, [*weights[:2], 0.0]), expected)


@every_method
def test_the_result_has_the_declared_degree_in_the_weights(method, options, degree, members, weights):
    once = deltas(members, method, options, weights)
    thrice = deltas(members, method, options, [3 * w for w in weights])
    assert_same(thrice, {module: 3**degree * delta for module, delta in once.items()})


@obeying("sign")
def test_negated_adapters_give_the_negated_result(method, options, degree, members, weights):
    expected = deltas(members, method, options, weights)
    negated = [mapped(a, lambda u: LowRank(-u.B, u.A)) for a in members]
    assert_same(deltas(negated, method, options, weights), {module: -delta for module, delta in expected.items()})


def untrained(update):
    return LowRank(torch.zeros_like(update.B), update.A)


@obeying("zero_adapter")
def test_an_adapter_that_changes_nothing_has_no_influence(method, options, degree, members, weights):
    expected = deltas(members[:2], method, options, weights[:2])
    idle = mapped(members[0], untrained)
    assert_same(deltas([*members[:2], idle], method, options, weights), expected)


@obeying("duplicates")
def test_an_adapter_given_twice_with_half_its_weight_counts_once(method, options, degree, members, weights):
    expected = deltas(members, method, options, weights)
    first, rest = weights[0] / 2, weights[1:]
    assert_same(deltas([members[0], *members], method, options, [first, first, *rest]), expected)


def orthogonal(size, seed):
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def turned(update):
    o, n = update.shape
    return LowRank(orthogonal(o, 1) @ update.B, update.A @ orthogonal(n, 2).T)


@obeying("rotation")
def test_turning_inputs_and_outputs_turns_the_result(method, options, degree, members, weights):
    straight = merge(members, method, weights=weights, dtype=torch.float64, **options).modules
    expected = {module: turned(update).delta() for module, update in straight.items()}
    assert_same(deltas([mapped(a, turned) for a in members], method, options, weights), expected)


@obeying("span")
def test_the_result_stays_in_the_span_of_the_adapters(method, options, degree, members, weights):
    for module, merged in deltas(members, method, options, weights).items():
        present = [a.modules[module] for a in members if module in a.modules]
        writes = torch.linalg.qr(torch.cat([u.B for u in present], dim=1)).Q
        reads = torch.linalg.qr(torch.cat([u.A for u in present]).T).Q
        assert torch.allclose(writes @ (writes.T @ merged @ reads) @ reads.T, merged, atol=1e-8 * merged.norm())


@every_method
def test_a_saved_merge_reads_back_as_it_was(method, options, degree, members, weights, tmp_path):
    result = merge(
        members,
        method,
        weights=weights,
        dtype=torch.float32,
        output=tmp_path / "out",
        **needs_of(method, members),
        **options,
    )
    stored = read_adapter(tmp_path / "out")
    assert stored.modules.keys() == result.modules.keys()
    for module, update in stored.modules.items():
        assert torch.equal(update.B, result.modules[module].B)
        assert torch.equal(update.A, result.modules[module].A)


@every_method
def test_the_same_merge_twice_gives_the_same_bytes_one_layer_after_another_or_several_at_a_time(
    method, options, degree, members, weights, tmp_path
):
    for threads, folder in enumerate(("one", "two"), start=1):
        with using_threads(threads):
            merge(members, method, weights=weights, output=tmp_path / folder, **needs_of(method, members), **options)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "merge_report.json"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@every_method
def test_storage_in_bfloat16_costs_what_the_report_says(method, options, degree, members, weights):
    exact = deltas(members, method, options, weights)
    rounded = merge(members, method, weights=weights, dtype=torch.bfloat16, **needs_of(method, members), **options)
    error = {m: (u.to(torch.float64).delta() - exact[m]).norm() ** 2 for m, u in rounded.modules.items()}
    relative = (sum(error.values()) / sum(delta.norm() ** 2 for delta in exact.values())) ** 0.5
    assert 0 < relative < 0.01
    assert rounded.report.rounding == pytest.approx(float(relative), rel=1e-3)


BROKEN = {
    "rank_order": lambda members: [mapped(members[0], reversed_ranks), *members[1:]],
    "gauge": lambda members: [mapped(members[0], refactored), *members[1:]],
    "scale_split": lambda members: [mapped(members[0], scale_moved), *members[1:]],
}


@pytest.mark.parametrize("law", BROKEN)
@pytest.mark.parametrize("method", [m.name for m in methods().values() if m.breaks])
def test_a_law_is_declared_broken_only_where_it_is(method, law, members, weights):
    expected = deltas(members, method, {}, weights)
    changed = deltas(BROKEN[law](members), method, {}, weights)
    difference = max((changed[m] - expected[m]).norm() / expected[m].norm() for m in expected)
    assert (difference > 1e-3) == (law in find_method(method).breaks)


def test_every_declared_law_exists_and_has_a_reason():
    for method in methods().values():
        for law, reason in method.breaks.items():
            assert law in LAWS and reason
