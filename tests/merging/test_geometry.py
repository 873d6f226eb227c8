"""The geometry of adapters against dense matrices, scipy's principal angles, and cases known by construction."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from moa.adapters import Adapter, AdapterError, Extras
from moa.low_rank import LowRank
from moa.merging.geometry import SAMPLED, agreeing_groups, effective_rank, geometry
from moa.merging.principal_angles import compared_spaces

WEIGHTS = [0.7, 0.5, -0.9]


def dense(adapters):
    """[layers, adapters, o, i] as a dictionary of float64 arrays, zero where an adapter lacks the layer."""
    shapes = {module: update.shape for a in adapters for module, update in a.modules.items()}
    nothing = {module: np.zeros(shape) for module, shape in shapes.items()}
    found = [{**nothing, **{m: (u.B.double() @ u.A.double()).numpy() for m, u in a.modules.items()}} for a in adapters]
    return {module: np.stack([deltas[module] for deltas in found]) for module in sorted(shapes)}


def flat(adapters):
    return np.concatenate([deltas.reshape(len(adapters), -1) for deltas in dense(adapters).values()], axis=1)


def close(got, expected):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-9, atol=1e-9)


def adapter(name, *, seed=None, rank=3, shape=(12, 10), base="tiny/base", **modules):
    if seed is not None:
        drawn = torch.Generator().manual_seed(seed)
        B, A = torch.randn(shape[0], rank, generator=drawn), torch.randn(rank, shape[1], generator=drawn)
        modules = {"layer": LowRank(B.double(), A.double())}
    return Adapter(name, base, modules)


def test_norms_and_cosines_are_those_of_the_flattened_adapters(adapters):
    whole, vectors = geometry(adapters).whole, flat(adapters)
    norms = np.linalg.norm(vectors, axis=1)
    close(whole.norms, norms)
    close(whole.cosines, vectors @ vectors.T / norms / norms[:, None])


def test_cancellation_compares_the_weighted_sum_with_its_parts(adapters):
    whole, vectors = geometry(adapters, WEIGHTS).whole, flat(adapters)
    parts = np.abs(WEIGHTS) * np.linalg.norm(vectors, axis=1)
    close(whole.cancellation, 1 - np.linalg.norm(WEIGHTS @ vectors) / parts.sum())
    close(whole.cancellation_if_orthogonal, 1 - np.linalg.norm(parts) / parts.sum())


def test_overlaps_and_angles_are_those_of_scipys_principal_angles(adapters):
    found = geometry(adapters)
    for module in found.layers:
        for i, a in enumerate(adapters):
            for j, b in enumerate(adapters):
                if module in a.modules and module in b.modules:
                    least = min(a.modules[module].rank, b.modules[module].rank)
                    inputs = subspace_angles(a.modules[module].A.T.numpy(), b.modules[module].A.T.numpy())
                    outputs = subspace_angles(a.modules[module].B.numpy(), b.modules[module].B.numpy())
                    of = found.layers[module]
                    close(of.input_overlap[i, j], (np.cos(inputs) ** 2).sum() / least)
                    close(of.output_overlap[i, j], (np.cos(outputs) ** 2).sum() / least)
                    got = [of.input_mean_angle, of.input_largest_angle, of.output_mean_angle, of.output_largest_angle]
                    expected = np.rad2deg([inputs.mean(), inputs.max(), outputs.mean(), outputs.max()])
                    np.testing.assert_allclose([float(angle[i, j]) for angle in got], expected, atol=1e-5)
    for name in ("input_overlap", "input_mean_angle", "input_largest_angle", "output_largest_angle"):
        layers = torch.stack([getattr(of, name) for of in found.layers.values()]).numpy()
        close(getattr(found.whole, name), np.nanmean(layers, axis=0))


def test_sign_conflict_counts_opposite_entries_of_those_that_both_change(adapters):
    found, vectors = geometry(adapters), np.sign(flat(adapters))
    for i in range(3):
        for j in range(3):
            both = (vectors[i] != 0) & (vectors[j] != 0)
            close(found.whole.sign_conflict[i, j], (vectors[i] != vectors[j])[both].mean())
    assert found.sampled == []


def test_signs_of_a_large_layer_are_estimated_closely_and_repeatably_and_it_is_named():
    pair = [adapter(name, seed=seed, rank=8, shape=(SAMPLED + 300, 2 * SAMPLED)) for seed, name in enumerate("ab")]
    found, signs = geometry(pair), np.sign(flat(pair))
    exact = (signs[0] != signs[1]).mean()
    assert found.sampled == ["layer"]
    assert 0 < abs(float(found.whole.sign_conflict[0, 1]) - exact) < 0.01
    assert torch.equal(found.whole.sign_conflict, geometry(pair).whole.sign_conflict)
    assert not torch.equal(found.whole.sign_conflict, geometry(pair, seed=1).whole.sign_conflict)


def test_effective_ranks_are_exponentials_of_the_entropy_of_the_singular_values(adapters):
    found = geometry(adapters, WEIGHTS)

    def of(matrix):
        S = np.linalg.svd(matrix, compute_uv=False)
        p = S[1e-9 * S[0] < S] / S.sum()
        return math.exp(-(p * np.log(p)).sum())

    for module, deltas in dense(adapters).items():
        close(found.layers[module].effective_rank_of_sum, of(np.tensordot(WEIGHTS, deltas, 1)))
        for i, delta in enumerate(deltas):
            if delta.any():
                close(found.layers[module].effective_ranks[i], of(delta))
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert math.isnan(effective_rank(torch.zeros(2)))


def test_refactored_adapters_have_the_same_geometry(adapters):
    def refactored(update):
        G = torch.eye(update.rank).double() + torch.ones(update.rank, update.rank).double().triu()
        return LowRank(update.B @ torch.linalg.inv(G), G @ update.A)

    again = [Adapter(a.name, a.base_model, {m: refactored(u) for m, u in a.modules.items()}) for a in adapters]
    before, after = geometry(adapters).whole, geometry(again).whole
    for name in ("cosines", "input_overlap", "output_overlap", "effective_ranks", "sign_conflict"):
        close(getattr(after, name), getattr(before, name))


def test_an_adapter_and_its_negative_share_all_directions_and_conflict_in_every_sign():
    one = adapter("one", seed=0)
    other = adapter("other", layer=LowRank(-2 * one.modules["layer"].B, one.modules["layer"].A))
    found = geometry([one, other], [1.0, 0.5])
    close(found.whole.cosines[0, 1], -1)
    close([found.whole.input_overlap[0, 1], found.whole.output_overlap[0, 1], found.whole.sign_conflict[0, 1]], 1)
    close(found.whole.cancellation, 1)
    assert found.suggestion == "one and other conflict (cosine -1.00): route or keep them apart"


def test_what_is_not_there_is_not_compared():
    found = geometry(
        [
            adapter("one", seed=0),
            adapter("elsewhere", other=adapter("x", seed=1).modules["layer"]),
            adapter("idle", layer=LowRank(torch.zeros(12, 2), torch.ones(2, 10))),
        ]
    )
    assert found.whole.cosines[0, 1] == 0
    assert found.whole.cosines[0, 2].isnan() and found.whole.effective_ranks[2].isnan()
    assert found.whole.input_overlap[0, 1].isnan() and found.whole.output_largest_angle[0, 1].isnan()
    assert found.whole.sign_conflict[0, 1].isnan()
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["whole"]["cosines"][0] == [pytest.approx(1), 0.0, None]
    assert stored["layers"]["other"]["effective_ranks"][0] is None
    assert "idle changes nothing: leave out" in found.suggestion


def test_adapters_that_agree_are_grouped_and_the_others_stand_alone():
    task = adapter("task", seed=0).modules["layer"]
    own = [adapter("own", seed=seed).modules["layer"] for seed in (1, 2)]
    alike = [
        adapter(f"alike{i}", layer=LowRank(torch.cat([task.B, u.B], 1), torch.cat([task.A, u.A])))
        for i, u in enumerate(own)
    ]
    stranger = adapter("stranger", elsewhere=task)
    found = geometry([alike[0], stranger, alike[1]])
    assert found.groups == [["alike0", "alike1"], ["stranger"]]
    assert "alike0 and alike1 agree (mean cosine" in found.suggestion
    assert "no adapter agrees with stranger: a mean fades each, so sum or route" in found.suggestion


def test_what_an_adapter_holds_beside_its_updates_is_named_as_not_compared(adapters):
    biased = replace(adapters[0], name="biased", extras=Extras(lora_bias={"layer": torch.ones(3)}))
    assert geometry([biased, adapters[1]]).not_compared == {"biased": ["lora_bias"]}
    assert geometry(adapters).not_compared == {}


def test_groups_follow_the_mean_cosine_between_clusters():
    cosines = torch.tensor([[1, 0.5, 0.15, 0], [0.5, 1, 0.1, 0], [0.15, 0.1, 1, 0], [0, 0, 0, 1]]).double()
    assert agreeing_groups(cosines, list("abcd")) == [["a", "b", "c"], ["d"]]
    cosines[0, 2] = cosines[2, 0] = 0.05  # c now has a mean of 0.075 to a and b
    assert agreeing_groups(cosines, list("abcd")) == [["a", "b"], ["c"], ["d"]]


def test_overlap_is_one_inside_a_larger_space_and_zero_across():
    eye = torch.eye(6).double()
    found = compared_spaces([eye[:, :4], eye[:, 1:3], eye[:, 4:]])
    close(found.overlap, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    close(found.mean_angle, [[0, 0, 90], [0, 0, 90], [90, 90, 0]])
    close(found.largest_angle, found.mean_angle)


def test_angles_of_planes_turned_by_a_known_angle_are_that_angle():
    eye, turn = torch.eye(4).double(), math.radians(30)
    tilted = torch.stack([eye[0], math.cos(turn) * eye[1] + math.sin(turn) * eye[2]], dim=1)
    found = compared_spaces([eye[:, :2], tilted, eye[:, :0]])
    close([found.mean_angle[0, 1], found.largest_angle[1, 0], found.overlap[0, 1]], [15, 30, (1 + 0.75) / 2])
    assert found.mean_angle[2].isnan().all() and found.overlap[:, 2].isnan().all()


def test_bad_input_is_refused(adapters):
    with pytest.raises(ValueError, match="needs at least two, got 1: name another one"):
        geometry(adapters[:1])
    with pytest.raises(ValueError, match="weights must be one for each adapter: got 2 for 3"):
        geometry(adapters, [1, 1])
    other = Adapter("other", "other/base", adapters[0].modules)
    with pytest.raises(AdapterError, match="'tiny/base' and 'other' on 'other/base'"):
        geometry([*adapters, other])
    assert geometry([*adapters, other], check_base=False).whole.cosines[0, 3] == pytest.approx(1)


def test_progress_wraps_the_layers(adapters):
    seen = []
    geometry(adapters, progress=lambda names, description: seen.extend(names) or names)
    assert seen == sorted(adapters[0].modules)
