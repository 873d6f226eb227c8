"""Trees of merges: their order against scipy on dense updates, linear trees against sums, others step by step."""

import numpy as np
import pytest
import torch
from scipy.cluster import hierarchy as scipy_hierarchy
from scipy.spatial.distance import pdist

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import merge, registry
from moa.merging.checks import common_shapes
from moa.merging.hierarchy import tree
from moa.merging.layers import Layers
from moa.merging.registry import Merged

WEIGHTS = [0.7, 0.5, 0.9]
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def pairs(adapters):
    """ "a" and "a2" are alike, "c" and "c2" are, "b" is a bit like the former: ((a a2) b) (c c2)."""
    a, b, c = adapters
    return [a, blend("c2", c, 1.0, b, 0.2), blend("b", b, 1.0, a, 0.5), blend("a2", a, 1.0, b, 0.1), c]


def blend(name, one, p, other, q):
    return adapter(
        name,
        {
            m: LowRank(torch.cat([p * u.B, q * other.modules[m].B], 1), torch.cat([u.A, other.modules[m].A]))
            for m, u in one.modules.items()
        },
    )


def adapter(name, modules):
    return Adapter(name, "tiny/base", modules, torch.float64)


def layers_of(members, weights=None):
    return Layers(members, torch.tensor(weights or [1.0] * len(members)).double(), common_shapes(members))


def merged(members, weights=WEIGHTS, method="hierarchical", **options):
    return merge(members, method, weights=weights, dtype=torch.float64, **options)


def assert_same(got, expected, tolerance=1e-9):
    assert got.keys() == expected.keys()
    for module in expected:
        error = (got[module].delta() - expected[module].delta()).norm() / expected[module].delta().norm()
        assert error < tolerance, f"{module}: relative difference {error:.2e}"


def flat_updates(members):
    """One row an adapter: all its entries in all layers."""
    rows = []
    for member in members:
        parts = []
        for module, (o, n) in common_shapes(members).items():
            known = module in member.modules
            parts.append(
                (member.modules[module].delta() if known else torch.zeros(o, n, dtype=torch.float64)).flatten()
            )
        rows.append(torch.cat(parts).numpy())
    return np.stack(rows)


def flat_projectors(members):
    """One row an adapter: projectors on what it writes and reads in each layer; distances of rows are chordal."""
    rows = []
    for member in members:
        parts = []
        for module, (o, n) in common_shapes(members).items():
            if module in member.modules:
                delta = member.modules[module].delta()
                parts += [delta @ torch.linalg.pinv(delta), torch.linalg.pinv(delta) @ delta]
            else:
                parts += [torch.zeros(o, o).double(), torch.zeros(n, n).double()]
        rows.append(torch.cat([part.flatten() for part in parts]).numpy())
    return np.stack(rows) / 2**0.5 / (2 * len(common_shapes(members))) ** 0.5


@pytest.mark.parametrize("linkage", ["average", "ward", "complete", "single"])
@pytest.mark.parametrize("distance", ["cosine", "subspace"])
def test_the_tree_is_scipys_on_dense_updates(linkage, distance, pairs):
    if distance == "subspace":
        expected = scipy_hierarchy.linkage(flat_projectors(pairs), linkage)
    elif linkage == "ward":
        rows = flat_updates(pairs)
        expected = scipy_hierarchy.linkage(rows / np.linalg.norm(rows, axis=1, keepdims=True), "ward")
    else:
        expected = scipy_hierarchy.linkage(pdist(flat_updates(pairs), "cosine"), linkage)
    members = [{member.name} for member in pairs]
    for fusion, (left, right, height, _) in zip(tree(layers_of(pairs), linkage, distance), expected, strict=True):
        assert {frozenset(fusion.left), frozenset(fusion.right)} == {
            frozenset(members[int(left)]),
            frozenset(members[int(right)]),
        }
        assert fusion.height == pytest.approx(height, abs=1e-7)
        members.append({*fusion.left, *fusion.right})


def test_the_most_similar_adapters_are_merged_first(pairs):
    first, second, third, last = tree(layers_of(pairs))
    assert {*first.left, *first.right} == {"a", "a2"}
    assert {*second.left, *second.right} == {"c", "c2"}
    assert {frozenset(third.left), frozenset(third.right)} == {frozenset({"a", "a2"}), frozenset({"b"})}
    assert first.height < second.height < third.height < last.height


def test_a_negative_weight_compares_the_negated_update(adapters):
    opposite = adapter("opposite", {m: LowRank(-u.B, u.A) for m, u in adapters[0].modules.items()})
    members = [adapters[0], adapters[1], opposite]
    assert {*tree(layers_of(members, [1.0, 1.0, -1.0]))[0][0]} <= {"a", "opposite"}
    assert tree(layers_of(members, [1.0, 1.0, -1.0]))[0].height == pytest.approx(0, abs=1e-12)
    assert tree(layers_of(members))[-1].height > 1


@pytest.mark.parametrize("node", ["weighted_sum", "concatenation", "average"])
@pytest.mark.parametrize(("linkage", "distance"), [("average", "cosine"), ("ward", "subspace")])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_a_tree_of_a_linear_node_is_the_weighted_sum(node, linkage, distance, groups, pairs):
    weights = [0.7, 0.5, -0.9, 0.2, 1.3]
    got = merged(pairs, weights, node=node, linkage=linkage, distance=distance, groups=groups)
    assert_same(got.modules, merged(pairs, weights, "weighted_sum").modules)
    assert got.report.energy_dropped < 1e-12


@pytest.mark.parametrize("node", ["ties density=0.6", "slerp", "karcher"])
def test_other_trees_are_the_merges_of_their_nodes_one_after_the_other(node, pairs):
    a, c2, b, a2, c = pairs
    name, *options = node.split()
    options = {"density": float(options[0].partition("=")[2])} if options else {}

    def at_node(one, other, weights):
        total = sum(weights)
        result = merged([one, other], [w / total for w in weights], name, **options)
        return adapter(f"{one.name}{other.name}", result.modules)

    left = at_node(at_node(a, a2, [0.7, 0.2]), b, [0.9, 0.9])
    right = at_node(c2, c, [0.5, 1.3])
    root = at_node(left, right, [1.8, 1.8])
    expected = {
        m: root.modules[m].scaled(3.6) if m in right.modules else u.scaled(1.8) for m, u in left.modules.items()
    }
    assert len(right.modules) == 2 and len(left.modules) == 3
    assert_same(merged(pairs, [0.7, 0.5, 0.9, 0.2, 1.3], node=node).modules, expected, tolerance=1e-5)


def test_a_cut_merges_inside_the_groups_and_adds_the_groups_up(pairs):
    a, c2, b, a2, c = pairs
    weights = [0.7, 0.5, 0.9, 0.2, 1.3]
    got = merged(pairs, weights, node="slerp", groups=3)
    left = merged([a, a2], [0.7, 0.2], "slerp", scale=0.9)
    right = merged([c2, c], [0.5, 1.3], "slerp", scale=1.8)
    groups = [adapter("left", left.modules), adapter("right", right.modules), b]
    assert_same(got.modules, merged(groups, [1.0, 1.0, 0.9], "concatenation").modules)
    assert len(got.report.facts) == 2


def test_all_layers_follow_one_order_which_the_report_tells(pairs):
    report = merged(pairs, [1.0] * 5, node="slerp").report
    facts = {tuple(layer.facts.items()) for layer in report.layers.values()}
    (only,) = facts
    assert [name for name, _ in only] == [
        f"distance from {'+'.join(left)} to {'+'.join(right)}" for left, right, _ in tree(layers_of(pairs))
    ]


def test_an_adapter_that_changes_nothing_is_not_in_the_tree(adapters):
    idle = adapter("idle", {m: LowRank(0 * u.B, u.A) for m, u in adapters[0].modules.items()})
    fusions = tree(layers_of([idle, *adapters]))
    assert {*fusions[-1].left, *fusions[-1].right} == {"a", "b", "c"}
    assert tree(layers_of([idle, adapters[0]])) == []
    assert all(update.norm() == 0 for update in merged([idle], [1.0]).modules.values())


def test_one_adapter_comes_back_untouched_whatever_the_node(adapters):
    got = merged(adapters[:1], [2.0], node="ties density=0.1").modules
    assert_same(got, {m: u.scaled(2.0) for m, u in adapters[0].modules.items()})


def test_a_rank_is_that_of_the_last_merge_and_not_of_those_below(pairs):
    weights = [0.7, 0.5, 0.9, 0.2, 1.3]
    cut = merged(pairs, weights, node="weighted_sum", rank=3)
    assert_same(cut.modules, merged(pairs, weights, "svd", rank=3).modules)
    best = merged(pairs, weights, "svd", rank=3).report.energy_dropped
    assert cut.report.energy_dropped == pytest.approx(best)
    assert {layer.rank for layer in merged(pairs, weights, node="concatenation", rank=3).report.layers.values()} == {3}
    assert {layer.rank for layer in merged(pairs, weights, node="slerp", rank=3, groups=2).report.layers.values()} == {
        3
    }
    assert merged(pairs, weights, node="ties", rank=20).report.layers[LAYER].rank == 20


def test_energy_that_ranks_below_have_cost_is_reported(adapters):
    """svd keeps the larger rank of two at each node, so the first merge drops directions, and the second more."""

    def lost(result):
        return result.report.layers[LAYER].dropped * result.report.layers[LAYER].energy

    order = tree(layers_of(adapters))
    (third,) = [a for a in adapters if a.name not in {*order[0].left, *order[0].right}]
    first = merged([a for a in adapters if a is not third], [0.5, 0.5], "svd")
    second = merged([adapter("first", first.modules), third], [2 / 3, 1 / 3], "svd")
    assert lost(first) > 0 and lost(second) > 0
    got = lost(merged(adapters, [1.0, 1.0, 1.0], node="svd"))
    assert got == pytest.approx(9 * (lost(second) + (2 / 3) ** 2 * lost(first)))


def test_random_nodes_draw_alike_in_any_order_of_adapters(pairs, monkeypatch):
    def scaled_by_seed(updates, weights, *, seeds):
        """Scale each update by a number of its seed, and add up."""
        draws = [1 + (seed % 1009) / 1009 for seed in seeds]
        parts = [u.scaled(float(w) * d) for u, w, d in zip(updates, weights, draws, strict=True)]
        return Merged(LowRank(torch.cat([p.B for p in parts], 1), torch.cat([p.A for p in parts])))

    monkeypatch.setitem(registry._METHODS, "noisy", registry.MergeMethod("noisy", scaled_by_seed, None, 1, {}))
    weights = [0.7, 0.5, 0.9, 0.2, 1.3]
    forward = merged(pairs, weights, node="noisy").modules
    assert_same(merged(pairs[::-1], weights[::-1], node="noisy").modules, forward)
    other = merged(pairs, weights, node="noisy", seed=1).modules
    assert (other[LAYER].delta() - forward[LAYER].delta()).norm() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"node": "tie"}, "there is no merge method 'tie': .*; did you mean 'ties'?"),
        ({"node": ""}, "there is no merge method ''"),
        ({"node": "hierarchical"}, "'hierarchical' cannot be a node, because it decides over the whole model, and a"),
        ({"node": "slerp scope=model"}, "'slerp scope=model' cannot be a node, because it decides over the whole"),
        (
            {"node": "regmean"},
            "'regmean' cannot be a node, because it needs statistics, and a merged cluster has none",
        ),
        ({"node": "ties density:0.4"}, "options of a node are written as in 'ties density=0.4', got 'density:0.4'"),
        ({"node": "ties densty=0.4"}, "ties has no option 'densty': .*; did you mean 'density'?"),
        ({"node": "ties density=2"}, "density is the share of entries to keep"),
        ({"groups": 0}, "groups must be from 1 to 3, the adapters that change anything, got 0"),
        ({"groups": 4}, "groups must be from 1 to 3, the adapters that change anything, got 4"),
        ({"linkage": "centroid"}, "linkage of hierarchical must be one of average, ward, complete, single"),
        ({"distance": "l2"}, "distance of hierarchical must be one of cosine, subspace, got 'l2'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(options, message, adapters):
    with pytest.raises(ValueError, match=message):
        merged(adapters, **options)


def test_an_option_of_a_node_with_another_type_is_refused(adapters):
    with pytest.raises(TypeError, match="density of ties must be a number, got 'much'"):
        merged(adapters, node="ties density=much")
