"""KnOTS and Core Space against dense float64 versions of the papers' formulas."""

import pytest
import torch

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import merge
from moa.merging.spectral import core_space, knots

WEIGHTS = [0.7, -0.5, 0.9]
SHARED = "model.layers.0.self_attn.q_proj"


def merged(adapters, method, weights=WEIGHTS, **options):
    result = merge(adapters, method, weights=weights, dtype=torch.float64, **options)
    return {module: update.delta() for module, update in result.modules.items()}


def weighted_deltas(adapters, weights, module):
    pairs = zip(adapters, weights, strict=True)
    return torch.stack([w * a.modules[module].delta() for a, w in pairs if module in a.modules])


def trimmed(matrix, density):
    sizes = matrix.abs().flatten().sort(descending=True).values
    return torch.where(matrix.abs() >= sizes[int(density * matrix.numel()) - 1], matrix, 0.0)


def ties_sum(matrices, density):
    votes = torch.stack([trimmed(matrix, density) for matrix in matrices])
    return torch.where(votes.sign() == votes.sum(0).sign(), votes, 0.0).sum(0)


def magnitude_sum(matrices, density):
    return sum(trimmed(matrix, density) for matrix in matrices)


RULES = {"ties": ties_sum, "magnitude": magnitude_sum}


def dense_knots(deltas, rule, density):
    """SVD of the deltas side by side, entries of each S V_i^T by the rule, U in front."""
    U, S, Vh = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    rank = int((1e-6 * S[0] < S).sum())
    tasks = (S[:rank, None] * Vh[:rank]).split(deltas.shape[2], dim=1)
    return U[:, :rank] @ rule(tasks, density)


def dense_core_space(deltas, rule, density):
    """Eigenvectors of sum D D^T and sum D^T D, entries of each U^T D V by the rule, turned back."""
    sides = []
    for matrices in (deltas, deltas.mT):
        values, vectors = torch.linalg.eigh((matrices @ matrices.mT).sum(0))
        sides.append(vectors[:, values > 1e-10 * values[-1]])
    U, V = sides
    return U @ rule([U.T @ delta @ V for delta in deltas], density) @ V.T


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    ("method", "dense", "tolerance"), [("knots", dense_knots, 1e-6), ("core_space", dense_core_space, 1e-10)]
)
def test_entries_merge_as_in_the_dense_version(method, dense, tolerance, density, rule, adapters):
    for module, delta in merged(adapters, method, rule=rule, density=density).items():
        expected = dense(weighted_deltas(adapters, WEIGHTS, module), RULES[rule], density)
        assert (delta - expected).norm() < tolerance * expected.norm(), module


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_with_the_rule_sum_it_is_the_weighted_sum(method, adapters, dense_sum):
    for module, delta in merged(adapters, method, rule="sum").items():
        torch.testing.assert_close(delta, dense_sum(adapters, WEIGHTS, module), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", ["dare", "dare_ties"])
@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_random_rules_depend_on_the_seed_alone(method, rule, adapters):
    once, again, other = (merged(adapters, method, rule=rule, density=0.5, seed=seed)[SHARED] for seed in (3, 3, 4))
    assert torch.equal(once, again)
    assert not torch.allclose(once, other)


@pytest.mark.parametrize("method", [knots, core_space])
def test_dare_is_right_on_average(method, adapters, dense_sum):
    updates = [adapter.modules[SHARED] for adapter in adapters]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    draw = lambda seed: method(updates, weights, rule="dare", density=0.5, seeds=[seed, seed + 1, seed + 2])
    draws = torch.stack([draw(seed).update.delta() for seed in range(0, 240, 3)])
    error = (draws.mean(0) - dense_sum(adapters, WEIGHTS, SHARED)).norm()
    noise = (draws - draws.mean(0)).square().sum(dim=(1, 2)).mean().sqrt()
    assert error < 3 * noise / len(draws) ** 0.5


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_a_rank_truncates_the_result_and_says_what_that_drops(method, adapters):
    whole = merged(adapters, method)
    result = merge(adapters, method, weights=WEIGHTS, dtype=torch.float64, rank=2)
    for module, update in result.modules.items():
        U, S, Vh = torch.linalg.svd(whole[module])
        torch.testing.assert_close(update.delta(), U[:, :2] * S[:2] @ Vh[:2])
        assert result.report.layers[module].dropped == pytest.approx(float(S[2:].square().sum() / S.square().sum()))


@pytest.mark.parametrize("method", ["knots", "core_space"])
@pytest.mark.parametrize("density", [0.0, 1.5])
@pytest.mark.parametrize("rule", ["ties", "sum"])
def test_a_density_that_makes_no_sense_is_refused(method, density, rule, adapters):
    with pytest.raises(ValueError, match=r"density .* \(0, 1\], got"):
        merge(adapters, method, density=density, rule=rule)


def test_a_rule_that_does_not_exist_is_refused(adapters):
    with pytest.raises(ValueError, match="rule of knots must be one of sum, magnitude, ties, dare, dare_ties"):
        merge(adapters, "knots", rule="mean")


NOTHING = {
    "no B": LowRank(torch.zeros(6, 2, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)),
    "factors that cancel": LowRank(
        torch.ones(6, 2, dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64) * torch.arange(5)
    ),
}
SPECTRAL = ["svd", "knots", "core_space", "tsv", "iso_c", "iso_cts", "ctm", "wudi", "pico"]


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("method", SPECTRAL)
def test_adapters_that_change_nothing_merge_to_zeros_of_rank_one(method, nothing):
    update = merge([Adapter("idle", None, {"layer": NOTHING[nothing]})], method).modules["layer"]
    assert update.rank == 1
    assert update.norm() < 1e-6


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("method", SPECTRAL)
def test_an_update_of_zeros_has_no_influence_however_it_is_factored(method, nothing):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    two = [Adapter(name, None, {"layer": LowRank(draw(6, 2), draw(2, 5))}) for name in "ab"]
    idle = Adapter("idle", None, {"layer": NOTHING[nothing]})
    expected = merge(two, method, weights=[1, 1], dtype=torch.float64).modules["layer"].delta()
    got = merge([idle, *two], method, weights=[1, 1, 1], dtype=torch.float64).modules["layer"].delta()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [method for method in SPECTRAL if method not in ("wudi", "pico")])
def test_an_adapter_and_its_negative_cancel_without_noise_made_large(method, adapters):
    minus = Adapter("minus", None, {m: u.scaled(-1.0) for m, u in adapters[0].modules.items()}, torch.float64)
    size = adapters[0].modules[SHARED].norm()
    assert merged([adapters[0], minus], method, [1, 1])[SHARED].norm() < 1e-6 * size
