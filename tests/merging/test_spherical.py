"""Spherical merges against mergekit's own functions on dense matrices, and where there is no arc to walk."""

import importlib
import math

import pytest
import torch
from mergekit.merge_methods.base import TensorGroup

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import merge

WEIGHTS = [0.7, 0.5, 0.9]
SHARES = [w / sum(WEIGHTS) for w in WEIGHTS]


def mergekit(method):
    return importlib.import_module(f"mergekit.merge_methods.{method}")


def mergekit_slerp(deltas, shares):
    t = torch.tensor([shares[1]], dtype=torch.float64)
    return mergekit("slerp").slerp(t, deltas[0][None], deltas[1][None])[0]


def mergekit_multislerp(deltas, shares):
    group = TensorGroup.from_tensors(deltas)
    return mergekit("multislerp").multislerp([group], parameters={"weight": shares})[0]


def mergekit_karcher(deltas, shares):
    return mergekit("karcher").karcher_merge_tensors(deltas, shares, max_iter=300, tol=1e-9)


def mergekit_model_stock(deltas, shares):
    group = TensorGroup.from_tensors([torch.zeros_like(deltas[0]), *deltas], base_index=0)
    return mergekit("model_stock").model_stock_merge_method([group])[0]


def dense(adapters, module):
    """The updates as matrices, zero for an adapter that lacks the layer."""
    (shape,) = {a.modules[module].shape for a in adapters if module in a.modules}
    zero = torch.zeros(shape, dtype=torch.float64)
    return [a.modules[module].delta() if module in a.modules else zero for a in adapters]


def merged(adapters, method, weights=WEIGHTS, **options):
    return merge(adapters, method, weights=weights[: len(adapters)], dtype=torch.float64, **options)


def one_layer(*matrices):
    """An adapter for each matrix, on a layer called "layer"."""
    made = [LowRank(torch.tensor(m, dtype=torch.float64), torch.eye(len(m[0]), dtype=torch.float64)) for m in matrices]
    return [Adapter(f"m{i}", None, {"layer": update}, torch.float64) for i, update in enumerate(made)]


@pytest.fixture
def alike(adapters):
    """The three adapters, each plus what "a" does, so that they agree on something."""
    first = adapters[0].modules

    def plus(adapter):
        both = {
            m: LowRank(torch.cat([u.B, first[m].B], 1), torch.cat([u.A, first[m].A]))
            for m, u in adapter.modules.items()
        }
        return Adapter(adapter.name, adapter.base_model, both, torch.float64)

    return [plus(adapter) for adapter in adapters]


@pytest.mark.parametrize("members", ["adapters", "alike"])
@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_means_on_the_sphere_equal_mergekits(method, members, request):
    members = request.getfixturevalue(members)
    for module, update in merged(members, method).modules.items():
        expected = globals()[f"mergekit_{method}"](dense(members, module), SHARES)
        torch.testing.assert_close(update.delta(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
def test_slerp_equals_mergekits(pair, adapters):
    members = [adapters[i] for i in pair]
    got = merged(members, "slerp", [0.3, 0.9]).modules
    for module in members[0].modules.keys() & members[1].modules.keys():
        update = got[module]
        torch.testing.assert_close(update.delta(), mergekit_slerp(dense(members, module), [0.25, 0.75]))


def test_model_stock_with_equal_weights_equals_mergekits(alike):
    members = alike[:2]
    three = [*members, Adapter("third", members[0].base_model, {**members[0].modules, **alike[2].modules})]
    result = merged(three, "model_stock", [2.0, 2.0, 2.0])
    for module, update in result.modules.items():
        torch.testing.assert_close(update.delta(), mergekit_model_stock(dense(three, module), None))
        assert 0 < result.report.layers[module].facts["t"] < 1


def test_model_stock_finds_the_point_nearest_to_a_common_signal():
    """delta_i = s + noise_i, all noises orthogonal to each other and to s: M is the foot of s on the mean's line."""
    s, noise = torch.zeros(1, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[1:]
    s[0, 0] = 0.8
    members = one_layer(*[(s + 0.6 * n).tolist() for n in noise])
    mean = sum(p * (s + 0.6 * n) for p, n in zip(SHARES, noise, strict=True))
    foot = (s * mean).sum() / mean.square().sum() * mean
    torch.testing.assert_close(merged(members, "model_stock").modules["layer"].delta(), foot)


def test_model_stock_erases_adapters_that_agree_on_nothing_and_says_so():
    members = one_layer([[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[-0.1, -0.1, 1.0]])
    result = merged(members, "model_stock")
    assert result.modules["layer"].norm() == 0
    assert result.report.facts["t"] == 0 and result.report.facts["mean_cosine"] < 0


@pytest.mark.parametrize("method", ["slerp", "multislerp", "karcher", "model_stock"])
def test_with_model_scope_whole_adapters_are_the_points(method, alike):
    members = alike[:2] if method == "slerp" else alike
    weights = WEIGHTS if method != "model_stock" else [1.0, 1.0, 1.0]
    shares = [w / sum(weights[: len(members)]) for w in weights[: len(members)]]
    modules = list(members[0].modules)
    whole = [
        torch.cat([d.flatten() for d in deltas]) for deltas in zip(*[dense(members, m) for m in modules], strict=True)
    ]
    expected = globals()[f"mergekit_{method}"](whole, shares)
    result = merged(members, method, weights, scope="model").modules
    got = torch.cat([result[module].delta().flatten() for module in modules])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_slerp_walks_a_quarter_circle():
    members = one_layer([[2.0, 0.0]], [[0.0, 2.0]])
    got = merged(members, "slerp", [2.0, 1.0]).modules["layer"].delta()
    torch.testing.assert_close(got, torch.tensor([[2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]]).double())


@pytest.mark.parametrize("method", ["slerp", "multislerp", "karcher"])
def test_two_adapters_of_one_length_and_weight_meet_halfway_by_every_method(method):
    members = one_layer([[3.0, 0.0]], [[0.0, 3.0]])
    got = merged(members, method, [1.0, 1.0]).modules["layer"].delta()
    torch.testing.assert_close(got, torch.full((1, 2), 3 / math.sqrt(2)).double())


def test_the_karcher_mean_of_two_is_slerp_and_the_multislerp_is_not():
    members = one_layer([[1.0, 0.0]], [[0.0, 1.0]])
    slerp, karcher, multislerp = (
        merged(members, method, [0.9, 0.1]).modules["layer"].delta() for method in ("slerp", "karcher", "multislerp")
    )
    torch.testing.assert_close(karcher, slerp)
    torch.testing.assert_close(multislerp, torch.tensor([[0.9, 0.1]]).double() / math.hypot(0.9, 0.1))


def test_the_karcher_mean_balances_the_arcs(alike):
    module = "model.layers.0.self_attn.q_proj"
    result = merged(alike, "karcher")
    mean = result.modules[module].delta()
    mean = mean / mean.norm()
    pull = torch.zeros_like(mean)
    for share, delta in zip(SHARES, dense(alike, module), strict=True):
        unit = delta / delta.norm()
        theta = (unit * mean).sum().acos()
        pull += share * theta / theta.sin() * (unit - theta.cos() * mean)
    assert pull.norm() < 1e-6
    assert result.report.layers[module].facts["residual"] < 1e-6


@pytest.mark.parametrize("method", ["slerp", "multislerp", "karcher", "model_stock"])
def test_a_negative_weight_stands_for_the_negated_update(method, alike):
    members = alike[:2]
    negated = Adapter("n", None, {m: LowRank(-u.B, u.A) for m, u in members[1].modules.items()})
    got = merged([members[0], negated], method, [0.7, -0.5]).modules
    for module, update in merged(members, method, [0.7, 0.5]).modules.items():
        torch.testing.assert_close(got[module].delta(), update.delta())


@pytest.mark.parametrize(
    ("method", "second"),
    [
        ("slerp", [[-1.0, 0.0]]),
        ("slerp", [[2.0, 0.001]]),
        ("slerp", [[0.0, 0.0]]),
        ("multislerp", [[-1.0, 0.0]]),
        ("karcher", [[-1.0, 0.0]]),
    ],
)
def test_without_an_arc_the_mean_is_linear_and_the_report_says_so(method, second):
    members = one_layer([[1.0, 0.0]], second)
    result = merged(members, method, [0.5, 0.5])
    expected = (torch.tensor([[1.0, 0.0]]) + torch.tensor(second)).double() / 2
    torch.testing.assert_close(result.modules["layer"].delta(), expected)
    assert result.report.facts["lerp"] == 1


def test_a_karcher_mean_ignores_the_pull_of_an_opposite_point():
    members = one_layer([[1.0, 0.0]], [[1.0, 0.0]], [[-1.0, 0.0]])
    got = merged(members, "karcher", [1.0, 1.0, 1.0]).modules["layer"].delta()
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.0]]).double())


@pytest.mark.parametrize("method", ["multislerp", "karcher", "model_stock"])
def test_adapters_that_are_all_zero_merge_to_zero(method):
    result = merged(one_layer([[0.0, 0.0]], [[0.0, 0.0]]), method)
    assert result.modules["layer"].norm() == 0


@pytest.mark.parametrize("method", ["slerp", "multislerp", "karcher", "model_stock"])
def test_a_layer_that_only_one_adapter_has_counts_by_its_share(method, adapters):
    module = "model.layers.0.mlp.down_proj"
    got = merged([adapters[0], adapters[2]], method, [0.6, 0.2]).modules[module].delta()
    torch.testing.assert_close(got, 0.75 * adapters[0].modules[module].delta())


def test_a_rank_cuts_the_result_and_reports_the_energy(adapters):
    exact = merged(adapters, "karcher").modules
    cut = merged(adapters, "karcher", rank=2)
    for module, update in cut.modules.items():
        U, S, Vh = torch.linalg.svd(exact[module].delta())
        torch.testing.assert_close(update.delta(), U[:, :2] @ S[:2].diag() @ Vh[:2])
        assert cut.report.layers[module].dropped == pytest.approx(float(S[2:].square().sum() / S.square().sum()))


def test_slerp_of_three_names_the_methods_that_take_them(adapters):
    with pytest.raises(
        ValueError, match="^slerp takes two adapters, got 3: use multislerp or karcher, which take any"
    ):
        merged(adapters, "slerp")


def test_slerp_of_one_is_the_end_of_its_arc(adapters):
    for module, update in merged(adapters[:2], "slerp", [0.4, 0.0]).modules.items():
        torch.testing.assert_close(update.delta(), adapters[0].modules[module].delta())


def test_an_unknown_scope_is_refused(adapters):
    with pytest.raises(ValueError, match="scope of karcher must be one of module, model, got 'layer'"):
        merged(adapters, "karcher", scope="layer")
