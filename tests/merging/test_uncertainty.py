"""Influence, support and spread against dense float64 matrices."""

from dataclasses import replace

import pytest
import torch

from moa.adapters import Adapter, Extras
from moa.low_rank import LowRank
from moa.merging import merge, uncertainty
from moa.merging.uncertainty import jackknife, output_variance, support

WEIGHTS = [0.7, -0.5, 0.9]
LAYER = "model.layers.0.self_attn.q_proj"
LACKING = "model.layers.0.mlp.down_proj"


def whole(adapters, coefficients):
    """sum_i c_i delta_i over all layers, as one long vector."""
    parts = []
    for module in adapters[0].modules:
        there = [
            (a.modules[module].delta(), c) for a, c in zip(adapters, coefficients, strict=True) if module in a.modules
        ]
        parts.append(sum(c * delta for delta, c in there).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("method", ["weighted_sum", "task_arithmetic", "concatenation"])
def test_the_influence_on_a_sum_is_an_adapters_part_in_it(method, adapters):
    got = jackknife(adapters, method, WEIGHTS)
    total = whole(adapters, WEIGHTS).norm()
    for i, adapter in enumerate(adapters):
        alone = [w if j == i else 0.0 for j, w in enumerate(WEIGHTS)]
        assert got[adapter.name] == pytest.approx(float(whole(adapters, alone).norm() / total))


def test_the_influence_on_a_mean_counts_what_the_others_gain(adapters):
    weights = [1.0, 2.0, 5.0]
    got = jackknife(adapters, "average", weights)
    mean = whole(adapters, [w / 8 for w in weights])
    without = {"a": [0, 2 / 7, 5 / 7], "b": [1 / 6, 0, 5 / 6], "c": [1 / 3, 2 / 3, 0]}
    for name, coefficients in without.items():
        assert got[name] == pytest.approx(float((mean - whole(adapters, coefficients)).norm() / mean.norm()))


@pytest.mark.parametrize(("method", "options"), [("ties", {"density": 0.5}), ("svd", {}), ("karcher", {"seed": 3})])
def test_the_influence_on_other_merges_is_found_by_leaving_adapters_out(method, options, adapters):
    got = jackknife(adapters, method, WEIGHTS, **options)

    def merged(members, weights):
        return merge(members, method, weights=weights, dtype=torch.float64, **options).modules

    everything = merged(adapters, WEIGHTS)
    total = torch.cat([update.delta().flatten() for update in everything.values()])
    for i, adapter in enumerate(adapters):
        left = [a for a in adapters if a is not adapter]
        without = merged(left, [w for j, w in enumerate(WEIGHTS) if j != i])
        rest = [without[m].delta() if m in without else 0 * u.delta() for m, u in everything.items()]
        change = total - torch.cat([delta.flatten() for delta in rest])
        assert got[adapter.name] == pytest.approx(float(change.norm() / total.norm()), rel=1e-6)


@pytest.mark.parametrize("method", ["weighted_sum", "average"])
def test_the_gram_and_leaving_out_agree(method, adapters):
    weights = [0.7, 0.5, 0.9]
    by_gram = jackknife(adapters, method, weights)
    assert jackknife(adapters, method, weights, check_base=True) == pytest.approx(by_gram, rel=1e-6)


def test_the_gram_merges_nothing(adapters, monkeypatch):
    monkeypatch.delattr(uncertainty, "merge")
    assert jackknife(adapters, "average").keys() == {"a", "b", "c"}


def test_adapters_that_hold_more_than_updates_are_refused(adapters):
    dora = replace(adapters[0], extras=Extras(magnitude={LAYER: torch.ones(24, dtype=torch.float64)}))
    for method in ("weighted_sum", "svd"):
        with pytest.raises(ValueError, match="adapter 'a' also holds DoRA magnitudes, and only updates"):
            jackknife([dora, *adapters[1:]], method)


@pytest.mark.parametrize("method", ["weighted_sum", "ties"])
def test_an_adapter_without_weight_has_no_influence(method, adapters):
    got = jackknife(adapters, method, [0.7, 0.5, 0.0])
    assert got["c"] == 0 and got["a"] > 0


def test_a_layer_that_only_the_one_left_out_has_is_lost_without_it(adapters):
    only_a = Adapter("a", "tiny/base", {LACKING: adapters[0].modules[LACKING]}, torch.float64)
    only_c = Adapter("c", "tiny/base", {LAYER: adapters[2].modules[LAYER]}, torch.float64)
    norms = {"a": only_a.modules[LACKING].norm(), "c": only_c.modules[LAYER].norm()}
    expected = {name: norm / (norms["a"] ** 2 + norms["c"] ** 2) ** 0.5 for name, norm in norms.items()}
    for method in ("weighted_sum", "svd"):
        assert jackknife([only_a, only_c], method, [1.0, 1.0]) == pytest.approx(expected)


def test_a_rank_that_the_others_do_not_hold_is_what_they_do(adapters):
    assert jackknife(adapters, "svd", WEIGHTS, rank=9) == pytest.approx(jackknife(adapters, "weighted_sum", WEIGHTS))


def test_an_influence_needs_two_adapters_with_a_weight(adapters):
    with pytest.raises(ValueError, match="leaves one adapter out, so at least two must have a weight, got 1"):
        jackknife(adapters, "ties", [1.0, 0.0, 0.0])


@pytest.mark.parametrize("method", ["weighted_sum", "svd"])
def test_adapters_that_cancel_have_no_influence_to_tell(method, adapters):
    with pytest.raises(ValueError, match=f"the adapters cancel to a {method} of zero"):
        jackknife([adapters[0], adapters[0]], method, [1.0, -1.0])


def test_what_merge_refuses_is_refused(adapters):
    with pytest.raises(ValueError, match="svd has no option 'density'"):
        jackknife(adapters, "svd", density=0.4)
    with pytest.raises(ValueError, match="weights must be one for each adapter: got 1 for 3"):
        jackknife(adapters, "weighted_sum", [1.0])
    other = Adapter("other", "another/base", adapters[0].modules, torch.float64)
    with pytest.raises(ValueError, match="was trained on 'tiny/base' and 'other' on 'another/base'"):
        jackknife([*adapters, other], "weighted_sum")


def inputs(tokens, size):
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_support_is_the_share_of_an_input_in_the_null_space_of_the_updates(adapters):
    x = inputs(5, 24)
    got = support(adapters, LAYER, x)
    matrices = {a.name: a.modules[LAYER].delta() for a in adapters}
    matrices["together"] = torch.cat(list(matrices.values()))
    for name, matrix in matrices.items():
        rest = x - x @ (torch.linalg.pinv(matrix) @ matrix).T
        expected = rest.norm(dim=1) / x.norm(dim=1)
        torch.testing.assert_close(got.together if name == "together" else got.each[name], expected)


def test_an_input_that_an_adapter_reads_whole_scores_zero_and_one_that_none_reads_one(adapters):
    stacked = torch.cat([a.modules[LAYER].A for a in adapters])
    unseen = torch.linalg.svd(stacked).Vh[-1:]
    x = torch.cat([adapters[0].modules[LAYER].A[:1], unseen, torch.zeros(1, 24, dtype=torch.float64)])
    got = support(adapters, LAYER, x)
    torch.testing.assert_close(got.each["a"], torch.tensor([0.0, 1.0, 1.0]).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(got.together, torch.tensor([0.0, 1.0, 1.0]).double(), atol=1e-7, rtol=0)
    assert got.each["c"][0] > 0.1


def test_adapters_that_lack_a_layer_or_were_never_trained_see_nothing(adapters):
    idle = Adapter("idle", None, {m: LowRank(0 * u.B, u.A) for m, u in adapters[0].modules.items()}, torch.float64)
    x = inputs(4, 40)
    got = support([*adapters, idle], LACKING, x)
    assert got.each["c"].tolist() == got.each["idle"].tolist() == [1.0] * 4
    torch.testing.assert_close(got.together, support(adapters[:2], LACKING, x).together)


def test_opposite_adapters_still_see_what_each_sees(adapters):
    opposite = Adapter("opposite", None, {LAYER: LowRank(-adapters[0].modules[LAYER].B, adapters[0].modules[LAYER].A)})
    x = inputs(4, 24)
    got = support([adapters[0], opposite], LAYER, x)
    torch.testing.assert_close(got.together, got.each["a"])


def test_inputs_and_layers_that_do_not_fit_are_refused(adapters):
    with pytest.raises(ValueError, match=r"inputs of '.*q_proj' are \[tokens, 24\], got \[5, 40\]"):
        support(adapters, LAYER, inputs(5, 40))
    with pytest.raises(ValueError, match="none of the adapters changes a layer '.*q_pro'; did you mean '.*q_proj'"):
        support(adapters, LAYER[:-1], inputs(5, 24))


def test_the_spread_of_outputs_is_that_of_dense_merges(adapters):
    updates = [a.modules[LAYER] for a in adapters]
    L = inputs(3, 3)
    mean, covariance, x = torch.tensor(WEIGHTS).double(), L @ L.T, inputs(5, 24)
    got = output_variance(updates, mean, covariance, x)
    for t, token in enumerate(x):
        Z = torch.stack([update.delta() @ token for update in updates], dim=1)
        torch.testing.assert_close(got.mean[t], Z @ mean)
        torch.testing.assert_close(got.variance[t], (Z @ covariance @ Z.T).diagonal())


def test_certain_weights_have_no_spread_and_one_uncertain_adds_its_own(adapters):
    updates, x = [a.modules[LAYER] for a in adapters], inputs(5, 24)
    mean = torch.tensor(WEIGHTS).double()
    assert output_variance(updates, mean, torch.zeros(3, 3).double(), x).variance.abs().max() == 0
    one = torch.diag(torch.tensor([0.0, 0.3, 0.0]).double())
    expected = 0.3 * (x @ updates[1].delta().T).square()
    torch.testing.assert_close(output_variance(updates, mean, one, x).variance, expected)


@pytest.mark.parametrize("wrong", [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.5], [0.0, 1.0]]])
def test_a_matrix_that_is_no_covariance_is_refused(wrong, adapters):
    updates = [a.modules[LAYER] for a in adapters[:2]]
    with pytest.raises(ValueError, match="a covariance is symmetric and has no negative eigenvalue"):
        output_variance(updates, torch.ones(2).double(), torch.tensor(wrong).double(), inputs(5, 24))
    with pytest.raises(
        ValueError, match=r"2 updates need a mean \[2\] and a covariance \[2, 2\] .* got \[3\] and \[2, 2\]"
    ):
        output_variance(updates, torch.ones(3).double(), torch.eye(2).double(), inputs(5, 24))
