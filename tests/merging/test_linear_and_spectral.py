"""Sums, means and their low-rank approximations against dense float64 matrices."""

import pytest
import torch

from moa.low_rank import LowRank
from moa.merging import merge

WEIGHTS = [0.7, -0.5, 0.9]


def merged(adapters, method, weights=WEIGHTS, **options):
    return merge(adapters, method, weights=weights, dtype=torch.float64, **options)


@pytest.mark.parametrize("method", ["concatenation", "weighted_sum"])
def test_a_sum_equals_the_dense_sum(method, adapters, dense_sum):
    for module, update in merged(adapters, method).modules.items():
        torch.testing.assert_close(update.delta(), dense_sum(adapters, WEIGHTS, module))


def test_svd_of_full_rank_equals_the_dense_sum(adapters, dense_sum):
    result = merged(adapters, "svd", rank=9)
    for module, update in result.modules.items():
        torch.testing.assert_close(update.delta(), dense_sum(adapters, WEIGHTS, module))
    assert result.report.energy_dropped < 1e-12


def test_svd_is_the_best_approximation_and_reports_what_it_drops(adapters, dense_sum):
    result = merged(adapters, "svd", rank=3)
    dropped = total = 0.0
    for module, update in result.modules.items():
        U, S, Vh = torch.linalg.svd(dense_sum(adapters, WEIGHTS, module))
        torch.testing.assert_close(update.delta(), U[:, :3] @ S[:3].diag() @ Vh[:3])
        dropped, total = dropped + S[3:].square().sum(), total + S.square().sum()
    assert result.report.energy_dropped == pytest.approx(float(dropped / total))


def test_svd_keeps_the_largest_input_rank_unless_told_otherwise(adapters):
    assert {layer.rank for layer in merged(adapters, "svd").report.layers.values()} == {3, 4}


def test_a_weighted_sum_stores_shared_directions_once(adapters):
    ranks = {m: layer.rank for m, layer in merged(adapters[:2], "weighted_sum", [1, 1]).report.layers.items()}
    assert set(ranks.values()) == {4}  # 2 + 3 ranks, one direction of A shared


def test_the_average_divides_by_the_sum_of_weights(adapters, dense_sum):
    for module, update in merged(adapters, "average", [1, 2, 5]).modules.items():
        torch.testing.assert_close(update.delta(), dense_sum(adapters, [1, 2, 5], module) / 8)


def test_default_weights_are_one_over_n_and_scale_multiplies_the_result(adapters, dense_sum):
    result = merged(adapters, "concatenation", None, scale=-1.5)
    for module, update in result.modules.items():
        torch.testing.assert_close(update.delta(), dense_sum(adapters, [-0.5] * 3, module))
    assert result.report.weights == {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}


def test_a_concatenation_beyond_the_layers_size_is_factored_down_exactly(equal_rank_adapters, dense_sum):
    five = equal_rank_adapters + equal_rank_adapters[:2]
    weights = [1.0, 1.0, 1.0, 0.3, 0.2]
    module = "model.layers.0.self_attn.v_proj"  # 12 rows, 15 ranks
    update = merged(five, "concatenation", weights).modules[module]
    assert update.rank <= 12
    torch.testing.assert_close(update.delta(), dense_sum(five, weights, module))


@pytest.mark.parametrize(
    ("split", "B_weight", "A_weight"),
    [
        ("sqrt", lambda w: abs(w) ** 0.5, lambda w: abs(w) ** 0.5 * (1 if w > 0 else -1)),
        ("both", lambda w: w, lambda w: w),
        ("b", lambda w: w, lambda w: 1.0),
    ],
)
def test_a_factor_sum_adds_factors_and_reports_its_cross_terms(
    split, B_weight, A_weight, equal_rank_adapters, dense_sum
):
    result = merged(equal_rank_adapters, "factor_sum", split=split)
    ratios = []
    for module, update in result.modules.items():
        pairs = list(zip(equal_rank_adapters, WEIGHTS, strict=True))
        B = sum(B_weight(w) * a.modules[module].B for a, w in pairs)
        A = sum(A_weight(w) * a.modules[module].A for a, w in pairs)
        torch.testing.assert_close(update.delta(), B @ A)
        wanted = dense_sum(equal_rank_adapters, WEIGHTS, module)
        ratios.append(float((B @ A - wanted).norm() / wanted.norm()))
    assert result.report.facts["cross_term_ratio"] == pytest.approx(sorted(ratios)[1], rel=1e-6)


def test_a_worked_example_of_two_by_two():
    from moa.adapters import Adapter

    one = LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))  # [[1, 0], [0, 0]]
    two = LowRank(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 2.0]]))  # [[0, 0], [0, 2]]
    pair = [Adapter("one", None, {"layer": one}), Adapter("two", None, {"layer": two})]
    expected = {
        "weighted_sum": [[1.0, 0.0], [0.0, 2.0]],
        "average": [[0.5, 0.0], [0.0, 1.0]],
        "svd": [[0.0, 0.0], [0.0, 2.0]],
        "factor_sum": [[1.0, 2.0], [1.0, 2.0]],
    }
    for method, matrix in expected.items():
        got = merge(pair, method, weights=[1, 1]).modules["layer"].delta()
        torch.testing.assert_close(got, torch.tensor(matrix), msg=method)
