"""LoRA-LEGO on adapters whose clusters are known, against its formulas written out vector by vector."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import kmeans_plusplus
from threadpoolctl import threadpool_info

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import merge
from moa.merging.clustering import _far_apart, clusters
from moa.merging.parallel import using_threads

LAYER, O, N, K = "model.layers.0.self_attn.q_proj", 20, 30, 3  # noqa: E741
WEIGHTS = [0.7, -0.5, 0.9]
# Which prototype each unit of each adapter is near.
NEAR = [[0, 1, 2], [2, 0], [1, 2, 0, 1]]


def draw(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(name, update):
    return Adapter(name=name, base_model="tiny/base", modules={LAYER: update}, dtype=torch.float64)


@pytest.fixture
def clustered():
    """Three adapters of ranks 3, 2 and 4 whose units are near three prototypes of different length."""
    lengths = torch.tensor([1.0, 1.4, 0.8], dtype=torch.float64)
    B, A = draw(O, K, seed=1) * lengths, draw(N, K, seed=2) * lengths
    near_b = [B[:, of] + 0.1 * draw(O, len(of), seed=10 + i) for i, of in enumerate(NEAR)]
    near_a = [A[:, of] + 0.1 * draw(N, len(of), seed=20 + i) for i, of in enumerate(NEAR)]
    return [adapter(f"adapter{i}", LowRank(b, a.T)) for i, (b, a) in enumerate(zip(near_b, near_a, strict=True))]


def merged(adapters, method="lego", weights=WEIGHTS, **options):
    result = merge(adapters, method, weights=weights, dtype=torch.float64, **options)
    return result.modules[LAYER].delta(), result


def units_of(adapters, weights):
    """[a; b] of every unit with the weight in it, by prototype."""
    groups = [[] for _ in range(K)]
    for source, w, near in zip(adapters, weights, NEAR, strict=True):
        update = source.modules[LAYER]
        for j, prototype in enumerate(near):
            a, b = update.A[j].numpy(), update.B[:, j].numpy()
            groups[prototype].append(np.concatenate([abs(w) ** 0.5 * a, np.sign(w) * abs(w) ** 0.5 * b]))
    return groups


def published(adapters, weights, order, scale):
    """Mean of each cluster, brought to the mean norm of its members, times a scale of the output."""
    M = np.zeros((O, N))
    for group in units_of(adapters, weights):
        centroid = np.mean(group, axis=0)
        if order is not None:
            centroid = centroid * np.mean([np.linalg.norm(m, order) for m in group]) / np.linalg.norm(centroid, order)
        M += np.outer(centroid[N:], centroid[:N])
    return torch.from_numpy(scale * M)


@pytest.mark.parametrize(("norm", "order"), [("inf", np.inf), ("2", 2), ("none", None)])
def test_sum_reading_equals_the_formulas(norm, order, clustered):
    weights = [0.7, 0.5, 0.9]
    got, _ = merged(clustered, weights=weights, rank=K, norm=norm, preserve="sum")
    torch.testing.assert_close(got, published(clustered, weights, order, (9 / K) ** 0.5))


@pytest.mark.parametrize(("norm", "order"), [("inf", np.inf), ("2", 2), ("none", None)])
@pytest.mark.parametrize("weight", [None, 1.0, 0.25])
def test_single_reading_equals_the_formulas_whatever_all_weights_are(norm, order, weight, clustered):
    got, _ = merged(clustered, weights=weight and [weight] * 3, rank=K, norm=norm)
    torch.testing.assert_close(got, published(clustered, [1, 1, 1], order, (3 / K) ** 0.5))


def test_a_negative_weight_turns_what_an_adapter_writes(clustered):
    negated = adapter("n", LowRank(-clustered[1].modules[LAYER].B, clustered[1].modules[LAYER].A))
    expected, _ = merged([clustered[0], negated, clustered[2]], weights=[0.7, 0.5, 0.9])
    torch.testing.assert_close(merged(clustered)[0], expected)


@pytest.mark.parametrize("method", ["lego", "lego_gauge_safe"])
@pytest.mark.parametrize("rank", range(1, 10))
def test_any_ranks_go_in_and_any_rank_comes_out(method, rank, clustered):
    delta, result = merged(clustered, method, rank=rank)
    assert result.modules[LAYER].rank == rank
    assert torch.isfinite(delta).all() and delta.norm() > 0


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lego", {"preserve": "none", "norm": "none"}),
        *(("lego", {"preserve": preserve}) for preserve in ("none", "sum", "norm")),
        ("lego_gauge_safe", {}),
    ],
)
def test_as_many_clusters_as_units_give_the_weighted_sum(method, options, clustered, adapters, dense_sum):
    for members in (clustered, adapters):
        result = merge(members, method, weights=WEIGHTS, rank=9, dtype=torch.float64, **options)
        for module, update in result.modules.items():
            torch.testing.assert_close(update.delta(), dense_sum(members, WEIGHTS, module))
        assert result.report.energy_dropped < 1e-12


def test_the_norm_of_the_sum_is_kept_on_request(clustered, dense_sum):
    got, _ = merged(clustered, rank=2, preserve="norm")
    assert got.norm() == pytest.approx(dense_sum(clustered, WEIGHTS, LAYER).norm())


@pytest.mark.parametrize(
    ("method", "options", "times"),
    [("lego", {}, 1), ("lego", {"preserve": "sum"}, 3**-0.5), ("lego_gauge_safe", {}, 1)],
)
def test_copies_of_one_adapter_merge_to_it(method, options, times, clustered):
    got, result = merged([clustered[0]] * 3, method, None, **options)
    torch.testing.assert_close(got, times * clustered[0].modules[LAYER].delta())
    assert result.report.facts.get("spread_in_clusters", 0.0) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", ["lego", "lego_gauge_safe"])
def test_copies_of_a_unit_are_not_parted_to_fill_the_rank(method, clustered):
    got, result = merged([clustered[0]] * 3, method, None, rank=5)
    assert result.modules[LAYER].rank == 3
    torch.testing.assert_close(got / got.norm(), clustered[0].modules[LAYER].delta() / got.norm())


@pytest.mark.parametrize("method", ["lego", "lego_gauge_safe"])
def test_vanishing_adapters_merge_to_nothing(method, clustered):
    B, A = clustered[0].modules[LAYER].B, clustered[0].modules[LAYER].A
    delta, result = merged([adapter("x", LowRank(0 * B, A)), adapter("y", LowRank(B, 0 * A))], method, None)
    assert result.modules[LAYER].rank == 1 and not delta.any()


def test_units_that_cancel_in_a_centroid_leave_nothing_to_blow_up():
    b, a = draw(O, 1, seed=3), draw(1, N, seed=4)
    opposites = [adapter("x", LowRank(b, a)), adapter("y", LowRank(-b, -a))]
    for preserve in ("single", "sum", "norm", "none"):
        delta, _ = merged(opposites, weights=[1, 1], preserve=preserve)
        assert delta.norm() < 1e-9


def test_updates_that_cancel_in_one_cluster_merge_to_zeros_of_rank_one():
    b, a = draw(O, 1, seed=3), draw(1, N, seed=4)
    opposites = [adapter("x", LowRank(b, a)), adapter("y", LowRank(-b, a))]
    delta, result = merged(opposites, "lego_gauge_safe", weights=[1, 1])
    assert result.modules[LAYER].rank == 1 and delta.norm() < 1e-9


def test_what_a_sign_flip_of_one_rank_does_shows_which_of_the_two_is_gauge_safe(clustered):
    update, signs = clustered[2].modules[LAYER], torch.tensor([1.0, 1, -1, 1], dtype=torch.float64)
    flipped = [*clustered[:2], adapter("adapter2", LowRank(update.B * signs, signs[:, None] * update.A))]
    for method, moves in (("lego", True), ("lego_gauge_safe", False)):
        before, after = merged(clustered, method)[0], merged(flipped, method)[0]
        assert ((after - before).norm() > 0.05 * before.norm()) == moves


def near(basis, seed):
    """An orthonormal basis close to another one, column by column."""
    Q = torch.linalg.qr(basis + 0.05 * draw(*basis.shape, seed=seed)).Q
    return Q * (Q * basis).sum(0).sign()


def test_the_gauge_safe_clusters_are_brought_to_rank_one_each(dense_sum):
    """Adapters whose singular directions are known, and near those of the others."""
    left, right = (torch.linalg.qr(draw(size, K, seed=size)).Q for size in (O, N))
    sizes, weights = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), [0.7, 0.5, 0.9]
    updates = [LowRank(near(left, 30 + i) * sizes, near(right, 40 + i).T) for i in range(3)]
    members = [adapter(f"adapter{i}", update) for i, update in enumerate(updates)]
    groups = [sum(w * torch.outer(u.B[:, j], u.A[j]) for u, w in zip(updates, weights, strict=True)) for j in range(K)]
    U, S, Vh = torch.linalg.svd(torch.stack(groups))
    expected = (S[:, :1, None] * U[:, :, :1] @ Vh[:, :1]).sum(0)
    got, result = merged(members, "lego_gauge_safe", weights)
    torch.testing.assert_close(got, expected)
    error = (dense_sum(members, weights, LAYER) - expected).norm() ** 2
    assert result.report.energy_dropped == pytest.approx(float(error / (error + expected.norm() ** 2)))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_clusters_are_the_best_of_all_partitions(k):
    points = draw(7, 4, seed=8)

    def spread(labels):
        groups = [points[[x == c for x in labels]] for c in set(labels)]
        return sum(float((group - group.mean(0)).square().sum()) for group in groups)

    best = min(spread(labels) for labels in itertools.product(range(k), repeat=7) if len(set(labels)) == k)
    member = clusters(points @ points.T, points.norm(dim=1), k, seed=0)
    assert member.shape == (7, k) and (member.sum(1) == 1).all()
    assert spread(member.argmax(1).tolist()) == pytest.approx(best)


def test_a_unit_of_size_zero_is_in_no_cluster():
    points = draw(6, 4, seed=9)
    sizes = points.norm(dim=1)
    sizes[2] = 0
    member = clusters(points @ points.T, sizes, 3, seed=0)
    assert member.sum(1).tolist() == [1, 1, 0, 1, 1, 1]


def test_the_report_tells_how_far_units_are_from_their_centroids(clustered):
    _, result = merged(clustered, weights=[1, 1, 1], rank=K, norm="none")
    groups = [np.array(group) for group in units_of(clustered, [1, 1, 1])]
    within = sum(((group - group.mean(0)) ** 2).sum() for group in groups) / sum((group**2).sum() for group in groups)
    assert result.report.facts["spread_in_clusters"] == pytest.approx(within)
    sum_, got = published(clustered, [1, 1, 1], None, 1), sum(a.modules[LAYER].delta() for a in clustered)
    cosine = float((sum_ * got).sum() / sum_.norm() / got.norm())
    assert result.report.facts["cosine_with_sum"] == pytest.approx(cosine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "3"}, "norm of lego must be one of inf, 2, none, got '3'"),
        ({"preserve": "all"}, "preserve of lego must be one of single, sum, norm, none, got 'all'"),
        ({"rank": 10}, "rank must be from 1 to 9, all that these adapters hold together, got 10"),
        ({"rank": 0}, "rank must be from 1 to 9"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, message, clustered):
    with pytest.raises(ValueError, match=message):
        merged(clustered, **options)


@pytest.mark.parametrize("method", ["lego", "lego_gauge_safe"])
@pytest.mark.parametrize("how", [{"scale": 0.7}, {"scale": 3.0}, {"restore_norm": True}])
def test_an_adapter_less_itself_merges_whatever_rounding_is_left(method, how):
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        B, A = torch.randn(24, 4, generator=generator), torch.randn(4, 20, generator=generator)
        adapters = [Adapter(name, "tiny", {"layer": LowRank(B, A)}) for name in ("a", "b")]
        merged = merge(adapters, method, weights=[1.0, -1.0], **how)
        assert all(torch.isfinite(factor).all() for u in merged.modules.values() for factor in (u.B, u.A))
        assert math.isfinite(merged.report.layers["layer"].rounding)


def test_layers_clustered_at_the_same_time_leave_the_threads_of_libraries_as_they_were(adapters):
    merge(adapters, "lego", rank=2)  # loads what k-means loads

    def threads():
        return {library["filepath"]: library["num_threads"] for library in threadpool_info()}

    before = threads()
    with using_threads(3):
        for seed in range(5):
            merge(adapters, "lego", rank=2, seed=seed)
    assert threads() == before


@pytest.mark.parametrize("k", [2, 5, 12])
def test_kmeans_begins_where_scikit_learn_would_begin(k):
    points, mass = draw(30, 6, seed=k), draw(30, seed=100 + k).abs().numpy()
    distances = torch.cdist(points, points).square().numpy()
    for seed in range(20):
        centers, _ = kmeans_plusplus(points.numpy(), k, sample_weight=mass, random_state=seed)
        begun = _far_apart(points.numpy(), k, np.random.RandomState(seed), mass=mass, distances=distances)
        assert np.array_equal(begun, centers)
